"""What a random program does to a kernel before it uses it, for numpy and jax alike.

An edit is `(xp, w, dims, i, j) -> (w, dims)`: `dims` has a kind and a size for each
dimension ("in", "out", "batch"; "taken" for a stack that the program made; "unit");
i and j choose among the possible edits.
"""

import jax.numpy as jnp
import numpy as np


def view(xp, w, dims, instructions):
    """Edits an array as a program may edit a kernel; returns it with its dimensions."""
    for code, i, j in instructions:
        w, dims = EDITS[code % len(EDITS)](xp, w, list(dims), i, j)
    return w, list(dims)


def transpose(xp, w, dims, i, j):
    order = list(np.random.RandomState(12 * i + j).permutation(len(dims)))
    return xp.transpose(w, order), [dims[d] for d in order]


def split(xp, w, dims, i, j):
    d = i % len(dims)
    kind, size = dims[d]
    if size == 4:
        dims[d : d + 1] = [(kind, 2), (kind, 2)]
    return xp.reshape(w, [size for _, size in dims]), dims


def join(xp, w, dims, i, j):
    pairs = [d for d in range(len(dims) - 1) if dims[d][0] == dims[d + 1][0]]
    if pairs:
        d = pairs[i % len(pairs)]
        dims[d : d + 2] = [(dims[d][0], dims[d][1] * dims[d + 1][1])]
    return xp.reshape(w, [size for _, size in dims]), dims


def insert(xp, w, dims, i, j):
    d = i % (len(dims) + 1)
    return xp.expand_dims(w, d), [*dims[:d], ("unit", 1), *dims[d:]]


def squeeze(xp, w, dims, i, j):
    units = [d for d, (kind, _) in enumerate(dims) if kind == "unit"]
    if not units:
        return w, dims
    d = units[i % len(units)]
    return xp.squeeze(w, d), dims[:d] + dims[d + 1 :]


def cut(xp, w, dims, i, j):
    """Takes a slice; in and out axes keep at least two entries."""
    d = i % len(dims)
    kind, size = dims[d]
    least = 1 if kind == "batch" else min(2, size)
    low = j % (size - least + 1)
    high = min(size, low + least + j // 4)
    dims[d] = (kind, high - low)
    return w[(slice(None),) * d + (slice(low, high),)], dims


def index(xp, w, dims, i, j):
    """Takes one of a stack, dropping the dimension."""
    stacks = [d for d, (kind, _) in enumerate(dims) if kind == "batch"]
    if not stacks:
        return w, dims
    d = stacks[i % len(stacks)]
    place = j % dims[d][1]
    if xp is jnp and j > 5:
        place = jnp.int32(place)  # dynamic_slice instead of slice
    return w[(slice(None),) * d + (place,)], dims[:d] + dims[d + 1 :]


def scale(xp, w, dims, i, j):
    return (-w, w * 0.5, w / 4.0, w * xp.float64(1.5))[i % 4], dims


def vector(xp, w, dims, i, j):
    """Multiplies or divides by a vector along one dimension."""
    d = i % len(dims)
    v = xp.arange(1.0, 1 + dims[d][1]).reshape([-1] + [1] * (len(dims) - 1 - d))
    return (w * v if j % 2 else w / v), dims


def flip(xp, w, dims, i, j):
    return xp.flip(w, i % len(dims)), dims


def take(xp, w, dims, i, j):
    """Takes kernels of a stack by index, like experts chosen token by token."""
    stacks = [d for d, (kind, _) in enumerate(dims) if kind == "batch"]
    if not stacks:
        return w, dims
    d = stacks[i % len(stacks)]
    ids = np.random.RandomState(j).randint(dims[d][1], size=[(2,), (3,), (2, 2)][j % 3])
    kept = {} if xp is np else {"mode": "clip"}
    w = xp.take(w, ids, axis=d, **kept)
    return w, [*dims[:d], *(("taken", n) for n in ids.shape), *dims[d + 1 :]]


def doubled(xp, w, dims, i, j):
    """Stacks it with a scaled copy of itself."""
    d = i % (len(dims) + 1)
    return xp.stack([w, w * 0.5], axis=d), [*dims[:d], ("taken", 2), *dims[d:]]


def halves(xp, w, dims, i, j):
    """Splits it and concatenates the halves in reverse order."""
    d = i % len(dims)
    if dims[d][0] not in ("in", "out") or dims[d][1] % 2:
        return w, dims
    left, right = xp.split(w, 2, axis=d)
    return xp.concatenate([right, left], axis=d), dims


def pad_out(xp, w, dims, i, j):
    """Concatenates it with constants, like a fused kernel with a frozen part."""
    d = i % len(dims)
    kind, size = dims[d]
    if kind not in ("in", "out"):
        return w, dims
    shape = [1 if e == d else size for e, (_, size) in enumerate(dims)]
    dims[d] = (kind, size + 1)
    return xp.concatenate([xp.ones(shape), w], axis=d), dims


def border(xp, w, dims, i, j):
    d = i % len(dims)
    kind, size = dims[d]
    if kind not in ("in", "out"):
        return w, dims
    width = [(0, 0)] * len(dims)
    width[d] = (j % 2, j % 3)
    dims[d] = (kind, size + sum(width[d]))
    return xp.pad(w, width, constant_values=0.5), dims


EDITS = [transpose, split, join, insert, squeeze, cut, index, scale]
EDITS += [vector, flip, take, doubled]
JOINS = [
    halves,
    pad_out,
    border,
]  # after one of these, no reshape of the same dimension
