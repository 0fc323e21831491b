"""How-to, start and concept pages are true: their code does what they say."""

import dataclasses
import importlib.util
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
import lorax_cli
from experiments.reading import command
from lorax import checkpoint, compose
from lorax.adapters import parametrisation
from lorax.models import llama
from tests import concept_pages, howto_files
from tests.interop import gguf_files
from tests.test_preferences import learned_preferences

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
    page
    for folder in ("howto", "start", "concepts")
    for page in (ROOT / "docs" / folder).glob("*.md")
)
EVERYWHERE = [*PAGES, *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
COMMAND = re.compile(
    r"^(?: {4}|.* && )?(?:python -m (?=experiments)|lorax (?=\w))((?:.*\\\n)*.*)$", re.M
)


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Half the time of these toys would go into optimising their programs."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def run(name):
    (page,) = [page for page in PAGES if page.stem == name]
    scope: dict = {}
    exec(compile("\n".join(blocks(page, "python")), str(page), "exec"), scope)
    return scope


def own_model(scope):
    classes = {path: type(a).__name__ for path, a in scope["adapters"].items()}
    low_rank = {"conv/kernel": "Lora", "hidden/kernel": "Lora"}
    whole = ["head/bias", "head/kernel", "norm/bias", "norm/scale"]
    assert classes == low_rank | dict.fromkeys(whole, "Full")
    start = scope["loss_fn"](
        scope["params"], scope["statistics"], scope["batch"], jax.random.key(0)
    )
    state = scope["state"]
    assert scope["metrics"]["loss"] < 0.5 * start[0]
    moved = state.model_state["batch_stats"]["norm"]["mean"]
    assert np.abs(moved).max() > 0


def losses(scope):
    params, tokens, adapters = scope["params"], scope["tokens"], scope["adapters"]

    def plain(params, tokens):  # all logits at once
        hidden, head, targets = scope["read"](params, tokens)
        chosen = np.arange(64) == targets[..., None]
        return -jnp.mean(jax.nn.log_softmax(hidden @ head.kernel.T)[chosen])

    assert adapters.keys() == {"embed/embedding", "mix/kernel", "up/kernel"}
    before, after = (
        plain(lorax.merge(a, params), tokens)
        for a in (adapters, scope["state"].adapters)
    )
    told = scope["metrics"]["nats"] / scope["metrics"]["weight"]
    assert after < told < 0.7 * before  # told: before the last update
    for change in scope["change"].values():  # in a fresh pair one factor has a gradient
        assert any(leaf.any() for leaf in jax.tree.leaves(change))


def targets(scope, printed):
    assert "layers/qkv/kernel" in printed
    found = scope["adapters"]
    assert type(found["layers/qkv/kernel"]).__name__ == "SlicedLora"
    assert found["layers/up/kernel"].a.shape == (2, 16, 2)  # of two layers of three
    assert found["layers/down/kernel"].scale == pytest.approx(16 / 8**0.5)
    assert type(found["layers/o/kernel"]).__name__ == "Dora"
    assert scope["trained"] == sum(leaf.size for leaf in jax.tree.leaves(found))
    rest = [("layers/qkv/kernel", 4), "layers/(up|down)/kernel"]  # the page's list
    key, kernels = jax.random.key(0), scope["kernels"]
    short, _ = lorax.init(key, scope["params"], rest, kernels)
    assert {p: a.rank for p, a in short.items()} == {
        "layers/qkv/kernel": 4,
        "layers/up/kernel": 8,
        "layers/down/kernel": 8,
    }


def experts(scope, printed):
    found = scope["adapters"]
    assert found["experts/up"].a.shape == (4, 16, 4)
    assert found["experts/down"].b.shape == (4, 4, 16)
    assert found["router"].rank == 2 and found.keys().isdisjoint(["embed", "head"])
    for reason in ("an embedding: its rows are looked up", "an output head"):
        assert reason in printed
    assert f"{sum(x.size for x in jax.tree.leaves(found)):,} parameters" in printed
    assert scope["logits"].shape == (8, 32)


def quantized(scope):
    params, dense = scope["params"], scope["dense"]
    is_quantized = lorax.quantized.is_quantized
    packed = {p: is_quantized(leaf) for p, leaf in lorax.tree.flatten(params).items()}
    want = {"embed": False, "head": False, "layers/up": True, "layers/down": True}
    assert packed == want and scope["adapters"].keys() == {"layers/up", "layers/down"}
    plain = jax.tree.map(jnp.asarray, params, is_leaf=is_quantized)
    for logits in (scope["served"], scope["logits"]):  # b = 0
        np.testing.assert_allclose(logits, scope["forward"](plain, jnp.arange(8)), 1e-4)
    assert scope["merged"]["layers"]["up"].shape == dense["layers"]["up"].shape
    blocks = {name: leaf.block for name, leaf in scope["mixed"]["layers"].items()}
    assert blocks == {"up": 32, "down": 0}


def data_inits(scope):
    original, params = scope["original"], scope["params"]
    assert all(np.abs(params[p] - original[p]).max() > 1e-2 for p in original)
    assert {p: a.rank for p, a in scope["plain"].items()} == {"up": 8, "down": 4}


def activation_inits(scope):
    original, params = scope["original"], scope["params"]
    assert params["up"] is original["up"]
    assert np.abs(params["down"] - original["down"]).max() > 1e-2
    assert {p: a.rank for p, a in scope["adapters"].items()} == {"up": 4, "down": 2}
    assert len(scope["explained"]) == 8 and 0.9 < sum(scope["explained"]) <= 1.001


def optimizer_chain(scope):
    assert scope["losses"][-1] < 0.8 * scope["losses"][0]
    up = scope["mask"]["up"]
    assert (up.a, up.b, up.magnitude) == (True, True, False)
    assert scope["mask"]["bias"].value is False


def adalora(scope):
    assert sum(map(int, scope["ranks"].values())) == 9
    assert scope["metrics"]["loss"] < 0.8 * scope["first"]
    ranks = {path: a.rank for path, a in scope["small"].items()}
    kept = {path: int(rank) for path, rank in scope["ranks"].items() if rank}
    assert ranks == kept


def saving(scope):
    for path, adapter in scope["adapters"].items():
        jax.tree.map(np.testing.assert_array_equal, adapter, scope["again"][path])
    assert "w" in scope["refused"]
    scope["folder"] += "/afresh"
    straight = scope["run"](6)
    assert int(scope["resumed"].step) == 6
    jax.tree.map(
        np.testing.assert_array_equal, straight.adapters, scope["resumed"].adapters
    )
    assert checkpoint.RunCheckpoints(scope["folder"] + "/run").steps() == [6]


def quantized_inits(scope):
    assert 0 < scope["lost"] < 0.7 * scope["without"]
    assert lorax.quantized.is_quantized(scope["packed"]["w"])
    assert 0 < scope["report"].lost


def own_codes(scope):
    """The comment is right, and the scale does not affect the branch."""
    q = scope["kernels"]["q"]
    assert (q.shape, q.dtype, q.stored.dtype) == ((3, 64, 64), np.float32, np.int8)
    own, x = scope["own"], scope["x"]
    adapters = {"q": scope["adapters"]["q"].replace(b=scope["draw"](7, 3, 4, 64))}
    update = adapters["q"].delta(np.zeros((3, 64, 64), np.float32))
    want = x
    for layer in range(3):
        kernel = np.float32(own["q"][layer]) * own["scale"][layer] + update[layer]
        want = want + np.tanh(want @ kernel)
    got = lorax.adapt(scope["quantised"])(adapters, own, x)
    np.testing.assert_allclose(got, want @ own["head"], rtol=1e-4, atol=1e-5)


def many_adapters(scope):
    assert scope["apply"]._cache_size() == 1
    assert scope["both"]["w"].rank == 5 and scope["small"]["w"].rank == 2
    assert scope["ties"].adapters["w"].rank == 3
    base = scope["params"]["w"]
    first, second = (scope[name]["w"].delta(base) for name in ("french", "german"))
    difference = scope["less"]["w"].delta(base)
    np.testing.assert_allclose(difference, first - second, atol=1e-5)
    assert "w" in str(scope["report"])
    dora, _ = lorax.init(
        jax.random.key(0), scope["params"], [lorax.Target("w", adapter="dora", rank=2)]
    )
    with pytest.raises(ValueError, match="Dora"):
        compose.combine([dora], [1.0])
    compose.resize(dora, 1)


def population(scope):
    assert scope["losses"].shape == (3,)
    assert scope["best"]["w"].rank in scope["ranks"]
    assert scope["several"].state.adapters["w"].a.shape == (3, 8, 4)


def sharding(scope):
    lora = scope["state"].adapters["layers/up/kernel"]
    assert lora.a.sharding.spec[1] == "fsdp"  # as the kernel's rows
    assert int(scope["state"].step) == 1 and np.isfinite(scope["metrics"]["loss"])


def long_context(scope):
    """Loss and gradients equal those with plain attention and all logits at once."""
    model = llama.Model(dataclasses.replace(scope["config"], attention="plain"))
    params, inputs = jax.device_get((scope["params"], scope["inputs"]))

    def loss_fn(params):
        logits = model.apply({"params": params}, inputs)
        picked = scope["targets"][..., None]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), picked, -1).mean()

    loss, slopes = jax.jit(jax.value_and_grad(loss_fn))(params)
    np.testing.assert_allclose(scope["loss"], loss, rtol=1e-5)
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)
    jax.tree.map(close, scope["slopes"], slopes)
    assert scope["mesh"].shape.get("context", 1) == jax.device_count()


def own_method(scope):
    """Checks adapt and merge of the page's class against its formula in numpy."""
    adapters, base = scope["adapters"], scope["base"]
    assert set(base.frozen) == {"along/6"} and adapters["up"].d.shape == (2,)
    adapters = {p: a.replace(d=a.d + np.arange(1.0, 3.0)) for p, a in adapters.items()}
    q = np.asarray(base.frozen["along/6"], np.float64)
    want = (np.eye(6) + q @ np.diag([1.0, 2.0]) @ q.T) @ np.ones((6, 5))
    np.testing.assert_allclose(lorax.merge(adapters, base)["up"], want, rtol=1e-5)
    apply = lorax.adapt(lambda params, x: x @ params["up"], on_merge="error")
    np.testing.assert_allclose(apply(adapters, base, np.eye(6)), want, rtol=1e-5)


def equinox(scope):
    found = {p: type(a).__name__ for p, a in scope["adapters"].items()}
    attention = [f"attention/{name}_proj/weight" for name in ("query", "value")]
    whole = dict.fromkeys([f"layers/layers/{i}/weight" for i in range(3)], "Dora")
    assert found == whole | dict.fromkeys(attention, "Lora")
    assert scope["losses"][-1] < 0.8 * scope["losses"][0]
    params, tokens, merged = scope["params"], scope["tokens"], scope["merged"]
    assert type(merged) is scope["Model"]
    read = lambda params: jax.vmap(scope["eqx"].combine(params, scope["static"]))(
        tokens
    )
    adapted = lorax.adapt(read)(scope["state"].adapters, params)
    np.testing.assert_allclose(jax.vmap(merged)(tokens), adapted, atol=1e-4)


def haiku(scope):
    state, merged, tokens = scope["state"], scope["merged"], scope["tokens"]
    kinds = sorted(type(a).__name__ for a in state.adapters.values())
    assert kinds == ["Dora", "Dora", "Full", "Full", "Lora", "Lora"]
    assert scope["losses"][-1] < 0.8 * scope["losses"][0]
    read = lambda params: scope["model"].apply(
        params, state.model_state, tokens, is_training=False
    )
    adapted, _ = lorax.adapt(read)(state.adapters, scope["params"])
    np.testing.assert_allclose(read(merged)[0], adapted, atol=1e-4)


def einsums(scope):
    adapters, params = scope["state"].adapters, scope["params"]
    shapes = {p: (a.a.shape, a.b.shape) for p, a in adapters.items()}
    assert shapes == {
        "q_einsum/w": ((16, 4), (4, 4, 8)),
        "kv_einsum/w": ((2, 16, 2), (2, 2, 1, 8)),
        "attn_vec_einsum/w": ((4, 8, 4), (4, 16)),
        "gating_einsum/w": ((16, 2), (2, 2, 24)),
        "linear/w": ((24, 2), (2, 16)),
    }
    tokens, merged = scope["tokens"], scope["merged"]
    before, after = (scope["loss_fn"](p, tokens) for p in (params, merged))
    assert after < 0.8 * before
    adapted = lorax.adapt(scope["loss_fn"])(adapters, params, tokens)
    np.testing.assert_allclose(adapted, after, rtol=1e-4)


CHECKS = {
    check.__name__.removeprefix("learned_"): check
    for check in (
        *howto_files.CHECKS,
        *concept_pages.CHECKS,
        own_model,
        losses,
        learned_preferences,
        own_method,
        targets,
        experts,
        quantized,
        data_inits,
        activation_inits,
        optimizer_chain,
        adalora,
        saving,
        own_codes,
        quantized_inits,
        many_adapters,
        population,
        sharding,
        long_context,
        equinox,
        haiku,
        einsums,
    )
}


FOREIGN = ("equinox", "haiku")
"""Pages named after the library that they need."""


@pytest.fixture(autouse=True)
def no_class_stays(monkeypatch):
    """Removes what a page registers."""
    monkeypatch.setattr(parametrisation, "REGISTRY", dict(parametrisation.REGISTRY))


@pytest.mark.parametrize("name", [page.stem for page in PAGES])
def test_the_code_does_what_the_page_says(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "gguf":  # stands for the file that the page downloads
        gguf_files.tiny("SmolLM2-135M-Instruct.Q4_1.gguf")
    if name in FOREIGN:
        pytest.importorskip(name, reason="needs the golden extra")
    if name not in CHECKS:
        (page,) = [page for page in PAGES if page.stem == name]
        assert not blocks(page, "python"), "a page without a check of what it shows"
        return
    scope = run(name)
    printed = capsys.readouterr().out
    CHECKS[name](*([scope, printed] if name in ("targets", "experts") else [scope]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_are_short(page):
    assert len(page.read_text().splitlines()) < 60


def commands():
    """(page, words) of every command of ours shown on a page."""
    for page in EVERYWHERE:
        for block in re.findall(r"```(?:bash|text)\n(.*?)```", page.read_text(), re.S):
            for shown in COMMAND.findall(block):
                text = shown.replace("\\\n", " ").split(" && ")[0]
                yield pytest.param(shlex.split(text), id=f"{page.stem}: {text[:60]}")


def config_of(value):
    path, _, argument = command.find_config(value).partition(":")
    spec = importlib.util.spec_from_file_location("shown", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument or None)


@pytest.mark.parametrize("words", list(commands()))
def test_commands_name_programs_configs_and_fields_that_exist(words):
    named = words[0] if "." in words[0] else lorax_cli.module(words[0])
    program = ROOT / (named.replace(".", "/") + ".py")
    known = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', program.read_text()))
    config = None
    for word in words[1:]:
        flag, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or words[0].endswith("launch_local"):
            continue
        if flag == "config":
            config = config_of(value)
        elif flag.startswith("config."):
            field = config
            for name in flag.split(".")[1:]:
                assert name in field, word
                field = field[name]
        else:
            assert flag in known, f"{words[0]} has no --{flag}"
