"""Every number of every transformation accepts a schedule, or refuses it at once."""

import inspect

import jax
import optax
import pytest

from lorax import optim
from tests.optim import problems
from tests.optim.rows import NORMS

NEEDED = {  # arguments without a default
    "learning_rate": 0.1,
    "weight_decay": 0.1,
    "tau": 1.0,
    "inner": optax.sgd(0.1),
    "target_budget": 1,
    "total_steps": 9,
    "initial_warmup": 1,
    "final_steps": 1,
    "interval": 1,
}
COUNTS = ("init_budget", "target_budget", "total_steps", "initial_warmup")
FIXED = {*COUNTS, "final_steps", "interval"}  # int or None: the budget's calendar
TAKES = {"learning_rate", "adam_learning_rate", "weight_decay", "ratio"}
NUMBERS = {*TAKES, "damping", "b1", "b2", "beta", "beta1", "beta2", "eps", "tau"}
NUMBERS |= {"decay", "orthogonal_weight"}


def factories():
    """The public functions that make transformations."""
    for name in optim.__all__:
        made = getattr(optim, name)
        if inspect.isfunction(made):
            told = inspect.signature(made)
            if "GradientTransformation" in str(told.return_annotation):
                yield name, made, told.parameters


CASES = [
    pytest.param(made, parameters, number, id=f"{name}-{number}")
    for name, made, parameters in factories()
    for number in parameters
    if number in NUMBERS
]


def test_no_number_is_left_out():
    """Arguments with a float default, or without a default, are all in the table."""
    for name, _, parameters in factories():
        for number, parameter in parameters.items():
            is_float = isinstance(parameter.default, float)
            must = parameter.default is inspect.Parameter.empty
            if is_float or must:
                assert number in NUMBERS | FIXED | {"inner"}, (name, number)


@pytest.mark.parametrize(("make", "parameters", "number"), CASES)
def test_a_schedule_is_taken_or_refused_at_construction(make, parameters, number):
    empty = inspect.Parameter.empty
    given = {n: NEEDED[n] for n, p in parameters.items() if p.default is empty}
    given[number] = optax.linear_schedule(0.1, 0.2, 9)
    if number not in TAKES:
        with pytest.raises(ValueError, match=f"{number} is a schedule, and this takes"):
            make(**given)
        return
    adapters = {"w": problems.lora(), "bias": problems.full()}
    tx = optax.with_extra_args_support(make(**given))
    once = lambda g, s, p: tx.update(g, s, p, microbatch=NORMS)
    state = jax.eval_shape(tx.init, adapters)
    updates, after = jax.eval_shape(once, adapters, state, adapters)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.structure(updates) == jax.tree.structure(adapters)
