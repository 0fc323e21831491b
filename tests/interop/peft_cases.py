"""Tiny models of transformers, adapted by the real PEFT with everything perturbed."""

import contextlib
import copy
import functools
import tempfile
import warnings

import jax
import numpy as np

import lorax
from lorax.interop import hf
from tests.models import golden

with contextlib.suppress(ImportError):  # the test modules skip; see models/golden.py
    import peft
    import torch
    import transformers

TOKENS = golden.tokens_of(29, batch=2, time=7)


@functools.cache
def torch_model(family, tied):
    """The base in torch; copy it before adapting."""
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=29,
            n_positions=16,
            n_embd=16,
            n_layer=3,
            n_head=2,
            tie_word_embeddings=tied,
        )
        return golden.redraw(transformers.GPT2LMHeadModel(config), size=1.5)
    config = transformers.LlamaConfig(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    return golden.redraw(transformers.LlamaForCausalLM(config), size=1.5)


def fresh(family, tied):
    """A copy of the base to adapt."""
    model = torch_model(family, tied)
    again = type(model)(copy.deepcopy(model.config))
    again.load_state_dict(model.state_dict())
    return again.eval()


@functools.cache
def own(family, tied, scan=True):
    """Our config, parameters, and a compiled function from parameters to logits."""
    with tempfile.TemporaryDirectory() as folder:
        torch_model(family, tied).save_pretrained(folder)
        model, params = hf.load(folder, scan=scan)
    run = jax.jit(lambda params: model.apply({"params": params}, TOKENS))
    lowered = run.lower(params)
    return model.config, params, lowered.compile({"xla_backend_optimization_level": 0})


def logits(model):
    """Logits of a torch model in float64; the model is float32 afterwards."""
    model = model.double().eval()
    with torch.no_grad():
        found = model(input_ids=torch.tensor(TOKENS)).logits.numpy()
    model.float()
    return found


def adapted(family, tied, config, seed=1):
    """The base under PEFT, with every trainable array perturbed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(fresh(family, tied), config)
    generator = torch.Generator().manual_seed(seed)
    moved = set()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and p.data_ptr() not in moved:
                moved.add(p.data_ptr())
                size = 0.1 if "magnitude" in name or "modules_to_save" in name else 0.5
                p += size * torch.randn(p.shape, generator=generator)
    return model.eval()


def saved(model, folder):
    """Writes the adapter as PEFT does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def in_peft(family, tied, folder):
    """The logits of the base with the adapter in a folder, as PEFT loads it."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(fresh(family, tied), folder)
    heard = [str(w.message) for w in told]
    assert not [m for m in heard if "missing" in m or "unexpected" in m.lower()], heard
    return logits(model)


def here(family, tied, adapters, scan=True):
    """Our logits with adapters merged."""
    _, params, run = own(family, tied, scan)
    return np.asarray(run(lorax.merge(adapters, params)))


def assert_same(found, expected, family, tied, *, each=True):
    """Close to each other, and both at least 100 tolerances away from the base."""
    golden.assert_same(found, expected, each=each)
    golden.assert_apart(base_logits(family, tied), expected)


@functools.cache
def base_logits(family, tied):
    """The base's own logits."""
    return logits(fresh(family, tied))
