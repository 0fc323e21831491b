"""The cost of adapt stays that of hand-written LoRA, by XLA's own counts."""

import time

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import adapt_cost, attention_cost, dora_cost
from experiments.benchmarks.cases import gpt2_shaped, measure
from experiments.machine import timing

pytestmark = pytest.mark.once


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_flops_and_memory_are_those_of_hand_written_lora(scan):
    shape = gpt2_shaped.Shape(layers=2, width=64, batch=2)
    cases = adapt_cost.cases(shape, scan=scan, remat=False)
    cost = {
        name: measure.cost(compiled)  # compiled, and checked to agree
        for name, compiled in adapt_cost.compile_checked(cases).items()
    }
    assert cost["lorax"].flops <= 1.01 * cost["hand-written"].flops
    assert cost["lorax"].temp <= 1.1 * cost["hand-written"].temp
    assert cost["lorax"].flops < cost["materialised"].flops


def test_the_magnitudes_of_dora_cost_little():
    """Full size: `python -m experiments.benchmarks.dora_cost`."""
    shape = gpt2_shaped.Shape(layers=2, width=128, batch=4)
    row = dora_cost.compare(shape, rounds=1)
    assert row["flops"] <= 1.1
    assert row["temp"] <= 1.2


def test_tiles_hold_less_than_all_scores():
    """Full size: `python -m experiments.benchmarks.attention_cost`."""
    costs = attention_cost.compare(attention_cost.Shape(1, 1024, 2, 1), rounds=1)
    assert costs["plain"].ratio == 1
    assert costs["lean"].temporary < 0.5 * costs["plain"].temporary
    assert costs["tiles"].temporary < 0.5 * costs["plain"].temporary


def test_a_step_is_timed_to_its_end():
    busy = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, y: jnp.sin(y @ x), x))
    x = jnp.ones((200, 200))
    began = time.perf_counter()
    (seconds,) = timing.interleave({"busy": lambda: busy(x)}, rounds=1)["busy"]
    whole = time.perf_counter() - began  # with compilation and the warm-up round
    began = time.perf_counter()
    jax.block_until_ready(busy(x))
    assert 0.2 * (time.perf_counter() - began) < seconds < whole
