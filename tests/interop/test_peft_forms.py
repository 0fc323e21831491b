"""The PEFT types in the table: logits both ways, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import lorax
from lorax import adapters as adapter_classes
from lorax import compose
from lorax.interop import peft as ours
from lorax.interop import peft_config, peft_selection, peft_table
from lorax.types import Base
from tests.interop import peft_cases as cases

peft = pytest.importorskip("peft", reason="needs the golden extra: torch, peft")
LLAMA, GPT2 = ("llama", False), ("gpt2", True)
SOME = ["q_proj", "v_proj", "down_proj"]  # of unequal sizes
FUSED = ["c_attn", "mlp.c_proj"]

# name: (base, config); types that PEFT supports on `Conv1D` have a GPT-2 case
CASES = {
    "loha": (LLAMA, peft.LoHaConfig(r=2, alpha=3, target_modules=SOME)),
    "loha patterns": (
        LLAMA,
        peft.LoHaConfig(
            r=2,
            alpha=4,
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 3},
            alpha_pattern={"up_proj": 5},
            layers_to_transform=[0, 1],
        ),
    ),
    "oft": (LLAMA, peft.OFTConfig(oft_block_size=8, target_modules=SOME)),
    "oft exact": (
        LLAMA,
        peft.OFTConfig(
            r=2,
            oft_block_size=0,
            use_cayley_neumann=False,
            target_modules=["q_proj", "up_proj"],
            layers_to_transform=[0, 2],
        ),
    ),
    "oft constrained": (
        LLAMA,
        peft.OFTConfig(
            oft_block_size=4,
            coft=True,
            eps=0.8,
            block_share=True,
            num_cayley_neumann_terms=6,
            target_modules=SOME,
        ),
    ),
    "oft head": (
        ("gpt2", False),
        peft.OFTConfig(num_cayley_neumann_terms=3, target_modules=["lm_head"]),
    ),
    "ia3": (
        LLAMA,
        peft.IA3Config(target_modules=SOME, feedforward_modules=["down_proj"]),
    ),
    "ia3 pattern": (
        LLAMA,
        peft.IA3Config(
            target_modules=r".*(q_proj|gate_proj|down_proj)",
            feedforward_modules=r".*(gate|down)_proj",
        ),
    ),
    "ia3 outputs": (
        LLAMA,
        peft.IA3Config(target_modules="all-linear", feedforward_modules=[]),
    ),
    "ia3 fused": (
        GPT2,
        peft.IA3Config(target_modules=FUSED, feedforward_modules=FUSED),
    ),
    "lokr": (LLAMA, peft.LoKrConfig(r=2, alpha=3, target_modules=SOME)),
    "lokr thin": (
        LLAMA,
        peft.LoKrConfig(
            r=1,
            alpha=2,
            decompose_both=True,
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"up_proj": 4},
            layers_to_transform=[0, 1],
        ),
    ),
    "lokr factor": (
        LLAMA,
        peft.LoKrConfig(r=2, decompose_factor=8, target_modules=SOME),
    ),
    "lokr head": (("gpt2", False), peft.LoKrConfig(r=2, target_modules=["lm_head"])),
    "hra": (LLAMA, peft.HRAConfig(r=4, target_modules=SOME)),
    "hra odd": (
        LLAMA,
        peft.HRAConfig(
            r=3,
            apply_GS=True,
            target_modules=["q_proj", "up_proj"],
            layers_to_transform=[1],
        ),
    ),
    "hra head": (("gpt2", False), peft.HRAConfig(r=2, target_modules=["lm_head"])),
    "vera": (LLAMA, peft.VeraConfig(r=5, target_modules=SOME)),
    "vera fused": (GPT2, peft.VeraConfig(r=3, target_modules=FUSED)),
    "miss": (LLAMA, peft.MissConfig(r=5, target_modules=SOME)),
    "delora": (
        LLAMA,
        peft.DeloraConfig(
            r=2,
            delora_lambda=2,
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"down_proj": 3},
        ),
    ),
    "randlora": (
        LLAMA,
        peft.RandLoraConfig(r=3, randlora_alpha=1, target_modules=SOME),
    ),
    "randlora fused": (
        GPT2,
        peft.RandLoraConfig(
            r=5,
            randlora_alpha=1,
            target_modules=FUSED,
            modules_to_save=["ln_f"],
        ),
    ),
    "loha head": (("gpt2", False), peft.LoHaConfig(r=2, target_modules=["lm_head"])),
}


def test_every_form_has_a_case():
    types = {config.peft_type.value for _, config in CASES.values()}
    assert types == {form.peft_type for form in peft_table.FORMS.values()}
    fused = {c.peft_type.value for base, c in CASES.values() if base == GPT2}
    assert fused == {f.peft_type for f in peft_table.FORMS.values() if f.conv1d}


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name, tmp_path):
    base, config = CASES[name]
    model = cases.adapted(*base, config)
    cases.saved(model, tmp_path / "theirs")
    expected = cases.logits(model)

    model_config, params, run = cases.own(*base)
    adapters, params = ours.load_with_base(tmp_path / "theirs", model_config, params)
    form = peft_table.of_type(config.peft_type.value)
    found = {type(a) for a in adapters.values() if not a.replaces}
    assert found == {form.cls}
    logits = lambda adapters, params: np.asarray(run(lorax.merge(adapters, params)))
    cases.assert_same(logits(adapters, params), expected, *base)
    if name.split()[0] in ("loha", "lokr", "miss"):
        cases.assert_same(logits(compose.to_lora(adapters), params), expected, *base)

    ours.save(tmp_path / "ours", adapters, model_config, params=params)
    cases.assert_same(cases.in_peft(*base, tmp_path / "ours"), expected, *base)
    plain = params.params if isinstance(params, Base) else params
    again, params = ours.load_with_base(tmp_path / "ours", model_config, plain)
    cases.assert_same(logits(again, params), expected, *base)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    for one, two in zip(*map(jax.tree.leaves, (again, adapters)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", peft_table.FORMS)
def test_every_field_of_the_installed_version(name):
    """Each is known to the table, with PEFT's own default."""
    form = peft_table.FORMS[name]
    kind = next(c for _, c in CASES.values() if c.peft_type.value == form.peft_type)
    theirs = {field.name: field for field in dataclasses.fields(kind)}
    own = [set(form.fields), set(form.patterns), set(form.fixed), set(form.free)]
    own += [{form.dropout} - {""}]
    common = peft_selection.COMMON | peft_selection.ALWAYS_HARMLESS
    for field in theirs:
        assert field in common.union(*own), f"{field} is new"
    assert set().union(*own) <= set(theirs), "names that PEFT does not have"
    assert sum(map(len, own)) == len(set().union(*own)), "a field in two groups"
    for field, (_, default) in form.fields.items():
        assert theirs[field].default == default, field


@pytest.mark.parametrize("name", peft_table.FORMS)
def test_what_is_not_implemented_is_refused(name):
    form = peft_table.FORMS[name]
    raw = {"peft_type": form.peft_type, "target_modules": ["q_proj"]}
    with pytest.raises(ValueError, match="unknown fields.*gamma=3"):
        peft_config.read({**raw, "gamma": 3})
    for field, value in form.fixed.items():
        with pytest.raises(ValueError, match=f"{field}=.* is not implemented here"):
            peft_config.read({**raw, field: not value or "other"})
    for field in form.fields:
        with pytest.raises(ValueError, match=rf"{field}=\[None\]; it must be"):
            peft_config.read({**raw, field: [None]})


def made(base, target, **kwargs):
    """The config, adapters of a class on a base, and the parameters."""
    config, params, _ = cases.own(*base)
    family = {"llama": "llama", "gpt2": "gpt2"}[base[0]]
    model = __import__(f"lorax.models.{family}", fromlist=["x"]).Model
    run = lambda params: model(config).apply({"params": params}, cases.TOKENS)
    kernels = lorax.discover(run, params)
    return config, *lorax.init(jax.random.key(0), params, target, kernels, **kwargs)


def test_embeddings_and_conv1d_are_refused(tmp_path):
    config, adapters, params = made(GPT2, [("layers/up/kernel", 2, 4, "loha")])
    with pytest.raises(
        ValueError, match="a transformers Conv1D, for which PEFT has no"
    ):
        ours.save(tmp_path, adapters, config, params=params)
    target = lorax.Target("embed/embedding", rank=2, adapter="loha")
    config, adapters, params = made(LLAMA, target)
    with pytest.raises(ValueError, match="an embedding, for which PEFT has no LOHA"):
        ours.save(tmp_path, adapters, config, params=params)


def test_what_other_types_lack_is_refused(tmp_path):
    target = lorax.Target("layers/(q|k)/kernel", rank=2, adapter="loha", dropout=0.1)
    config, adapters, params = made(LLAMA, target)
    save = lambda adapters, **given: ours.save(tmp_path, adapters, config, **given)
    with pytest.raises(ValueError, match="loha has no dropout, .*dropout=0"):
        save(adapters)
    still = {path: a.replace(dropout=0.0) for path, a in adapters.items()}
    with pytest.raises(ValueError, match="rank_stabilized=True is for LoRA; .* LOHA"):
        save(still, rank_stabilized=True)
    with pytest.raises(ValueError, match=r"fields=\['alpha'\] follow from"):
        save(still, fields={"alpha": 3})
    save(still, fields={"task_type": "CAUSAL_LM"})
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    assert text["task_type"] == "CAUSAL_LM" and text["peft_type"] == "LOHA"


def test_a_form_is_registered_once():
    form = peft_table.FORMS["loha"]
    with pytest.raises(ValueError, match="one of the two already has a form"):
        peft_table.register(form._replace(adapter="other"))
    assert adapter_classes.get("loha") is form.cls


def test_frozen_arrays_come_with_the_base(tmp_path):
    target = lorax.Target("layers/(q|down)/kernel", rank=3, adapter="vera")
    config, adapters, base = made(LLAMA, target)
    with pytest.raises(ValueError, match="'vera/3/reads', .*; pass the lorax.Base"):
        ours.save(tmp_path, adapters, config, params=base.params)
    ours.save(tmp_path, adapters, config, params=base)
    with pytest.raises(ValueError, match="are frozen and belong to params"):
        ours.load(tmp_path, config, base.params)
    _, again = ours.load_with_base(tmp_path, config, base)
    np.testing.assert_array_equal(
        again.frozen["vera/3/reads"], base.frozen["vera/3/reads"]
    )
    other = base._replace(frozen={k: 2 * v for k, v in base.frozen.items()})
    with pytest.raises(
        ValueError, match="params have a different frozen array 'vera/3/"
    ):
        ours.load_with_base(tmp_path, config, other)


def test_copies_of_a_shared_tensor_agree(tmp_path):
    """RandLoRA's files repeat both matrices in every module."""
    base, config = CASES["randlora"]
    folder = cases.saved(cases.adapted(*base, config), tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    copies = [key for key in tensors if "randlora_A" in key]
    assert len(copies) > 2
    tensors[copies[-1]] = 2 * tensors[copies[-1]]
    safetensors.numpy.save_file(tensors, path)
    model_config, params, _ = cases.own(*base)
    with pytest.raises(ValueError, match="differ, but all modules share one randlora_"):
        ours.load_with_base(folder, model_config, params)


def test_one_file_has_one_pair_of_projections(tmp_path):
    rules = [
        lorax.Target(f"layers/{name}/kernel", rank=rank, adapter="vera")
        for name, rank in (("q", 3), ("k", 4))
    ]
    config, adapters, base = made(LLAMA, rules)
    with pytest.raises(ValueError, match="one pair of random matrices, .* ranks 3, 4"):
        ours.save(tmp_path, adapters, config, params=base)


def test_norms_of_another_base_are_refused(tmp_path):
    target = lorax.Target("layers/q/kernel", rank=2, adapter="delora")
    config, adapters, params = made(LLAMA, target)
    with pytest.raises(ValueError, match="norms of DeLoRA's frozen kernels; pass"):
        ours.save(tmp_path, adapters, config)
    ours.save(tmp_path, adapters, config, params=params)
    assert ours.load(tmp_path, config, params)["layers/q/kernel"].rank == 2
    other = jax.tree.map(lambda leaf: 2 * leaf, params)
    with pytest.raises(
        ValueError, match="does not hold the norms of the base's kernel"
    ):
        ours.load(tmp_path, config, other)


def test_variants_of_miss_are_refused():
    for variant in ("bat", "mini"):
        raw = {"peft_type": "MISS", "init_weights": variant}
        with pytest.raises(ValueError, match=f"init_weights='{variant}'; it must be"):
            peft_config.read(raw)


def test_what_peft_has_no_type_for_is_refused(tmp_path):
    target = lorax.Target("layers/q/kernel", rank=2, adapter="lora_xs")
    config, adapters, params = made(LLAMA, target)
    with pytest.raises(ValueError, match="PEFT's files have no form for LoraXs"):
        ours.save(tmp_path, adapters, config, params=params)
