"""What PEFT's OFT, IA3, LoKr and HRA cannot express, and which files are refused."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

import lorax
from lorax.interop import peft as ours
from tests.interop import peft_cases as cases

pytest.importorskip("peft", reason="needs the golden extra: torch, peft")
from tests.interop.test_peft_forms import GPT2, LLAMA, made, peft

Q = "layers/q/kernel"


def saved(tmp_path, adapters, config, **fields):
    changed = {path: a.replace(**fields) for path, a in adapters.items()}
    ours.save(tmp_path, changed, config)


def test_series_that_peft_lacks(tmp_path):
    options = {"block_size": 4, "cayley_terms": 3}
    target = lorax.Target(Q, adapter="oft", options=options)
    config, adapters, _ = made(LLAMA, target)
    with pytest.raises(ValueError, match="cayley_terms=3, but PEFT's OFT has no such"):
        ours.save(tmp_path, adapters, config)
    saved(tmp_path, adapters, config, cayley_terms=4)
    changed = json.loads((tmp_path / "adapter_config.json").read_text())
    changed["num_cayley_neumann_terms"] = 2
    (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="num_cayley_neumann_terms=2: .* I \\+ 2 Q"):
        ours.load(tmp_path, config)
    changed |= {"r": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(
        ValueError, match="r=4 and oft_block_size=4: PEFT needs exactly one"
    ):
        ours.load(tmp_path, config)


def test_gains_beside_a_bias(tmp_path):
    """PEFT multiplies the bias too."""
    theirs = peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[])
    cases.saved(cases.adapted(*GPT2, theirs), tmp_path)
    config, _, _ = cases.own(*GPT2)
    refused = (
        "c_attn' has a bias, which PEFT's IA3 mult.*would train separately.*unload"
    )
    with pytest.raises(ValueError, match=refused):
        ours.load(tmp_path, config)
    config, adapters, _ = made(GPT2, lorax.Target("layers/up/kernel", adapter="ia3"))
    with pytest.raises(ValueError, match="c_fc' has a bias, which PEFT's IA3 mult"):
        ours.save(tmp_path, adapters, config)


def test_gains_on_both_sides_and_lists_that_are_not_there(tmp_path):
    config, adapters, _ = made(LLAMA, lorax.Target(Q, adapter="ia3"))
    both = {"input_gain": jnp.ones((3, 16))}
    with pytest.raises(ValueError, match="gains on inputs and outputs"):
        saved(tmp_path, adapters, config, **both)
    ours.save(tmp_path, adapters, config)
    changed = json.loads((tmp_path / "adapter_config.json").read_text())
    assert changed["feedforward_modules"] == []
    del changed["feedforward_modules"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="feedforward_modules=null: PEFT then uses"):
        ours.load(tmp_path, config)


def test_kronecker_products_of_other_sizes(tmp_path):
    target = lorax.Target(Q, rank=2, adapter="lokr", options={"factor": 2})
    config, adapters, _ = made(LLAMA, target)
    with pytest.raises(
        ValueError, match="LOKR with decompose_factor=8, .* has {'.lokr"
    ):
        saved(tmp_path, adapters, config, factor=8)
    dropped = {p: dataclasses.replace(a, dropout=0.1) for p, a in adapters.items()}
    with pytest.raises(ValueError, match="lokr has no dropout"):
        ours.save(tmp_path, dropped, config)


def test_a_normal_of_zeros(tmp_path):
    config, adapters, _ = made(LLAMA, lorax.Target(Q, rank=2, adapter="hra"))
    zeros = {"u": jnp.zeros_like(adapters[Q].u)}
    with pytest.raises(
        ValueError, match="a zero normal vector, which reflects nothing"
    ):
        saved(tmp_path, adapters, config, **zeros)
