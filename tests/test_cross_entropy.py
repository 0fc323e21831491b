"""Chunked cross-entropy: what it sums, its gradients, and what it never holds."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax
from lorax import losses
from lorax.losses import Head
from lorax.models import gpt2, llama, t5
from tests import programs
from tests.programs import normal

ROWS, TIME, WIDTH, WORDS = 4, 10, 6, 33
TARGETS = np.random.default_rng(5).integers(0, WORDS, (ROWS, TIME))
WEIGHTS = np.random.default_rng(6).uniform(0, 2, (ROWS, TIME)) * (TARGETS % 5 > 0)


def by_hand(hidden, kernel, bias=None, soft_cap=None, label_smoothing=0.0, z_loss=0.0):
    """The mean loss, and its gradients for hidden states, kernel and bias, in numpy."""
    hidden, kernel = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64)
    raw = hidden @ kernel + (0 if bias is None else np.asarray(bias, np.float64))
    logits = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
    partition = np.log(np.exp(logits).sum(-1))
    chosen = np.eye(WORDS)[TARGETS]
    nll = partition - (logits * chosen).sum(-1)
    loss = nll + label_smoothing * (partition - logits.mean(-1) - nll)
    loss += z_loss * partition**2
    weights = WEIGHTS / WEIGHTS.sum()
    softmax = np.exp(logits - partition[..., None])
    wanted = (1 - label_smoothing) * chosen + label_smoothing / WORDS
    slope = softmax * (1 + 2 * z_loss * partition[..., None]) - wanted
    slope *= weights[..., None]
    if soft_cap is not None:
        slope *= 1 - np.tanh(raw / soft_cap) ** 2
    grads = {
        "hidden": slope @ kernel.T,
        "kernel": np.einsum("btd,btv->dv", hidden, slope),
        "bias": slope.sum((0, 1)),
    }
    return (weights * loss).sum(), grads, (WEIGHTS * nll).sum()


def close(got, want, tolerance=1e-6):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.shape == w.shape
        scale = np.abs(np.asarray(w)).max()
        np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * scale)


def of(head, hidden, targets=TARGETS, weights=WEIGHTS, soft_cap=None, **options):
    weights = jnp.asarray(weights, jnp.float32)
    if soft_cap is not None:
        head = (head if isinstance(head, Head) else Head(head))._replace(
            soft_cap=soft_cap
        )
    return losses.chunked_cross_entropy(
        hidden, head, jnp.asarray(targets), weights, **options
    )


HIDDEN, KERNEL, BIAS = (
    normal(0, ROWS, TIME, WIDTH),
    normal(1, WIDTH, WORDS),
    normal(2, WORDS),
)
EVERYTHING = {"soft_cap": 3.0, "label_smoothing": 0.1, "z_loss": 1e-2}


ALONE = [({name: value}, 5) for name, value in EVERYTHING.items()]


# 10 positions: in two chunks; in one; in four, the last one padded
@pytest.mark.parametrize(
    ("options", "chunk"), [({}, 3), ({}, TIME), *ALONE, (EVERYTHING, 3)]
)
def test_value_and_gradients_are_those_of_the_formula(options, chunk):
    tied = bool(options)

    def loss(leaves):
        kernel = leaves["kernel"].T if tied else leaves["kernel"]
        head = Head(kernel, tied, leaves["bias"])
        return (found := of(head, leaves["hidden"], chunk=chunk, **options)).mean, found

    leaves = {"hidden": HIDDEN, "kernel": KERNEL, "bias": BIAS}
    (got, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(leaves)
    value, wanted, nats = by_hand(HIDDEN, KERNEL, BIAS, **options)
    close(got, value)
    close(grads, {name: wanted[name] for name in sorted(wanted)})
    close(found.nats, nats)
    close(found.weight, WEIGHTS.sum())


def test_weights_have_a_gradient_and_the_counts_have_none():
    def loss(weights, of_what):
        found = losses.chunked_cross_entropy(HIDDEN, KERNEL, TARGETS, weights, chunk=4)
        return getattr(found, of_what)

    weights = jnp.asarray(WEIGHTS, jnp.float32)
    grad = jax.grad(loss)(weights, "total")
    logits = np.asarray(HIDDEN, np.float64) @ np.asarray(KERNEL, np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
        logits, TARGETS[..., None], -1
    ).squeeze(-1)
    close(grad, nll)
    for constant in ("nats", "weight"):
        assert not jax.grad(loss)(weights, constant).any()


def test_nothing_without_weight_counts_whatever_it_is():
    nowhere = np.where(WEIGHTS > 0, TARGETS, -100)
    close(of(KERNEL, HIDDEN, nowhere), of(KERNEL, HIDDEN))
    empty = of(KERNEL, HIDDEN, weights=np.zeros_like(WEIGHTS))
    assert float(empty.mean) == float(empty.weight) == 0


def test_log_probs_of_tokens():
    value, wanted, _ = by_hand(HIDDEN, KERNEL, soft_cap=3.0)

    def loss(leaves):
        hidden, kernel = leaves
        found = losses.token_log_probs(
            hidden, Head(kernel, soft_cap=3.0), jnp.asarray(TARGETS), chunk=3
        )
        return -(found * WEIGHTS / WEIGHTS.sum()).sum()

    got, grads = jax.jit(jax.value_and_grad(loss))((HIDDEN, KERNEL))
    close(got, value)
    close(grads, (wanted["hidden"], wanted["kernel"]))


# ------------------------------------------------------------------ adapters


def untied(params, x):
    hidden = jnp.tanh(x @ params["w"])
    return of(params["head"], hidden, chunk=3, **EVERYTHING).mean


def tied(params, x):
    hidden = jnp.tanh(params["head"][TARGETS] @ params["w"] + x)
    return of(Head(params["head"], tied=True), hidden, chunk=3, **EVERYTHING).mean


def adapted(loss, kind="lora"):
    shape = (WORDS, WIDTH) if loss is tied else (WIDTH, WORDS)
    params = {"w": normal(1, WIDTH, WIDTH), "head": normal(2, *shape)}
    target = lorax.Target(".*", rank=2, alpha=4, adapter=kind)
    kernels = lorax.discover(loss, params, HIDDEN)
    assert all(use.fast for kernel in kernels.values() for use in kernel.uses)
    made, params = lorax.init(jax.random.key(0), params, target, kernels)
    return programs.perturbed(made), params, kernels


@pytest.mark.parametrize("loss", [untied, tied])
def test_gradients_of_factors_are_those_of_the_formula(loss):
    adapters, params, _ = adapted(loss)
    run = lorax.adapt(loss, on_merge="error")
    value, grads = jax.jit(jax.value_and_grad(run))(adapters, params, HIDDEN)

    double = functools.partial(np.asarray, dtype=np.float64)
    w, head = (
        double(params[path]) + 2 * double(adapters[path].a) @ double(adapters[path].b)
        for path in ("w", "head")
    )
    read = head[TARGETS] if loss is tied else double(HIDDEN)
    hidden = np.tanh(read @ w + (HIDDEN if loss is tied else 0))
    wanted, slopes, _ = by_hand(hidden, head.T if loss is tied else head, **EVERYTHING)
    back = slopes["hidden"] * (1 - hidden**2)
    dense = {"w": np.einsum("bti,bto->io", read, back), "head": slopes["kernel"]}
    if loss is tied:
        dense["head"] = dense["head"].T.copy()
        np.add.at(dense["head"], TARGETS, back @ w.T)
    close(value, wanted)
    for path, slope in dense.items():
        a, b = double(adapters[path].a), double(adapters[path].b)
        close(grads[path].a, 2 * slope @ b.T)
        close(grads[path].b, 2 * a.T @ slope)


OTHERS = [(untied, "dora"), (tied, "dora"), (untied, "ia3")]


@pytest.mark.parametrize(("loss", "kind"), OTHERS)
def test_other_adapters_of_a_head_equal_their_merged_kernel(loss, kind):
    adapters, params, _ = adapted(loss, kind)
    both = lorax.adapt(loss, on_merge="error"), programs.definition(loss)
    got, want = (
        jax.jit(jax.value_and_grad(side))(adapters, params, HIDDEN) for side in both
    )
    close(got, want, 1e-5)


def unchunked(params, x):
    logits = jnp.tanh(x @ params["w"]) @ params["head"]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS)
    return (nll * WEIGHTS).sum() / WEIGHTS.sum()


@pytest.mark.parametrize("form", ["int8", "w8a8"])
@pytest.mark.parametrize("trained", [["head", "w"], ["w"]])
def test_a_quantised_head_gives_what_it_gives_all_at_once(form, trained):
    def chunked(params, x):
        return of(params["head"], jnp.tanh(x @ params["w"]), chunk=3).mean

    adapters, params, kernels = adapted(untied)
    packed = lorax.quantize(params, [(".*", form)], kernels)
    own = {path: adapters[path] for path in trained}
    got, want = (
        jax.jit(jax.value_and_grad(lorax.adapt(side, on_merge="error")))(
            own, packed, HIDDEN
        )
        for side in (chunked, unchunked)
    )
    close(got, want)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_inits_read_the_same_of_a_head_in_chunks(init):
    """Its activations and its gradient, from the pass over all chunks."""

    def chunked(params, x):
        return of(params["head"], jnp.tanh(x @ params["w"]), chunk=5).mean

    def made(loss):
        params = {"w": normal(1, WIDTH, WIDTH), "head": normal(2, WIDTH, WORDS)}
        kernels = lorax.discover(loss, params, HIDDEN)
        targets = [lorax.Target("head", rank=2, init=init)]
        key = jax.random.key(0)
        args = key, loss, params, targets, [HIDDEN], kernels
        stats = lorax.calibrate(*args, method="dense")
        return lorax.init(key, params, targets, kernels, stats=stats)

    close(made(chunked), made(unchunked), 1e-5)


def test_dropout_of_a_head_differs_from_chunk_to_chunk():
    _, params, kernels = adapted(untied)
    target = lorax.Target("head", rank=2, dropout=0.5)
    made, params = lorax.init(jax.random.key(0), params, target, kernels)
    made = programs.perturbed(made)
    alike = jnp.broadcast_to(HIDDEN[:1, :1], (1, 8, WIDTH))

    def spread(params, x):
        each = losses.token_log_probs(
            x, params["head"], jnp.zeros((1, 8), int), chunk=2
        )
        whole = losses.chunked_cross_entropy(
            x, params["head"], jnp.zeros((1, 8), int), chunk=2
        )
        return jnp.std(each.reshape(2, 4), axis=1), whole.total

    run = lorax.adapt(spread, on_merge="error")
    assert (run(made, params, alike, lora_key=jax.random.key(1))[0] > 1e-3).all()
    assert (run(made, params, alike)[0] < 1e-6).all()


def test_members_of_a_population_each_have_their_own():
    adapters, params, _ = adapted(tied)
    stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), adapters)
    run = jax.jit(jax.value_and_grad(lorax.adapt(tied, on_merge="error")))
    got = jax.jit(jax.vmap(run, (0, None, None)))(stack, params, HIDDEN)
    want = [
        run(jax.tree.map(lambda x, i=i: x[i], stack), params, HIDDEN) for i in (0, 1)
    ]
    close(got, jax.tree.map(lambda *x: jnp.stack(x), *want), 1e-5)


# ------------------------------------------------------------ our own models

SIZES = {"vocabulary": 40, "width": 16, "layers": 1, "heads": 2, "hidden": 24}
MODELS = {
    "llama": llama.Model(llama.Config(**SIZES, kv_heads=1, head_dim=8)),
    "gpt2": gpt2.Model(gpt2.Config(**SIZES, positions=16)),
    "t5": t5.Model(t5.Config(**SIZES, head_dim=8, tied=True)),
}


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_head_of_a_model_make_its_logits(name):
    model = MODELS[name]
    tokens = jnp.arange(12).reshape(2, 6)
    read = (tokens, tokens) if name == "t5" else (tokens,)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *read)
    variables = programs.filled(shapes)
    hidden = model.apply(variables, *read, hidden=True)
    head = model.head_of(variables["params"])
    logits = model.apply(variables, *read)
    targets = (tokens + 1) % 40
    want = jax.nn.log_softmax(logits)
    want = np.take_along_axis(np.asarray(want), np.asarray(targets)[..., None], -1)
    close(losses.token_log_probs(hidden, head, targets), want.squeeze(-1), 1e-5)


# ----------------------------------------------------------------- refusals

REFUSED = {
    r"hidden has shape \(4, 10, 6\) and targets \(4, 9\)": {"targets": TARGETS[:, 1:]},
    r"head has shape \(33, 6\).*width 6; it must be \[width, vocabulary\]": {
        "head": KERNEL.T
    },
    r"must be \[vocabulary, width\]": {"head": Head(KERNEL, tied=True)},
    r"bias has shape \(6,\); give \(33,\)": {"head": Head(KERNEL, bias=BIAS[:6])},
    r"weights has shape \(4,\) and targets \(4, 10\)": {"weights": WEIGHTS[:, 0]},
    "chunk=0; give at least one": {"chunk": 0},
    "soft_cap=0.0; it must be above 0": {"soft_cap": 0.0},
    r"label_smoothing=1.0, z_loss=0.0; the first must be in \[0, 1\)": {
        "label_smoothing": 1.0
    },
    "z_loss=-1.0; .*the second must be at least 0": {"z_loss": -1.0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(message):
    given = {"head": KERNEL, "hidden": HIDDEN} | REFUSED[message]
    with pytest.raises(ValueError, match=message):
        of(**given)


def test_the_chunk_that_is_chosen():
    assert losses.chunk_of((16, 4096, 4096), 128_256) == 523  # 4 logits per entry
    assert losses.chunk_of((8, 2048, 64), 50_000) == math.ceil(1024 / 8)
    assert losses.chunk_of((8, 100, 64), 50_000) == 100
