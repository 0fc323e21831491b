"""How an adapter's steps, and what they add up to, compare with full fine-tuning's.

From noisy targets, a student with frozen kernels learns those of a teacher, which
differ by a change of rank RANK (as in `teacher_student.teacher`). Along the walk, it
measures cosines <X, Y> / |X| |Y| over all kernels together, between

    step        the step of the kernels, and that of full fine-tuning's optimiser,
                fed with the gradients at the arm's own points
    reachable   that optimiser's step, and its projection onto what the pair can
                express: P_a U + U P_b - P_a U P_b
    change      the change so far, and full fine-tuning's after as many steps on the
                same batches
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax
from experiments.studies import teacher_student
from lorax import _lapack

RANK, BATCH, HELD_OUT = 4, 32, 256
Shapes = tuple[tuple[int, int], ...]


class Walk(NamedTuple):
    """The result of a run.

    Attributes:
      error: after the last step, noiseless, on fresh inputs, relative to the start.
      step: `[steps]`, the cosine of every step.
      reachable: `[steps]`, the cosine that the pair could have reached at that point;
        meaningless at the first step, where b is zero.
      change: `[steps]`, the cosine of the change so far.
      changes: `[steps, entries]`, the change itself.
    """

    error: jax.Array
    step: jax.Array
    reachable: jax.Array
    change: jax.Array
    changes: jax.Array


def network(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """Applies the kernels one after the other, with a tanh between them."""
    *hidden, last = (params[name] for name in sorted(params))
    for kernel in hidden:
        x = jnp.tanh(x @ kernel)
    return x @ last


def teacher(shapes: Shapes, key: jax.Array) -> tuple[dict, dict]:
    """Returns the frozen kernels, and those to learn."""
    base, goal = {}, {}
    for i, shape in enumerate(shapes):
        problem = teacher_student.Problem(shape, (RANK,), 0.0)
        own, change = teacher_student.teacher(problem, jax.random.fold_in(key, i))
        base[f"k{i}"] = own["k0"]
        goal[f"k{i}"] = own["k0"] + change["k0"]
    return base, goal


def make_walk(
    shapes: Shapes,
    target: lorax.Target,
    make_tx: Callable[[Any, Any], Any],
    whole: optax.GradientTransformation,
    steps: int,
) -> Callable[..., Walk]:
    """Returns `walk(seeds, noise, rate, damping, reference) -> Walk`, by seed.

    Args:
      shapes: of the kernels.
      target: how adapters start.
      make_tx: `(schedule, damping) -> optimiser`.
      whole: full fine-tuning's optimiser, at rate 1.
      steps: of a run; the rate decays linearly to zero.

    Returns:
      A compiled function; `reference: [seeds, steps, entries]` holds the changes of
      full fine-tuning, or zeros if they are not known yet.
    """

    def walk(seed: Any, noise: Any, rate: Any, damping: Any, reference: Any) -> Walk:
        keys = jax.random.split(jax.random.key(seed), 4)
        base, goal = teacher(shapes, keys[0])

        def batch(step: Any) -> tuple[jax.Array, jax.Array]:
            inputs, off = jax.random.split(jax.random.fold_in(keys[1], step))
            x = jax.random.normal(inputs, (BATCH, shapes[0][0]))
            clean = network(goal, x)
            return x, clean + noise * jax.random.normal(off, clean.shape)

        def loss_fn(params: Any, batch: Any) -> jax.Array:
            error = jnp.sum((network(params, batch[0]) - batch[1]) ** 2)
            return 0.5 * error / BATCH

        adapters, params = lorax.init(keys[2], base, [target])
        tx = make_tx(lambda count: rate * (1 - count / steps), damping)
        gradient = jax.grad(lorax.adapt(loss_fn))

        def step(carry: Any, given: Any) -> Any:
            adapters, state, whole_state, before = carry
            index, reference = given
            examples = batch(index)
            grads = gradient(adapters, params, examples)
            dense, whole_state = whole.update(
                jax.grad(loss_fn)(before, examples), whole_state
            )
            updates, state = tx.update(grads, state, adapters)
            after = optax.apply_updates(adapters, updates)
            merged = lorax.merge(after, params)
            change = _difference(merged, base)
            found = (
                _cosine(_difference(merged, before), _flat(dense)),
                reachable(adapters, dense),
                _cosine(change, reference),
                change,
            )
            return (after, state, whole_state, merged), found

        start = adapters, tx.init(adapters), whole.init(base), base
        given = jnp.arange(steps), reference
        (*_, merged), found = jax.lax.scan(step, start, given)
        x = jax.random.normal(keys[3], (HELD_OUT, shapes[0][0]))

        def error(params: Any) -> jax.Array:
            return jnp.mean((network(params, x) - network(goal, x)) ** 2)

        return Walk(error(merged) / error(base), *found)

    return jax.jit(jax.vmap(walk, (0, None, None, None, 0)))


def entries(shapes: Shapes) -> int:
    """Returns the number of entries of all kernels together."""
    return sum(n * m for n, m in shapes)


def best_of_rank(change: np.ndarray, shapes: Shapes) -> float:
    """Returns the cosine of a change to its best part of rank RANK in every kernel.

    Args:
      change: `[entries]`.
      shapes: of its kernels.
    """
    sizes = np.cumsum([n * m for n, m in shapes])[:-1]
    parts = zip(np.split(change, sizes), shapes, strict=True)
    kept = [
        np.linalg.svd(part.reshape(shape), compute_uv=False)[:RANK]
        for part, shape in parts
    ]
    return float(np.linalg.norm(kept) / np.linalg.norm(change))


def reachable(adapters: Mapping[str, Any], dense: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the cosine of a step to its projection onto the pairs' tangent spaces.

    Args:
      adapters: by kernel; for adapters that hold the kernel itself, it is 1.
      dense: the step of every kernel.
    """
    if any(adapter.replaces for adapter in adapters.values()):
        return jnp.ones(())
    left = {}
    for name, adapter in adapters.items():
        columns, rows = _lapack.qr(adapter.a)[0], _lapack.qr(adapter.b.T)[0]
        u = dense[name] - columns @ (columns.T @ dense[name])
        left[name] = u - u @ rows @ rows.T
    beyond, whole = _flat(left), _flat(dense)
    size = whole @ whole
    return jnp.sqrt(jnp.maximum(0, 1 - beyond @ beyond / jnp.where(size > 0, size, 1)))


def _flat(params: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.concatenate([params[name].reshape(-1) for name in sorted(params)])


def _difference(params: Any, base: Any) -> jax.Array:
    return _flat(jax.tree.map(jnp.subtract, params, base))


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    size = jnp.linalg.norm(x) * jnp.linalg.norm(y)
    return x @ y / jnp.where(size > 0, size, 1)
