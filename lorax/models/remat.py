"""What a layer keeps for its backward pass: everything, little, or named tensors.

    remat = "none"                       # everything
    remat = "full"                       # only what flows between layers
    remat = "dots"                       # also the outputs of matrix products
    remat = "save=q,k,v; offload=input"  # these names; offloaded: in host memory
    remat = "recompute=gate,up"          # every name but these
    remat = "gather; save=q,k,v"         # and a layer gathers each kernel once per pass

The output of every linear map has the map's name (`layers.Projection`): q, k, v, o,
gate, up, down, and so on. In addition, "input" is what flows into a layer, and
"attention" is what its heads return. A name that is kept saves the product that makes
it; what has no name is recomputed.

With "gather", a layer first gathers each kernel along the mesh axis "fsdp" and uses
that in all its products, so recomputation and backward pass share it. Otherwise the
compiler may send a kernel around once for each product. It is for training: a decoder
would gather every kernel for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

POLICIES = ("none", "full", "dots")


class Lists(NamedTuple):
    """Names by what becomes of them; those in no list are recomputed.

    Attributes:
      save: kept where they are.
      offload: kept in pinned host memory.
      recompute: if given, every other name is saved; save and offload are empty.
      gather: whether a layer gathers each kernel before it reads it.
    """

    save: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()
    gather: bool = False


def named(x: jax.Array, name: str) -> jax.Array:
    """Returns x under a name that `remat` may use."""
    return checkpoint_name(x, name)


def parse(text: str) -> Lists | None:
    """Parses the text of `remat`; returns None for one of POLICIES.

    Raises:
      ValueError: neither a policy nor lists of names.

    Example:
      >>> parse("save=q,k; offload=input")
      Lists(save=('q', 'k'), offload=('input',), recompute=(), gather=False)
    """
    if text in POLICIES:
        return None
    parts = [part.strip() for part in text.split(";")]
    gather = "gather" in parts
    parts = [part for part in parts if part != "gather"]
    found: dict[str, tuple[str, ...]] = {}
    for part in parts:
        kind, _, listed = (word.strip() for word in part.partition("="))
        names = tuple(name.strip() for name in listed.split(","))
        if kind not in Lists._fields[:3] or kind in found or "" in names:
            raise ValueError(
                f"remat={text!r}: give one of {', '.join(POLICIES)}, or lists of names "
                "such as 'save=q,k,v; offload=input' or 'recompute=gate,up'"
            )
        found[kind] = names
    lists = Lists(**found, gather=gather)
    if lists.recompute and len(found) > 1:
        raise ValueError(
            f"remat={text!r}: recompute keeps every name that it does not list; give "
            "it alone, or give save and offload"
        )
    if twice := set(lists.save) & set(lists.offload):
        raise ValueError(
            f"remat={text!r}: {', '.join(sorted(twice))} cannot be both saved and "
            "offloaded; leave one of the two out"
        )
    return lists


def policy(text: str, names: Sequence[str]) -> Callable[..., Any] | None:
    """Returns the policy of `jax.checkpoint`; None keeps nothing.

    Args:
      text: see the module docstring; not "none".
      names: the names that the layer gives its tensors.

    Raises:
      ValueError: as for `parse`, or a name that the layer does not give.
    """
    lists, policies = parse(text), jax.checkpoint_policies
    if lists is None:
        return policies.dots_with_no_batch_dims_saveable if text == "dots" else None
    if unknown := {name for own in lists[:3] for name in own} - set(names):
        raise ValueError(
            f"remat={text!r}: the layer names no tensor {', '.join(sorted(unknown))}; "
            f"it has {', '.join(names)}"
        )
    if lists.recompute:
        return policies.save_any_names_but_these(*lists.recompute)
    if not lists.offload:  # perhaps nothing to save, either
        return policies.save_only_these_names(*lists.save)
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[*lists.save],
        names_which_can_be_offloaded=[*lists.offload],
        offload_src="device",
        offload_dst="pinned_host",
    )
