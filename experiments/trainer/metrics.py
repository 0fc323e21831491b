"""The figures of a run: bits per byte, trainable size, time; and their table."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import rich.box
import rich.table

from lorax.quantized import is_quantized

LossFn = Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]

BITS = 1 / math.log(2)  # bits in a nat


def make_bits_per_byte(loss_fn: LossFn) -> Callable[[Any, Iterable[Any]], float]:
    """Returns `evaluate(params, batches)`, the mean bits per byte over all targets.

    Args:
      loss_fn: `(params, batch) -> (mean loss in nats, metrics)`, where
        `metrics["weight"]` is the number of targets in the mean.
    """
    jitted = jax.jit(loss_fn)

    def evaluate(params: Any, batches: Iterable[Any]) -> float:
        found = jax.device_get([jitted(params, batch) for batch in batches])
        loss = np.array([float(loss) for loss, _ in found])
        weight = np.array([float(metrics["weight"]) for _, metrics in found])
        return float(loss @ weight / weight.sum()) * BITS

    return evaluate


def size(tree: Any) -> int:
    """Returns the number of array elements in a tree; of weights if quantised."""
    return sum(x.size for x in jax.tree.leaves(tree, is_leaf=is_quantized))


def nbytes(tree: Any) -> int:
    """Returns the bytes of the arrays in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def recovered(base: float, adapted: float, full: float) -> float:
    """Returns the share of full fine-tuning's gain that an adapted model reaches."""
    return (base - adapted) / (base - full) if base > full else math.nan


NO_SHARE = "Full fine-tuning gained less than LoRA here, so its share is left blank."


def summary_table(
    results: Mapping[str, Mapping[str, float]], caption: str
) -> rich.table.Table:
    """Returns the closing table, with a row for each model.

    Args:
      results: row name -> the values that `experiments.recipes.byte_model.train`
        returns; values that a row lacks are left blank.
      caption: a line below the table, such as what was tuned.
    """
    columns = {  # header: cell, from the values of a row
        "held-out\nbits/byte": "{test_bpb:.3f}",
        "of full's\ngain": "{recovered:.0%}",
        "source\nbits/byte": "{source_bpb:.3f}",
        "trained\nparams": "{trainable:,.0f}",
        "\nof all": "{trainable_share:.1%}",
        "optimiser\nbytes": "{opt_state_bytes:,.0f}",
        "ms per\nstep": "{step_ms:.0f}",
    }
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption
    )
    table.caption_justify = "left"
    table.add_column("\nmodel", no_wrap=True)
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for name, values in results.items():
        table.add_row(name, *(_cell(form, values) for form in columns.values()))
    if any(values.get("recovered", 0) > 1 for values in results.values()):
        table.caption = f"{caption} {NO_SHARE}".strip()
    return table


def _cell(form: str, values: Mapping[str, float]) -> str:
    """Returns the formatted value, or blank where it is missing or meaningless."""
    if "recovered" in form and not values.get("recovered", 0) <= 1:
        return ""
    try:
        return form.format_map(values)
    except KeyError:
        return ""
