"""EVA, CorDA and orthogonal inits against PEFT's, on one model and one batch."""

import functools
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lorax
from lorax.inits import eva
from lorax.interop import peft as ours
from lorax.models import llama
from tests.interop import peft_cases as cases
from tests.models import golden

torch = pytest.importorskip("torch", reason="needs the golden extra")
peft = pytest.importorskip("peft", reason="needs the golden extra")
BASE = ("llama", False)
TOKENS = golden.tokens_of(29, batch=8, time=12)
RANK = 4
NAMES = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
PATHS = ".*/(q|v|o|up|down)/kernel"


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Half the time of these toys would go into optimising their programs."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@functools.cache
def program(scan):
    """Our config and parameters of the base, a loss, and how it uses them."""
    config, params, _ = cases.own(*BASE, scan)
    model = llama.Model(config)
    run = lambda params, x: jnp.sum(jnp.sin(model.apply({"params": params}, x)))
    return config, params, run, lorax.discover(run, params, TOKENS)


def start(init, scan=True, **fields):
    """The base's config and parameters, a target, its kernels and its statistics."""
    config, params, run, kernels = program(scan)
    target = lorax.Target(PATHS, rank=RANK, alpha=2 * RANK, init=init, **fields)
    stats = None
    if init != "orthogonal":
        batch = jnp.asarray(TOKENS[:1] if init == "corda" else TOKENS)
        args = jax.random.key(0), run, params, target, [batch], kernels
        stats = lorax.calibrate(*args, tokens="all")
    return config, params, target, kernels, stats


def written(init, folder, **fields):
    """The tensors of our initial adapters under PEFT's names, and their config."""
    config, params, target, kernels, stats = start(init, **fields)
    adapters, _ = lorax.init(jax.random.key(1), params, target, kernels, stats)
    ours.save(folder, adapters, config, residual=init == "corda")
    told = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), told


def configured(init, **fields):
    return peft.LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=NAMES,
        init_lora_weights=init,
        **fields,
    )


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def tensors(model):
    """The adapter's tensors as `save_pretrained` names them."""
    found = quiet(peft.get_peft_model_state_dict, model)
    return {name: v.detach().numpy().astype(np.float64) for name, v in found.items()}


@functools.cache
def with_eva(rho):
    model = quiet(
        peft.get_peft_model,
        cases.fresh(*BASE),
        configured("eva", eva_config=peft.EvaConfig(rho=rho)),
    )
    data = [{"input_ids": torch.tensor(TOKENS)}]  # one batch: nothing is dropped
    quiet(peft.initialize_lora_eva_weights, model, data, show_progress_bar=False)
    return model


def test_eva_spans_what_pefts_does(tmp_path):
    own, config = written("eva", tmp_path)
    theirs = tensors(with_eva(1.0))
    assert own.keys() == theirs.keys() and len(own) == 2 * 3 * len(NAMES)
    assert config["init_lora_weights"] is True
    for name, a in theirs.items():
        if "lora_B" in name:
            assert not a.any() and not own[name].any()
            continue
        cosines = np.linalg.svd(own[name] @ a.T)[1]  # PEFT's SVD is randomised
        np.testing.assert_allclose(cosines, 1, atol=2e-3, err_msg=name)


def test_components_of_many_batches_are_the_exact_ones():
    """PEFT truncates to the rank after each batch; both are compared with float64."""
    from peft.utils.incremental_pca import IncrementalPCA

    draw = np.random.default_rng(0).standard_normal
    turn, _ = np.linalg.qr(draw((64, 64)))
    scale = np.arange(1.0, 65) ** -0.5
    batches = [draw((256, 64)) * scale @ turn + 0.2 for _ in range(8)]
    rows = np.concatenate(batches)
    exact = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:8]
    theirs = IncrementalPCA(8, lowrank=True, lowrank_seed=42)
    for batch in batches:
        theirs.partial_fit(torch.tensor(batch, dtype=torch.float32))
    params = {"w": jnp.asarray(draw((64, 64)) / 8, jnp.float32)}
    stats = lorax.calibrate(
        jax.random.key(0),
        lambda params, x: jnp.sum(jnp.tanh(x @ params["w"])),
        params,
        lorax.Target("w", rank=8, init="eva"),
        [jnp.asarray(batch, jnp.float32) for batch in batches],
    )
    nearest = lambda basis: np.linalg.svd(exact @ np.asarray(basis))[1].min()
    assert nearest(theirs.components_.T) < 0.97
    assert nearest(stats["w"].u[:, :8]) > 0.999999


@pytest.mark.slow
def test_eva_redistributes_as_peft_does():
    """q and v have the same inputs, so either of them may get the larger rank."""
    _, params, target, kernels, stats = start("eva", scan=False)
    found = eva.redistribute(params, target, stats, kernels)
    own = {}
    for path, rank in ((t.pattern.replace("\\", ""), t.rank) for t in found):
        _, layer, kind = re.match(r"(layers_)(\d)/(\w+)/", path).groups()
        group = layer, "qv" if kind in "qv" else kind
        own.setdefault(group, []).append(rank)
    theirs = {}
    for name, a in tensors(with_eva(2.0)).items():
        if "lora_A" in name:
            _, layer, kind = re.search(r"(layers.)(\d)\.\w+\.(\w+)_proj", name).groups()
            group = layer, "qv" if kind in "qv" else kind
            theirs.setdefault(group, []).append(len(a))
    ordered = lambda ranks: {group: sorted(r) for group, r in ranks.items()}
    assert ordered(own) == ordered(theirs)
    assert sum(map(sum, own.values())) == RANK * 3 * len(NAMES)
    assert max(map(max, own.values())) > RANK


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_moves_what_pefts_does(mode, tmp_path):
    """With one sequence: PEFT weights sequences by dividing by their largest entry."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    name = {"ipm": "instruction", "kpm": "knowledge"}[mode]
    own, _ = written("corda", tmp_path, options={"mode": name})
    config = configured("corda", corda_config=CordaConfig(corda_method=mode))
    base = cases.fresh(*BASE)
    run = lambda: base(input_ids=torch.tensor(TOKENS[:1]))
    quiet(preprocess_corda, base, config, run_model=run)
    theirs = tensors(quiet(peft.get_peft_model, base, config))
    assert own.keys() == theirs.keys()
    for name in (name for name in own if "lora_A" in name):
        up = name.replace("lora_A", "lora_B")
        want = theirs[up] @ theirs[name]
        got = own[up].astype(np.float64) @ own[name]
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < 2e-3, (name, error)


def test_orthogonal_factors_are_as_pefts_are(tmp_path):
    """They are random, so this checks rank, size, and that they cancel."""
    own, _ = written("orthogonal", tmp_path)
    model = quiet(peft.get_peft_model, cases.fresh(*BASE), configured("orthogonal"))
    for found in (own, tensors(model)):
        downs = [name for name in found if "lora_A" in name]
        both = [(found[n], found[n.replace("lora_A", "lora_B")]) for n in downs]
        for a, b in both:
            assert np.abs(b @ a).max() < 1e-7
            singular = np.linalg.svd(a)[1], np.linalg.svd(b)[1]
            assert all(np.sum(s > 1e-5) == RANK // 2 for s in singular)
        for i in (0, 1):
            std = np.std(np.concatenate([pair[i].ravel() for pair in both]))
            np.testing.assert_allclose(std, 0.1 / np.sqrt(2), rtol=0.1)
