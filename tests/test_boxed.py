"""Boxed parameters: linen's `Partitioned` and nnx metadata stay, and place leaves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import lorax
from lorax import sharding, training
from lorax.sharding import boxes

X = jax.random.normal(jax.random.key(0), (4, 8))
PARTITIONED = (nn.with_partitioning, ("fsdp", "tensor"), (None, "tensor"))
LOGICAL = (nn.with_logical_partitioning, ("embed", "mlp"), (None, "heads"))


class Model(nn.Module):
    kind: tuple

    @nn.compact
    def __call__(self, x):
        box, up, wide = self.kind
        start = nn.initializers.lecun_normal()
        x = jnp.tanh(nn.Dense(16, kernel_init=box(start, up), name="up")(x))
        return nn.Dense(8, kernel_init=box(start, wide), name="down")(x)


@pytest.mark.parametrize("kind", [PARTITIONED, LOGICAL], ids=["axes", "logical"])
def test_boxes_stay_and_place_their_leaves(kind):
    model = Model(kind)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    abstract = jax.eval_shape(model.init, jax.random.key(1), X)["params"]
    placed = sharding.place(abstract, mesh, rules=[(".*/bias", P())])
    assert placed.specs["up/kernel"] == P("fsdp", "tensor")
    assert placed.specs["down/kernel"] == P(None, "tensor")
    make = jax.jit(
        lambda key: model.init(key, X)["params"], out_shardings=placed.tree(abstract)
    )
    params = make(jax.random.key(1))
    loss_fn = lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2)
    kernels = lorax.discover(loss_fn, params, X)
    targets = [lorax.Target(".*/kernel", rank=2, init="pissa")]
    adapters, moved = lorax.init(jax.random.key(2), params, targets, kernels)
    merged = lorax.merge(adapters, moved)
    for tree in (moved, merged):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        assert type(tree["up"]["kernel"]) is type(params["up"]["kernel"])
        assert tree["up"]["kernel"].names == kind[1]
    tx = optax.adam(1e-2)
    state = training.create_state(jax.random.key(3), adapters, tx)
    where = sharding.state_shardings(state, placed)
    assert where.adapters["up/kernel"].a.spec == P("fsdp", None)
    assert where.adapters["up/kernel"].b.spec == P(None, "tensor")
    step = jax.jit(
        training.make_train_step(training.simple_loss(loss_fn), tx),
        out_shardings=(where, sharding.replicated(mesh)),
    )
    with jax.set_mesh(mesh):
        state, metrics = step(jax.device_put(state, where), moved, X)
    np.testing.assert_allclose(metrics["loss"], loss_fn(params, X), rtol=1e-5)


def test_rules_come_before_boxes_and_what_has_neither_is_named():
    abstract = jax.eval_shape(Model(PARTITIONED).init, jax.random.key(1), X)["params"]
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    rules = [("up/kernel", P(None, "fsdp")), (".*/bias", P())]
    specs = sharding.place(abstract, mesh, rules=rules).specs
    assert specs["up/kernel"] == P(None, "fsdp")
    assert specs["down/kernel"] == P(None, "tensor")
    with pytest.raises(ValueError, match="down/bias: no sharding rule matches"):
        sharding.place(abstract, mesh, rules=rules[:1])


def test_variables_of_nnx():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    start = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tensor"))
    with jax.set_mesh(mesh):
        model = nnx.Linear(8, 6, kernel_init=start, rngs=nnx.Rngs(0))
        graph, params = nnx.split(model)
        assert boxes.names_of(params)["kernel"].names == ("fsdp", "tensor")
        placed = sharding.place(params, mesh, rules=[("bias", P())])
        assert placed.specs["kernel"] == P("fsdp", "tensor")
        fn = lambda params, x: nnx.merge(graph, params)(x)
        kernels = lorax.discover(fn, params, X)
        adapters, params = lorax.init(
            jax.random.key(0), params, [("kernel", 2)], kernels
        )
        merged = lorax.merge(adapters, params)
        assert boxes.names_of(merged) == boxes.names_of(params)
        got = lorax.adapt(fn)(adapters, params, X)
    np.testing.assert_allclose(got, fn(merged, X), atol=1e-6)
