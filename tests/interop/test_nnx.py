"""The nnx bridge: a user's own loop on an adapted module, against the pure form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lorax
from lorax import optim
from lorax.interop.nnx import Adapted, Frozen, functional, on_adapters

KEY = jax.random.key(0)
TOKENS = (jnp.arange(12)[None] * jnp.array([[1], [3], [5]])) % 16


class Model(nnx.Module):
    """A model with every kind of state: parameters, a tied one, statistics, a count."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, tokens, double=False):
        x = nnx.relu(self.up(self.embed(tokens)))
        x = self.down(self.drop(self.norm(x)))
        return self.embed.attend(2 * x if double else x)


def targets(**how):
    return [lorax.Target("(up|down)/kernel", rank=2, alpha=4, **how)]


def loss_fn(adapted, tokens):
    logits = adapted(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit
def step(adapted, optimizer, tokens):
    loss, grads = nnx.value_and_grad(loss_fn)(adapted, tokens)
    optimizer.update(adapted, grads)
    return loss


@pytest.mark.parametrize(
    "tx",
    [optax.adamw(1e-2), optim.lora_plus(1e-2, ratio=4), optim.lora_pro(1e-2)],
    ids=["adamw", "lora_plus", "lora_pro"],
)
def test_a_loop_of_nnx_is_the_pure_loop(tx):
    model = Model(nnx.Rngs(0))
    model.drop.deterministic = True
    adapted = Adapted.init(KEY, model, targets(), TOKENS)
    optimizer = nnx.Optimizer(adapted, on_adapters(tx), wrt=nnx.Param)
    losses = [float(step(adapted, optimizer, TOKENS)) for _ in range(4)]

    fn, params, rest = functional(model)
    kernels = lorax.discover(fn, params, rest, TOKENS)
    adapters, params = lorax.init(KEY, params, targets(), kernels)

    @jax.jit
    def pure(adapters, state, rest):
        def loss_fn(adapters):
            logits, after = lorax.adapt(fn)(adapters, params, rest, TOKENS[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, TOKENS[:, 1:]
            )
            return losses.mean(), after

        (loss, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, rest, loss

    state, want = tx.init(adapters), []
    for _ in range(4):
        adapters, state, rest, loss = pure(adapters, state, rest)
        want.append(float(loss))
    np.testing.assert_allclose(losses, want, rtol=1e-6)
    assert losses[-1] < losses[0]
    mean = adapted.model.norm.mean[...]
    np.testing.assert_allclose(mean, rest["norm"]["mean"][...], rtol=1e-6)
    assert np.abs(mean).max() > 0 and not np.any(model.norm.mean[...])


@pytest.mark.parametrize("adapter", ["lora", "dora", "vera"])
def test_merged_is_a_module_of_the_same_kind(adapter):
    adapted = Adapted.init(KEY, Model(nnx.Rngs(0)), targets(adapter=adapter), TOKENS)
    optimizer = nnx.Optimizer(adapted, on_adapters(optax.adam(0.1)), wrt=nnx.Param)
    step(adapted, optimizer, TOKENS)
    adapted.eval()
    merged = adapted.merged()
    assert type(merged) is Model and type(merged.up.kernel) is nnx.Param
    assert type(adapted.model.up.kernel) is Frozen
    np.testing.assert_allclose(adapted(TOKENS), merged(TOKENS), atol=1e-5)
    twice = adapted(TOKENS, double=True)
    np.testing.assert_allclose(twice, 2 * merged(TOKENS), atol=1e-5)


def test_inits_that_move_the_base_leave_the_model_alone():
    model = Model(nnx.Rngs(0))
    before = model.up.kernel[...]
    adapted = Adapted.init(KEY, model, targets(init="pissa"), TOKENS)
    model.eval(), adapted.eval()
    assert np.abs(adapted.model.up.kernel[...] - before).max() > 1e-2
    assert (model.up.kernel[...] == before).all()
    np.testing.assert_allclose(adapted(TOKENS), model(TOKENS), atol=1e-5)


def test_a_quantised_base():
    model = nnx.Linear(64, 3, rngs=nnx.Rngs(0))
    x = jax.random.normal(KEY, (5, 64))
    fn, params, rest = functional(model)
    kernels = lorax.discover(fn, params, rest, x)
    params = lorax.quantize(params, [("kernel", "nf4")], kernels)
    adapters, params = lorax.init(KEY, params, [("kernel", 2)], kernels)
    adapted = Adapted(model, adapters, params)
    grads = nnx.grad(lambda adapted: (adapted(x) ** 2).sum())(adapted)
    assert np.abs(jax.tree.leaves(grads)[1]).max() > 0  # of b
    want = x @ jnp.asarray(params["kernel"].get_value()) + params["bias"][...]
    np.testing.assert_allclose(adapted(x), want, atol=1e-5)


def test_dropout_of_the_adapters_follows_train_and_eval():
    model = nnx.Linear(8, 3, rngs=nnx.Rngs(0))
    x = jax.random.normal(KEY, (5, 8))
    target = lorax.Target("kernel", rank=2, init="pissa", dropout=0.5)
    with pytest.raises(ValueError, match="pass rngs=nnx.Rngs"):
        Adapted.init(KEY, model, [target], x)
    adapted = Adapted.init(KEY, model, [target], x, rngs=nnx.Rngs(1))
    first, second = adapted(x), adapted(x)
    assert np.abs(first - second).max() > 1e-3
    adapted.eval()
    assert (adapted(x) == adapted(x)).all()


def test_errors():
    model = nnx.Linear(8, 3, rngs=nnx.Rngs(0))
    adapted = Adapted.init(KEY, model, [("kernel", 2)], jnp.ones((1, 8)))
    with pytest.raises(KeyError, match="no leaf 'other'; nearest paths: "):
        adapters = {"other": adapted.adapters.get_value()["kernel"]}
        Adapted(model, adapters, nnx.state(model, nnx.Param))
    with pytest.raises(ValueError, match="nnx.Param of a lorax.interop.nnx.Adapted"):
        nnx.Optimizer(model, on_adapters(optax.sgd(1.0)), wrt=nnx.Param)
    with pytest.raises(
        ValueError, match="on_adapters.tx., wrt=nnx.Param. with lorax.interop.nnx"
    ):
        nnx.Optimizer(adapted, optim.lora_plus(1e-2), wrt=nnx.Param)
