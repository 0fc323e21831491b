"""Names and classes: registration, what a target accepts, what is refused and how."""

import flax.struct
import jax
import jax.numpy as jnp
import pytest

import lorax
from lorax import adapters, inits
from lorax.adapters import making
from lorax.inits import build
from lorax.types import Axes, Field

KEY = jax.random.key(0)
PARAMS = {"w": jnp.arange(12.0).reshape(4, 3)}


@flax.struct.dataclass
class Outputs(adapters.Parametrisation):
    """A bias-free gain on the outputs, never registered."""

    gain: jax.Array
    axes: Axes = flax.struct.field(pytree_node=False)

    fields = {"gain": Field("magnitude", "batch out")}
    drops = False

    @classmethod
    def make(cls, key, kernel, target, shared):
        _, out, batch = making.sizes(kernel, target)
        return cls(jnp.ones((*batch, *out), target.dtype), kernel.linear_axes())

    def factors(self, kernel):
        return adapters.layout.without_product(kernel, self.axes, gain=self.gain)


def halves(key, kernel, target, stats=None):
    """An init that is a plain function."""
    in_, out, batch = making.sizes(kernel, target)
    a = jnp.full((*batch, *in_, target.rank), 0.5)
    b = jnp.zeros((*batch, target.rank, *out))
    return build.around_factors(kernel, target, a, b), kernel


@pytest.fixture(autouse=True)
def registries_as_they_were(monkeypatch):
    monkeypatch.setattr(adapters.parametrisation, "REGISTRY", dict(adapters.REGISTRY))
    monkeypatch.setattr(inits, "REGISTRY", dict(inits.REGISTRY))


def test_a_class_itself_will_do():
    target = lorax.Target("w", adapter=Outputs)
    made, params = lorax.init(KEY, PARAMS, target)
    assert params is PARAMS and not jax.tree.leaves(made["w"])[0].sum() - 3
    doubled = {"w": made["w"].replace(gain=jnp.array([1.0, 2.0, 3.0]))}
    by_hand = PARAMS["w"] * jnp.array([1.0, 2.0, 3.0])
    assert jnp.array_equal(lorax.merge(doubled, params)["w"], by_hand)
    fn = lambda params, x: x @ params["w"]
    got = lorax.adapt(fn, on_merge="error")(doubled, params, jnp.eye(4))
    assert jnp.array_equal(got, by_hand)
    with pytest.raises(TypeError, match="has no make.key, kernel, target, shared"):
        empty = type("Empty", (adapters.Parametrisation,), {"fields": Outputs.fields})
        lorax.init(KEY, PARAMS, lorax.Target("w", adapter=empty))


def test_names():
    adapters.register("outputs", Outputs)
    assert adapters.register("outputs", Outputs) is Outputs  # loaded twice
    assert adapters.get("outputs") is Outputs
    assert adapters.name_of(Outputs) == "outputs"
    with pytest.raises(ValueError, match="'lora' belongs to lorax.adapters.lora.Lora"):
        adapters.register("lora", Outputs)
    with pytest.raises(TypeError, match="a subclass of .*Parametrisation"):
        adapters.register("odd", dict)
    with pytest.raises(ValueError, match="adapter='odd'; choose one of .*outputs"):
        lorax.Target("w", adapter="odd")
    with pytest.raises(ValueError, match="no branch to apply it to"):
        lorax.Target("w", adapter="outputs", dropout=0.1)
    with pytest.raises(
        TypeError, match="the update a, which reads, and b, which writes"
    ):
        type(
            "Odd",
            (adapters.Parametrisation,),
            {"fields": {"u": Field("u", "", pair="v")}},
        )


def test_inits():
    target = lorax.Target("w", rank=2, init=halves)
    made, _ = lorax.init(KEY, PARAMS, target)
    assert made["w"].a[0, 0] == 0.5
    inits.register("halves", halves)
    named, _ = lorax.init(KEY, PARAMS, lorax.Target("w", rank=2, init="halves"))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, made, named))
    with pytest.raises(ValueError, match="init name 'pissa' belongs to .*pissa.pissa"):
        inits.register("pissa", halves)
    with pytest.raises(ValueError, match="init='odd'; choose one of .*halves"):
        lorax.init(KEY, PARAMS, lorax.Target("w", rank=2, init="odd"))
    with pytest.raises(ValueError, match="init=3; give a registered name, or a func"):
        lorax.Target("w", init=3)
    told = "init='pissa' has no meaning for .*has no from_triplets; use it with .*lora"
    with pytest.raises(ValueError, match=told):
        lorax.init(KEY, PARAMS, lorax.Target("w", adapter=Outputs, init="pissa"))


def test_frozen_arrays_that_are_lacking_are_named():
    @flax.struct.dataclass
    class Lent(Outputs):
        fixed: jax.Array | None = None
        lent: tuple = flax.struct.field(pytree_node=False, default=())

        fields = Outputs.fields | {"fixed": Field("fixed", "out", frozen=True)}

        @classmethod
        def make(cls, key, kernel, target, shared):
            own = kernel.linear_axes()
            names = (("fixed", f"lent/{kernel.path}"),)
            return cls(jnp.ones(3), own, jnp.arange(3.0), names)

        def factors(self, kernel):
            gain = self.gain * self.fixed
            return adapters.layout.without_product(kernel, self.axes, gain=gain)

    made, base = lorax.init(KEY, PARAMS, lorax.Target("w", adapter=Lent))
    assert isinstance(base, lorax.types.Base) and [*base.frozen] == ["lent/w"]
    assert len(jax.tree.leaves(made)) == 1
    by_hand = PARAMS["w"] * jnp.arange(3.0)
    assert jnp.array_equal(lorax.merge(made, base)["w"], by_hand)
    loss = lorax.adapt(lambda params, x: jnp.sum(x @ params["w"]), on_merge="error")
    grads = jax.jit(jax.grad(loss))(made, base, jnp.ones((2, 4)))
    assert len(jax.tree.leaves(grads)) == 1
    with pytest.raises(ValueError, match="w: Lent needs the frozen array 'lent/w' for"):
        lorax.merge(made, base.params)
