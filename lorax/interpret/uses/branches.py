"""What one term adds to a linear operation: its thin product, and its map of the input.

    dot          (x @ a) @ b                     conv     b convolved 1 x 1 over a * x
    ragged_dot   both factors grouped alike      gather   a[ids] @ b

Every product has the result's dimensions; where the term is a block of the view (of a
fused kernel), its part is the block that it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lorax import _explicit, linalg
from lorax.interpret.terms.tracked import Term
from lorax.interpret.uses import grouped, mapped, thin
from lorax.interpret.uses.equations import Typed
from lorax.interpret.uses.pairs import Pair
from lorax.interpret.uses.use import Use

WINDOW = "window_strides padding lhs_dilation rhs_dilation dimension_numbers".split()


def parts(
    use: Use, term: Term, pair: Pair, *, x: jax.Array | None, base: Typed
) -> list[jax.Array]:
    """Returns the addends of one term, in at least float32.

    Args:
      use: the linear use.
      term: of its view.
      pair: the term's factors for the use.
      x: the activation after dropout; None for a lookup.
      base: the frozen product, or its type, whose sharding a map's result takes.
    """
    assert term.factors is not None
    wide, found = linalg.wide(use.out.dtype), []
    if pair.first.shape[-1]:
        if x is None:
            part = gather(use, term, pair)
        else:
            part = _OF[use.op](use, term, pair, x)
        found.append(use.placed(term, part).astype(wide))
    if term.factors.branch is not None:
        assert x is not None
        dims = [d for d in use.dims.read if d in use.applied]
        x = thin.window(x, term, [use.applied[d] for d in dims], dims)
        own = mapped.branch(use, term, x, tied=pair.tied, base=base)
        found.append(use.placed(term, own.astype(wide)))
    return found


def dot(use: Use, term: Term, pair: Pair, x: jax.Array) -> jax.Array:
    """`[*batch, *free dimensions of x, *write]`, or what the equation makes of it."""
    read, write, batch = use.dims
    n, kept, left = len(batch), len(write), use.activation == 1
    x = thin.window(x, term, [use.applied[d] for d in read], read)
    lies = _explicit.lies(use.out)
    if left:  # [*batch, *write, *free dimensions of x]
        lies = [*lies[:n], *lies[n + kept :], *lies[n : n + kept]]
    result = _result(use, term, pair, lies)
    z = (_dot if pair.places is None else _grouped_dot)(use, pair, x, result)
    if left:
        z = jnp.moveaxis(z, range(z.ndim - kept, z.ndim), range(n, n + kept))
    return z


def _dot(use: Use, pair: Pair, x: jax.Array, result: thin.Result) -> jax.Array:
    """The product with factors that have the use's own axes."""
    read, _, batch = use.dims
    places = lambda dims: tuple(use.applied[d] for d in dims)
    return thin.dot(
        x,
        pair.first,
        pair.second,
        read=(places(read), _ranks(read, len(batch))),
        batch=(places(batch), _ranks(batch, 0)),
        result=result,
    )


def _grouped_dot(use: Use, pair: Pair, x: jax.Array, result: thin.Result) -> jax.Array:
    """The product with factors that have an axis with another role in the use."""
    assert pair.places is not None
    met = {place: d for d, place in use.applied.items()}
    names = tuple(met.get(i, ("x", i)) for i in range(x.ndim))
    return grouped.dot(
        grouped.Named(x, names),
        pair.first,
        pair.second,
        pair.places,
        batch=use.dims.batch,
        write=use.dims.write,
        result=result,
    )


def _ranks(dims: Sequence[int], offset: int) -> tuple[int, ...]:
    """Positions of view dimensions among themselves in view order."""
    return tuple(offset + sorted(dims).index(d) for d in dims)


def conv(use: Use, term: Term, pair: Pair, x: jax.Array) -> jax.Array:
    """`a` convolves to rank channels, `b` mixes them (1 x 1).

    In a grouped convolution every group is convolved by the same `a`, and the columns
    of `b` for its own outputs mix the result.
    """
    (to,), params = use.dims.write, use.eqn.params
    groups, features = params["feature_group_count"], use.written[to]
    lies = _explicit.lies(use.out)
    narrow = [None if d == features else entry for d, entry in enumerate(lies)]
    written = lies.pop(features)
    result = _result(use, term, pair, [*lies, written])
    first = jnp.moveaxis(pair.first, -1, to)
    if groups > 1:
        first = jnp.concatenate([first] * groups, axis=to)
    h = jax.lax.conv_general_dilated(
        x,
        first,
        **{name: params[name] for name in WINDOW},
        precision=params["precision"],
        feature_group_count=groups,
        out_sharding=_explicit.named(narrow, x, first),
    )
    if groups == 1:
        z = thin.mix(h, pair.second, feature=features, result=result)
    else:
        second = pair.second
        z = thin.mix_groups(h, second, feature=features, groups=groups, result=result)
    return jnp.moveaxis(z, -1, features)


def ragged_dot(use: Use, term: Term, pair: Pair, x: jax.Array) -> jax.Array:
    """Both factors are grouped as the kernel is."""
    del term
    precision, lies = use.eqn.params["precision"], _explicit.lies(use.out)
    assert use.groups is not None
    place = lambda *entries: _explicit.named(entries, x, pair.first)
    h = jax.lax.ragged_dot(
        x, pair.first, use.groups, precision, out_sharding=place(lies[0], None)
    )
    return jax.lax.ragged_dot(
        h.astype(pair.second.dtype),
        pair.second,
        use.groups,
        precision,
        out_sharding=place(*lies),
    )


def gather(use: Use, term: Term, pair: Pair) -> jax.Array:
    """Rows of `a` are looked up, then multiplied by `b`."""
    taken, of = use.taken, _explicit.lies(use.out)
    assert taken is not None
    rows = taken.of(pair.first, 0)  # [*ids, rank] of [vocabulary, rank]
    ids = rows.ndim - 1
    places = [use.written[d] for d in use.dims.write]
    lies = [of[d] for d in taken.rows] + [of[place] for place in places]
    result = thin.Result(None, use.out.dtype, _of_block(use, term, lies))
    z = thin.mix(rows, pair.second, feature=ids, result=result)
    skipped = taken.window.get(taken.axis)  # of length one, where it is not collapsed
    if skipped is not None:
        z, places = z[..., None], [*places, skipped]
    return jnp.moveaxis(z, range(ids, z.ndim), places)


def _result(use: Use, term: Term, pair: Pair, lies: _explicit.Entries) -> thin.Result:
    """How a branch is computed: in the result's dtype, or wider if its factor is."""
    dtype = linalg.promoted(use.out.dtype, pair.second.dtype)
    precision = use.eqn.params["precision"]
    return thin.Result(precision, dtype, _of_block(use, term, lies))


def _of_block(use: Use, term: Term, lies: _explicit.Entries) -> _explicit.Entries:
    """How a part `[.., *write]` is sharded: whole if it is a block of a dimension."""
    write, shape = use.dims.write, use.view.value.shape
    free = len(lies) - len(write)
    own = zip(write, lies[free:], strict=True)
    block = [entry if term.whole(d, shape) else None for d, entry in own]
    return [*lies[:free], *block]


_OF: dict[str, Callable[[Use, Term, Pair, jax.Array], jax.Array]] = {
    "dot": dot,
    "conv": conv,
    "grouped_conv": conv,
    "depthwise_conv": conv,
    "ragged_dot": ragged_dot,
}
