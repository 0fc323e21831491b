"""Distillation: the divergence by hand and as in TRL, its gradients, its memory."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import losses
from lorax.losses import Head, Predictions
from tests import trl_losses
from tests.programs import normal

ROWS, TIME, WORDS, WIDTH, WIDER = 3, 7, 11, 4, 6
WEIGHTS = np.random.default_rng(0).uniform(0, 2, (ROWS, TIME)).astype(np.float32)
WEIGHTS[:, -2:] = 0


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(student, teacher, beta, temperature):
    """The mean, and its gradient with respect to the student's logits."""
    q, p = (softmax(np.float64(x) / temperature) for x in (student, teacher))
    m = beta * p + (1 - beta) * q
    kl = lambda x, y: (x * np.log(x / y)).sum(-1, keepdims=True)
    if beta == 0:
        found, slope = kl(p, q), -p / q
    elif beta == 1:
        found, slope = kl(q, p), np.log(q / p) + 1
    else:
        found = beta * kl(p, m) + (1 - beta) * kl(q, m)
        slope = (1 - beta) * np.log(q / m)
    slope = q * (slope - (q * slope).sum(-1, keepdims=True)) / temperature
    weights = WEIGHTS[..., None] / WEIGHTS.sum()
    return (weights * found).sum(), weights * slope


STUDENT = Predictions(normal(0, ROWS, TIME, WIDTH), Head(normal(1, WIDTH, WORDS)))
TEACHER = Predictions(
    normal(2, ROWS, TIME, WIDER),
    Head(normal(3, WORDS, WIDER), tied=True, bias=normal(4, WORDS)),
)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradients_are_those_by_hand(beta, temperature):
    def mean(hidden, kernel, chunk):
        student = Predictions(hidden, Head(kernel))
        options = {"beta": beta, "temperature": temperature, "chunk": chunk}
        found = losses.chunked_divergence(student, TEACHER, WEIGHTS, **options)
        return found.mean

    hidden, kernel = (np.asarray(x) for x in (STUDENT.hidden, STUDENT.head.kernel))
    others = np.asarray(TEACHER.hidden) @ np.asarray(TEACHER.head.kernel).T
    want, slope = by_hand(
        hidden @ kernel, others + TEACHER.head.bias, beta, temperature
    )
    for chunk in (2, None):
        got, (of_hidden, of_kernel) = jax.value_and_grad(mean, (0, 1))(
            hidden, kernel, chunk
        )
        np.testing.assert_allclose(got, want, rtol=2e-6)
        np.testing.assert_allclose(of_hidden, slope @ kernel.T, atol=1e-6)
        product = np.einsum("btd,btv->dv", hidden, slope)
        np.testing.assert_allclose(of_kernel, product, atol=1e-6)


def test_the_divergence_is_that_of_trl():
    values = trl_losses.draws()
    recorded = json.loads(trl_losses.RECORDED.read_text())["gkd"]
    mask = values["mask"][: trl_losses.ROWS]
    with jax.enable_x64(True):
        logits = [jnp.asarray(values[name]) for name in ("student", "teacher")]
        both = [
            Predictions(x, jnp.eye(trl_losses.WORDS, dtype=x.dtype)) for x in logits
        ]
        for key, want in recorded.items():
            beta, temperature = map(float, key.split())
            got = losses.chunked_divergence(
                *both, jnp.asarray(mask), beta=beta, temperature=temperature
            )
            np.testing.assert_allclose(got.mean, want, rtol=1e-6)
            assert got.weight == mask.sum()


def test_an_adapted_head_has_its_branch_in_every_chunk():
    params = {"head": STUDENT.head.kernel}

    def loss_fn(params, hidden):
        own = Predictions(hidden, params["head"])
        return losses.chunked_divergence(own, TEACHER, WEIGHTS, chunk=2).mean

    kernels = lorax.discover(loss_fn, params, STUDENT.hidden)
    adapters, params = lorax.init(
        jax.random.key(0), params, [lorax.Target("head", rank=2)], kernels
    )
    adapters["head"] = adapters["head"].replace(b=normal(5, 2, WORDS))

    def merged(adapters):
        return loss_fn(lorax.merge(adapters, params), STUDENT.hidden)

    adapted = lorax.adapt(loss_fn, on_merge="error")
    got = jax.value_and_grad(adapted)(adapters, params, STUDENT.hidden)
    want = jax.value_and_grad(merged)(adapters)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6)
    jax.tree.map(close, got, want)


def test_the_logits_of_all_tokens_never_exist():
    rows, time, words = 4, 256, 2048

    def temporaries(chunk):
        def loss(hidden, kernel):
            own, other = (
                Predictions(hidden, kernel),
                Predictions(hidden + 1, 2 * kernel),
            )
            weights = jnp.ones((rows, time))
            return losses.chunked_divergence(own, other, weights, chunk=chunk).mean

        step = jax.jit(jax.grad(loss)).lower(
            jnp.ones((rows, time, 8)), jnp.ones((8, words))
        )
        return step.compile().memory_analysis().temp_size_in_bytes

    logits = rows * time * words * 4
    assert temporaries(8) < 0.3 * logits < 2 * logits < temporaries(time)


def test_what_does_not_fit_is_named():
    weights = np.ones((ROWS, TIME))
    other = TEACHER._replace(head=Head(jnp.ones((WORDS + 5, WIDER)), tied=True))
    with pytest.raises(
        ValueError, match="11 tokens and the teacher 16; .* cut its head"
    ):
        losses.chunked_divergence(STUDENT, other, weights)
    for options in ({"beta": 1.5}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=r"the first must be in \[0, 1\]"):
            losses.chunked_divergence(STUDENT, TEACHER, weights, **options)
    with pytest.raises(ValueError, match="hidden has shape"):
        losses.chunked_divergence(STUDENT, TEACHER, weights[:, 1:])
