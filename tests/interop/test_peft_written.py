"""Adapters made here, loaded in PEFT: layers, pruned AdaLoRA, moved bases."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import optim
from lorax.interop import peft as ours
from lorax.interop import residual
from tests.interop import peft_cases as cases

torch = pytest.importorskip("torch", reason="needs the golden extra")
peft = pytest.importorskip("peft", reason="needs the golden extra")
BASE = ("gpt2", True)
T = lorax.Target


@functools.cache
def discovered():
    config, params, _ = cases.own(*BASE)
    from lorax.models import gpt2

    model = gpt2.Model(config)
    run = lambda params: model.apply({"params": params}, cases.TOKENS)
    return lorax.discover(run, params)


def made(*targets, seed=0, size=0.3):
    """Adapters from the real init, the same perturbed as if trained, and the base."""
    config, params, _ = cases.own(*BASE)
    initial, base = lorax.init(jax.random.key(seed), params, targets, discovered())
    draw = np.random.default_rng(seed)
    noise = lambda x: x + size * draw.standard_normal(x.shape).astype(np.float32)
    return initial, jax.tree.map(noise, initial), base


def written(adapters, folder, **kwargs):
    """PEFT's logits with our adapters, and the config that was written."""
    ours.save(folder, adapters, cases.own(*BASE)[0], **kwargs)
    found = cases.in_peft(*BASE, folder)
    return found, json.loads((folder / "adapter_config.json").read_text())


def logits(adapters, base=None):
    _, params, run = cases.own(*BASE)
    return np.asarray(run(lorax.merge(adapters, params if base is None else base)))


def close(found, expected, **kwargs):
    cases.assert_same(found, np.asarray(expected, np.float64), *BASE, **kwargs)


def test_targets_of_every_kind(tmp_path):
    _, adapters, _ = made(
        T("layers/qkv/kernel", 3, 6, scaling="rank_stabilized"),
        T("layers/(o|up)/kernel", 2, 5, layers=(0, 2)),
        T("embed.*/embedding", 4),
        T("norm_out/.*", adapter="full"),
        T("layers/norm_mlp/.*", adapter="full"),
    )
    expected = logits(adapters)
    found, config = written(adapters, tmp_path / "a")
    close(found, expected)
    assert config["lora_alpha"] == 5  # of o and up, the most common
    assert "attn.c_attn" not in config["rank_pattern"]
    found, config = written(
        adapters,
        tmp_path / "b",
        rank_stabilized=True,
        fields={"task_type": "CAUSAL_LM"},
    )
    close(found, expected)
    assert config["use_rslora"] and config["task_type"] == "CAUSAL_LM"
    back = ours.load(tmp_path / "b", cases.own(*BASE)[0])
    assert back["layers/up/kernel"].layers == (0, 2)
    close(logits(back), expected)


def test_rslora_keeps_a_whole_alpha(tmp_path):
    _, adapters, _ = made(T("layers/.*kernel", 3, 7, scaling="rank_stabilized"))
    ours.save(tmp_path, adapters, cases.own(*BASE)[0], rank_stabilized=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 7 and config["alpha_pattern"] == {}
    back = ours.load(tmp_path, cases.own(*BASE)[0])
    assert back["layers/o/kernel"].scale == 7 / 3**0.5


@pytest.mark.parametrize(
    "adapter, scale", [("lora", -2.0), ("adalora", -2.0), ("dora", 0.37)]
)
def test_any_scale(adapter, scale, tmp_path):
    _, adapters, _ = made(
        T("layers/qkv/kernel", 2, adapter=adapter),
        T("layers/up/kernel", 3, adapter=adapter),
    )
    path = "layers/qkv/kernel"
    adapters[path] = dataclasses.replace(adapters[path], scale=scale)
    close(written(adapters, tmp_path)[0], logits(adapters))


@pytest.mark.parametrize(
    "init, adapter",
    [("pissa", "lora"), ("pissa", "dora"), ("olora", "lora"), ("milora", "lora")],
)
def test_inits_that_moved_the_base(init, adapter, tmp_path):
    initial, adapters, base = made(
        T("layers/qkv/kernel", 2, adapter=adapter, init=init),
        T("layers/down/kernel", 2, adapter=adapter),  # these did not move it
    )
    expected = logits(adapters, base)
    found, config = written(adapters, tmp_path / "original", initial=initial)
    # the moved part of the kernel cancels, in float32 on both sides: single logits are
    # off by up to 2e-5 of the largest
    close(found, expected, each=False)
    assert config["init_lora_weights"] is True
    assert {config["r"], *config["rank_pattern"].values()} == {2, 4}
    params = cases.own(*BASE)[1]
    found = residual.initial(adapters, params, base)
    moved = written(adapters, tmp_path / "bases", initial=found)[0]
    close(moved, expected, each=False)
    with pytest.raises(ValueError, match=rf"qkv/kernel: {init}.* as initial="):
        written(adapters, tmp_path / "wrong")
    wrong, _ = written(adapters, tmp_path / "wrong", residual=True)
    cases.golden.assert_apart(wrong, expected)


def test_bases_that_are_no_pair():
    _, adapters, base = made(T("layers/qkv/kernel", 2))
    other = jax.tree.map(lambda x: 2 * x, base)
    with pytest.raises(ValueError, match="layers/qkv/kernel: .*rank 2.*remains"):
        residual.initial(adapters, base, other)
    still = residual.initial(adapters, base, base)["layers/qkv/kernel"]
    np.testing.assert_array_equal(still.b, 0)


def test_a_pruned_adalora_with_ranks_down_to_zero(tmp_path):
    _, adapters, _ = made(T("layers/(qkv|up)/kernel", 3, 6, adapter="adalora"))
    grads = jax.tree.map(jnp.ones_like, adapters)
    for i, path in enumerate(sorted(adapters)):  # layer 1 of qkv is unimportant
        layer = jnp.array([1.0, 0.0, 0.2])[:, None] if i == 0 else 1.0
        rank = jnp.array([3.0, 2.0, 0.01])
        grads[path] = jax.tree.map(lambda g: 0 * g, grads[path]).replace(
            lam=layer * rank * jnp.ones((3, 3))
        )
    tx = optim.adalora(
        optax.sgd(1e-3),
        target_budget=9,
        total_steps=2,
        initial_warmup=0,
        final_steps=1,
        orthogonal_weight=0.0,
    )
    updates, state = tx.update(grads, tx.init(adapters), adapters)
    small = optim.adalora_shrink(optax.apply_updates(adapters, updates), state)
    expected = logits(small)
    found, config = written(small, tmp_path)
    close(found, expected)
    kept = {name: sum(mask) for name, mask in config["rank_pattern"].items()}
    assert sum(kept.values()) == 9 and 0 in kept.values(), kept
    assert config["total_step"] > 0
    back = ours.load(tmp_path, cases.own(*BASE)[0])
    close(logits(back), expected)
    assert any(a.layers is not None for a in back.values())


def test_pefts_own_pruned_adalora(tmp_path):
    """`update_and_allocate` writes the masks; some layers keep no triplet."""
    config = peft.AdaLoraConfig(
        init_r=3,
        target_r=1,
        tfinal=1,
        lora_alpha=5,
        total_step=4,
        beta1=0.01,
        beta2=0.01,
        target_modules=["c_attn", "mlp.c_proj"],
    )
    model = cases.adapted(*BASE, config, seed=3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "h.1" in name and "lora_E" in name:
                p.mul_(1e-3)
    out = model(input_ids=torch.tensor(cases.TOKENS)).logits
    out.square().sum().backward()
    for step in range(1, 4):
        model.base_model.update_and_allocate(step)
    cases.saved(model, tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    kept = {name: sum(mask) for name, mask in told["rank_pattern"].items()}
    assert 0 in kept.values() and max(kept.values()) > 1, kept
    adapters = ours.load(tmp_path, cases.own(*BASE)[0])
    close(logits(adapters), cases.in_peft(*BASE, tmp_path))
    assert next(iter(adapters.values())).scale == pytest.approx(5 / (3 + 1e-5))


def test_the_fast_path_reads_it_too(tmp_path):
    from lorax.models import gpt2

    _, adapters, _ = made(T("layers/qkv/kernel", 2))
    found, _ = written(adapters, tmp_path)
    config, params, _ = cases.own(*BASE)
    model = gpt2.Model(config)
    run = lambda params: model.apply({"params": params}, cases.TOKENS)
    back = ours.load(tmp_path, config)
    close(found, lorax.adapt(run, on_merge="error")(back, params))


def pieces():
    _, adapters, _ = made(
        T("layers/qkv/kernel", 2),
        T("layers/up/kernel", 2, adapter="adalora"),
        T("embed/embedding", 2, adapter="dora"),
        T("embed_positions/embedding", 2, adapter="adalora"),
        T("norm_out/scale", adapter="full"),
    )
    return adapters


@pytest.mark.parametrize(
    "paths, message",
    [
        (["layers/qkv/kernel", "layers/up/kernel"], "one parametrisation"),
        (["norm_out/scale"], "no form for Full adapters only"),
        (["layers/qkv/kernel", "norm_out/scale"], "'norm_out/bias' Full too"),
        (["embed/embedding"], "no DoRA for both"),
        (["embed_positions/embedding"], "PEFT has no AdaLoRA"),
    ],
)
def test_what_peft_has_no_form_for(paths, message, tmp_path):
    every = pieces()
    with pytest.raises(ValueError, match=message):
        ours.save(tmp_path, {p: every[p] for p in paths}, cases.own(*BASE)[0])
    assert not list(tmp_path.iterdir())


def test_errors_of_save(tmp_path):
    config = cases.own(*BASE)[0]
    _, adapters, _ = made(T("layers/qkv/kernel", 2, dropout=0.1), T("layers/o/kernel"))
    with pytest.raises(ValueError, match=r"one lora_dropout.*\[0.0, 0.1\]"):
        ours.save(tmp_path, adapters, config)
    with pytest.raises(ValueError, match="follow from the adapters"):
        ours.save(tmp_path, adapters, config, fields={"r": 3})
    ours.save(tmp_path, adapters, config, fields={"lora_dropout": 0.1})
    assert ours.load(tmp_path, config)["layers/o/kernel"].dropout == 0.1
    with pytest.raises(KeyError, match="no leaf 'layers/q/kernel'"):
        ours.save(tmp_path, {"layers/q/kernel": adapters["layers/o/kernel"]}, config)
    with pytest.raises(ValueError, match="made for another model"):
        ours.save(tmp_path, {"layers/up/kernel": adapters["layers/o/kernel"]}, config)
    broken = adapters["layers/o/kernel"]
    broken = broken.replace(b=broken.b.at[0, 0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="c_proj.lora_B.weight' would hold NaN"):
        ours.save(tmp_path, {"layers/o/kernel": broken}, config)


def test_slices_of_the_fused_kernel_are_one_adapter_with_zero_blocks(tmp_path):
    _, adapters, _ = made(T("layers/qkv/kernel", 2, 6, slices=(0, 2), layers=(0, 2)))
    found, config = written(adapters, tmp_path)
    close(found, logits(adapters))
    assert config["r"] == 4 and config["lora_alpha"] == 12
    back = ours.load(tmp_path, cases.own(*BASE)[0])["layers/qkv/kernel"]
    sliced = adapters["layers/qkv/kernel"]
    np.testing.assert_array_equal(back.a[..., 2:], sliced.a[:, 1])
    np.testing.assert_array_equal(back.b[:, 2:, 2], sliced.b[:, 1])
    assert not np.any(back.b[:, :, 1]) and not np.any(back.b[:, :2, 2])
