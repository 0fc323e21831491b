"""One mixture of experts, written in many ways that all give the same value.

Each of T tokens goes to one of E experts, two-layer networks; `CHOICE` says which.
`FORMS` maps a name to `fn(params, x)`, `up: [E, D, F]` and `down: [E, F, D]`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tests.programs import normal

T, E, D, F, CAPACITY = 9, 3, 4, 5, 4
CHOICE = np.array([0, 2, 2, 1, 0, 2, 1, 0, 2])
GATES = jnp.asarray(np.eye(E)[CHOICE], jnp.float32)  # [T, E]
FORMS = {}


def form(fn):
    FORMS[fn.__name__] = lambda params, x: jnp.sum(jnp.sin(fn(params, x)))
    return fn


def params():
    return {"up": normal(1, E, D, F), "down": normal(2, E, F, D)}


def tokens():
    return normal(0, T, D)


@form
def read_and_summed(p, x):
    h = jnp.tanh(jnp.einsum("td,edf->tef", x, p["up"])) * GATES[:, :, None]
    return jnp.einsum("tef,efd->td", h, p["down"])


@form
def kernel_first(p, x):
    h = jnp.tanh(jnp.einsum("edf,td->eft", p["up"], x)) * GATES.T[:, None]
    return jnp.einsum("efd,eft->td", p["down"], h)


@form
def weighted_last(p, x):
    h = jnp.tanh(jnp.einsum("td,edf->tef", x, p["up"]))
    return jnp.einsum("ted,te->td", jnp.einsum("tef,efd->ted", h, p["down"]), GATES)


@form
def vmapped(p, x):
    expert = lambda up, down, gate: jnp.tanh(x @ up) @ down * gate[:, None]
    return jax.vmap(expert)(p["up"], p["down"], GATES.T).sum(0)


@form
def scanned(p, x):
    def expert(total, own):
        up, down, gate = own
        return total + jnp.tanh(x @ up) @ down * gate[:, None], None

    return jax.lax.scan(expert, jnp.zeros_like(x), (p["up"], p["down"], GATES.T))[0]


@form
def mapped(p, x):
    expert = lambda own: jnp.tanh(x @ own[0]) @ own[1] * own[2][:, None]
    return jax.lax.map(expert, (p["up"], p["down"], GATES.T)).sum(0)


@form
def ragged(p, x):
    order, groups = np.argsort(CHOICE, kind="stable"), np.bincount(CHOICE)
    h = jnp.tanh(jax.lax.ragged_dot(x[order], p["up"], jnp.asarray(groups)))
    y = jax.lax.ragged_dot(h, p["down"], jnp.asarray(groups))
    return y[np.argsort(order)]


@form
def capacity(p, x):
    seat = np.cumsum(np.eye(E)[CHOICE], 0)[np.arange(T), CHOICE] - 1
    dispatch = jnp.asarray(
        np.eye(E)[CHOICE][:, :, None] * np.eye(CAPACITY)[seat.astype(int)][:, None],
        jnp.float32,
    )  # [T, E, C]
    own = jnp.einsum("tec,td->ecd", dispatch, x)
    h = jnp.tanh(jnp.einsum("ecd,edf->ecf", own, p["up"]))
    y = jnp.einsum("ecf,efd->ecd", h, p["down"])
    return jnp.einsum("tec,ecd->td", dispatch, y)


@form
def switched(p, x):
    def expert(e):
        return lambda x: jnp.tanh(x @ p["up"][e]) @ p["down"][e]

    one = lambda own: jax.lax.switch(own[0], [*map(expert, range(E))], own[1])
    return jax.lax.map(one, (jnp.asarray(CHOICE), x))


@form
def unrolled(p, x):
    total = jnp.zeros_like(x)
    for e in range(E):
        y = jnp.tanh(x @ p["up"][e]) @ p["down"][e]
        total += y * GATES[:, e : e + 1]
    return total


@form
def by_index(p, x):
    h = jnp.tanh(jnp.einsum("td,tdf->tf", x, p["up"][CHOICE]))
    return jnp.einsum("tf,tfd->td", h, jnp.take(p["down"], CHOICE, 0, mode="clip"))


@form
def by_several_indices(p, x):
    """The best two of three, the second with weight zero."""
    best = jnp.asarray(np.stack([CHOICE, (CHOICE + 1) % E], 1))  # [T, 2]
    h = jnp.tanh(jnp.einsum("td,tkdf->tkf", x, p["up"][best]))
    return jnp.einsum(
        "tkf,tkfd->td", h * jnp.array([1.0, 0.0])[:, None], p["down"][best]
    )


@form
def by_index_token_by_token(p, x):
    one = lambda e, x: jnp.tanh(x @ p["up"][e]) @ p["down"][e]
    return jax.vmap(one)(jnp.asarray(CHOICE), x)


@form
def by_index_in_turn(p, x):
    """Kernels gathered for all tokens, then scanned over."""
    up = p["up"][CHOICE].reshape(3, 3, D, F).reshape(T, D, F)
    own = lambda _, v: (None, jnp.tanh(v[0] @ v[1]) @ v[2])
    return jax.lax.scan(own, None, (x, up, p["down"][CHOICE]))[1]
