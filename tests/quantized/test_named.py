"""Values that a program names with `checkpoint_name` take adapters."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

import lorax
from tests import programs
from tests.programs import normal
from tests.quantized.own_code import DEPTH, IN, codes, scales
from tests.quantized.test_adapt import close
from tests.quantized.test_own_code import KEY, squares


def named(scan):
    """Kernels computed from float leaves and named; in a loop, one per step."""
    params = {
        "base": normal(1, DEPTH, IN, IN) / 4,
        "mask": jnp.sign(normal(2, DEPTH, IN, IN)) + 1,
        "head": normal(3, IN, 5),
    }

    def fn(params, x):
        def body(x, p):
            w = checkpoint_name(p["base"] * p["mask"], "layers/kernel")
            h = checkpoint_name(x @ w, "layers/out")  # an activation
            return x + jnp.tanh(h), None

        stack = {name: params[name] for name in ("base", "mask")}
        if scan:
            x, _ = jax.lax.scan(jax.checkpoint(body), x, stack)
        else:
            x, _ = body(x, jax.tree.map(lambda v: v[0], stack))
        return x @ params["head"]

    return fn, params, normal(0, 3, IN)


@pytest.mark.parametrize("scan", [True, False])
def test_a_named_value_is_a_target(scan):
    fn, params, x = named(scan)
    kernels = lorax.discover(fn, params, x)
    found = kernels["layers/kernel"]
    assert "layers/out" not in kernels and found.leaves == ("base", "mask")
    assert found.shape == ((DEPTH,) if scan else ()) + (IN, IN)
    target = lorax.Target("layers/kernel", rank=2)
    adapters = programs.perturbed(lorax.init(KEY, params, [target], kernels)[0])

    def by_hand(adapters):
        kernel = params["base"] * params["mask"]
        kernel = kernel if scan else kernel[0]
        (kernel,) = lorax.merge(adapters, {"layers/kernel": kernel}).values()
        y = x
        for w in kernel if scan else [kernel]:
            y = y + jnp.tanh(y @ w)
        return jnp.sum((y @ params["head"]) ** 2)

    adapted = squares(lorax.adapt(fn, on_merge="error"))
    got = jax.jit(jax.value_and_grad(adapted))(adapters, params, x)
    close(got, jax.value_and_grad(by_hand)(adapters))
    with pytest.raises(KeyError, match="has no leaf to merge into: serve it"):
        lorax.merge(adapters, params)


def test_names_of_codes_and_of_leaves():
    q, s = codes(1, IN, IN), scales(2, IN)
    params = {"q": jnp.asarray(q, jnp.int8), "s": jnp.asarray(s), "w": normal(3, IN, 5)}

    def fn(params, x):
        w = checkpoint_name(params["q"].astype(x.dtype) * params["s"], "layer/kernel")
        return x @ w @ checkpoint_name(params["w"], "another name of w")

    kernels = lorax.discover(fn, params, normal(0, 3, IN))
    assert {*kernels} == {"layer/kernel", "s", "w"}  # the name stands for the codes

    def same(params, x):
        w = checkpoint_name(params["q"].astype(x.dtype) * params["s"], "q")
        return x @ w @ params["w"]

    assert lorax.discover(same, params, normal(0, 3, IN))["q"].stored is not None
    # the leaves behind a name are not adapted twice
    both = lambda p, x: x @ checkpoint_name(p["w"] * p["g"], "scaled") @ p["v"]
    params = {"w": normal(1, IN, IN), "g": normal(2, IN), "v": normal(3, IN, 4)}
    kernels = lorax.discover(both, params, normal(0, 3, IN))
    target = lorax.Target("all-linear", rank=2)
    assert [*lorax.init(KEY, params, [target], kernels)[0]] == ["w"]
    described = lorax.describe(params, target, kernels)
    reasons = {leaf.path: leaf.reason for leaf in described.left_out}
    assert reasons["scaled"].startswith(
        "made from w, and the same operation reads both"
    )


def test_a_name_of_two_kernels_or_of_another_leaf_is_refused():
    params = {"a": normal(1, IN, IN), "b": normal(2, IN, IN), "g": normal(3, IN)}
    x = normal(0, 3, IN)

    def twice(p, x):
        for name in ("a", "b"):
            x = x @ checkpoint_name(jnp.tanh(p[name]), "kernel")
        return x

    kernels = lorax.discover(twice, params, x)
    with pytest.raises(ValueError, match="kernel: it stands for two different kernels"):
        lorax.init(KEY, params, [lorax.Target("kernel", 2)], kernels)

    other = lambda p, x: x @ checkpoint_name(jnp.tanh(p["a"]), "b") @ p["b"]
    kernels = lorax.discover(other, params, x)
    with pytest.raises(ValueError, match="b: checkpoint_name gives the path of this l"):
        lorax.init(KEY, params, [lorax.Target("b", 2)], kernels)


def test_a_name_for_a_policy_of_remat_hides_no_kernel():
    """With one name for all, the leaves are the targets, and the name is refused."""
    params = {
        name: {"q": jnp.asarray(codes(i, IN, IN), jnp.int8), "s": scales(i + 2, IN)}
        for i, name in enumerate(("a", "b"))
    }

    def fn(params, x):
        for p in params.values():
            w = p["q"].astype(x.dtype) * p["s"]
            x = jnp.tanh(x @ checkpoint_name(w, "weights"))
        return x

    x = normal(0, 3, IN)
    kernels = lorax.discover(fn, params, x)
    target = lorax.Target("all-linear", rank=2)
    assert [*lorax.init(KEY, params, [target], kernels)[0]] == ["a/q"]  # b is a head
    with pytest.raises(ValueError, match="weights: it stands for two different ker"):
        lorax.init(KEY, params, [lorax.Target("weights", 2)], kernels)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.filterwarnings("ignore::lorax.MergeWarning")
def test_a_leaf_and_the_name_of_what_it_is_in_have_an_adapter_each(adapter):
    params = {"w": normal(1, IN, IN), "g": normal(2, IN)}
    fn = lambda p, x: x @ checkpoint_name(p["w"] * p["g"], "scaled")
    x = normal(0, 3, IN)
    kernels = lorax.discover(fn, params, x)
    targets = [lorax.Target("w", 2, adapter=adapter), lorax.Target("scaled", 2)]
    adapters = programs.perturbed(lorax.init(KEY, params, targets, kernels)[0])

    def by_hand(adapters):
        inner = lorax.merge({"w": adapters["w"]}, params)
        kernel = {"scaled": inner["w"] * params["g"]}
        (whole,) = lorax.merge({"scaled": adapters["scaled"]}, kernel).values()
        return jnp.sum((x @ whole) ** 2)

    got = jax.value_and_grad(squares(lorax.adapt(fn)))(adapters, params, x)
    close(got, jax.value_and_grad(by_hand)(adapters))


def test_a_name_says_which_kernel_is_meant():
    """Codes without a scale are refused, but adapted where they are named."""
    params = {"q": jnp.asarray(codes(1, IN, IN), jnp.int8), "s": scales(2, IN)}
    params["s"] = jnp.asarray(params["s"], jnp.float32)
    x = normal(0, 3, IN)
    bare = lambda p, x: jnp.tanh(x @ (p["q"].astype(x.dtype) / 127))
    assert "or name the kernel itself" in lorax.discover(bare, params, x)["q"].refused

    def fn(p, x):
        w = checkpoint_name(p["q"].astype(x.dtype) / 127, "kernel")
        return (x @ w) * p["s"]  # then not part of the kernel

    kernels = lorax.discover(fn, params, x)
    target = lorax.Target("kernel", rank=2)
    adapters = programs.perturbed(lorax.init(KEY, params, [target], kernels)[0])
    dense = {"kernel": params["q"].astype(jnp.float32) / 127}
    want = (x @ lorax.merge(adapters, dense)["kernel"]) * params["s"]
    close(lorax.adapt(fn)(adapters, params, x), want)
