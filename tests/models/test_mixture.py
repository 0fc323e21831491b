"""Mixtral and Qwen3-MoE against transformers: switches, dispatches, cache, padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lorax
from lorax import models
from lorax.interop import hf
from lorax.models import experts, layers, mixture, rope
from tests.models import golden

transformers = pytest.importorskip("transformers", reason="needs the golden extra")
torch = pytest.importorskip("torch", reason="needs the golden extra")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
THEIRS = {"experts_implementation": "eager"}  # the one that runs in float64
QWEN = {"num_experts": 4, "moe_intermediate_size": 24}
CASES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 6}),
    "qwen3": ("Qwen3Moe", {**QWEN, "attention_bias": True}),
    "gpt-oss": (
        "GptOss",
        {
            "num_local_experts": 4,
            "sliding_window": 6,
            "swiglu_limit": 1.5,
            "swiglu_alpha": 1.3,
            "attn_implementation": "eager",
        },
    ),
    "qwen3-sum-to-one": ("Qwen3Moe", {**QWEN, "norm_topk_prob": True}),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Makes each case's model once: directory, model, tokens and reference logits."""
    made = {}

    def make(name):
        if name not in made:
            kind, fields = CASES[name]
            config = getattr(transformers, f"{kind}Config")
            config = config(**{**SIZES, **fields, **THEIRS})
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
            golden.redraw(model, size=2.0)
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory)
            tokens = golden.tokens_of(61, time=24)  # beyond the window
            made[name] = directory, model, tokens, golden.reference(model, tokens)
        return made[name]

    return make


def apply(model, params, tokens, **kwargs):
    return jax.jit(lambda p: model.apply({"params": p}, tokens, **kwargs))(params)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(case, name, tmp_path):
    directory, _, tokens, expected = case(name)
    model, params = hf.load(directory)
    golden.assert_close(apply(model, params, tokens), expected)
    assert mixture.Config.from_hf(model.config.to_hf()) == model.config
    hf.save(tmp_path / "again", model.config, params)
    found, given = (
        load_file(d / "model.safetensors") for d in (tmp_path / "again", directory)
    )
    assert found.keys() == given.keys()
    for key, tensor in given.items():
        np.testing.assert_array_equal(found[key], tensor)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", dtype=torch.float64, **THEIRS
    )
    golden.assert_close(golden.reference(theirs.eval(), tokens), expected)


@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
def test_tensors_that_experts_share(case, name, tmp_path):
    """As transformers 5 has them in memory, and writes them on request."""
    directory, reference, _, _ = case(name)
    reference.float().save_pretrained(tmp_path, save_original_format=False)
    assert any(
        key.endswith("gate_up_proj")
        for key in load_file(tmp_path / "model.safetensors")
    )
    for scan in (True, False):
        found = hf.load(tmp_path, scan=scan)[1]
        jax.tree.map(
            np.testing.assert_array_equal, found, hf.load(directory, scan=scan)[1]
        )


MUTATIONS = {
    "chosen": ("mixtral", {"chosen": 3}),
    "renormalised": ("qwen3", {"renormalised": True}),
    "not renormalised": ("qwen3-sum-to-one", {"renormalised": False}),
    "sinks": ("gpt-oss", {"sinks": False}),
    "gpt-oss's windows": ("gpt-oss", {"windows": (6, 6)}),
    "expert_bias": ("gpt-oss", {"expert_bias": False}),
    "alpha": ("gpt-oss", {"swiglu": (1.702, 1.5)}),
    "limit": ("gpt-oss", {"swiglu": (1.3, 7.0)}),
    "no clamp": ("gpt-oss", {"swiglu": None}),
    "activation": ("mixtral", {"activation": "gelu"}),
    "windows": ("mixtral", {"windows": ()}),
    "qk_norm": ("qwen3", {"qk_norm": False}),
    "o_bias": ("qwen3", {"o_bias": False}),
}


@pytest.mark.once
@pytest.mark.parametrize("name", MUTATIONS)
def test_every_switch_matters(case, name):
    base, changed = MUTATIONS[name]
    directory, _, tokens, expected = case(base)
    model, params = hf.load(directory, scan=False)
    assert all(getattr(model.config, k) != v for k, v in changed.items())
    mutant = mixture.Model(dataclasses.replace(model.config, **changed))
    found = mutant.apply({"params": params}, tokens[:1])
    golden.assert_apart(found, expected[:1])


@pytest.mark.parametrize(
    "name, scan", [("mixtral", True), ("qwen3", False), ("gpt-oss", True)]
)
def test_left_padding_and_cache(case, name, scan):
    directory, reference, tokens, _ = case(name)
    real = golden.left_padded([24, 15], 24)
    expected = np.zeros((2, 24, 61))
    for row, length in enumerate([24, 15]):
        own = tokens[row : row + 1, 24 - length :]
        expected[row, 24 - length :] = golden.reference(reference, own)[0]
    model, params = hf.load(directory, scan=scan)
    golden.assert_close(apply(model, params, tokens, real=real), expected, real)
    golden.assert_close(golden.cached(model, params, tokens, real), expected, real)


TARGETS = [
    lorax.Target(models.EXPERTS, rank=2, alpha=4, adapter="dora"),
    lorax.Target("all-linear", rank=2),
]


def test_every_dispatch_and_its_adapters(case):
    """Equal results, equal adapters, and `adapt` equal to the merged parameters."""
    directory, _, tokens, expected = case("mixtral")
    found, made = [], []
    for dispatch in experts.DISPATCHES:
        model, params = hf.load(directory, dispatch=dispatch)

        def call(params, model=model):
            return model.apply({"params": params}, tokens)

        golden.assert_close(jax.jit(call)(params), expected)
        kernels = lorax.discover(call, params)
        adapters, _ = lorax.init(jax.random.key(0), params, TARGETS, kernels)
        adapters = jax.tree.map(lambda x: x + 0.02, adapters)
        got = jax.jit(lorax.adapt(call, on_merge="error"))(adapters, params)
        want = jax.jit(call)(lorax.merge(adapters, params))
        golden.assert_close(got, np.asarray(want, np.float64))
        golden.assert_apart(want, expected)
        found.append(got)
        made.append(adapters)
    assert made[0]["layers/experts/gate_up/kernel"].axes == lorax.Axes(
        (2,), (3, 4), (0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, made[0], made[1])
    assert abs(found[0] - found[1]).max() <= 1e-5 * found[0].std()


def test_experts_are_quantised_as_they_are_read(case):
    directory, _, tokens, _ = case("mixtral")
    rules = [(models.EXPERTS, lorax.quantized.NF4(block=8, double=False))]
    model, params = hf.load(directory)
    found = hf.load(directory, quantize=rules)[1]
    kernels = lorax.discover(lambda p: model.apply({"params": p}, tokens), params)
    jax.tree.map(
        np.testing.assert_array_equal, found, lorax.quantize(params, rules, kernels)
    )


def test_shards_of_experts_are_read_alone(case):
    """Experts and hidden units sharded: each device's block matches the whole leaf."""
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("expert", "tensor"))
    directory, reference, _, _ = case("qwen3")

    def shardings(model, shapes):
        del model
        spec = jax.sharding.PartitionSpec
        cut = {"gate_up": spec(None, "expert", None, None, "tensor")}
        cut["down"] = spec(None, "expert", "tensor")
        where = lambda path, _: jax.sharding.NamedSharding(
            mesh, cut.get(path[-2].key, spec()) if "experts" in str(path) else spec()
        )
        return jax.tree_util.tree_map_with_path(where, shapes)

    whole, found = hf.load(directory)[1], hf.load(directory, shardings=shardings)[1]
    assert len(found["layers"]["experts"]["down"]["kernel"].sharding.device_set) == 4
    jax.tree.map(np.testing.assert_array_equal, found, whole)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not implemented"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not implemented"),
        ({"num_local_experts": 8}, "experts is given twice.*4.*8"),
        ({"num_experts_per_tok": 5}, "visits 5 of 4 experts"),
        ({"shared_expert_intermediate_size": 8}, "unknown fields.*shared_expert"),
    ],
)
def test_what_is_not_implemented_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        mixture.Config.from_hf({**SIZES, **QWEN, "model_type": "qwen3_moe", **fields})


@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_by_either_name(kind, name):
    assert mixture.Config.from_hf({"model_type": kind, name: 16}).experts == 16


def test_jitter_and_another_dispatch_are_refused():
    config = {**SIZES, "model_type": "mixtral"}
    with pytest.raises(ValueError, match="router_jitter_noise=0.1 is not implemented"):
        mixture.Config.from_hf({**config, "router_jitter_noise": 0.1})
    with pytest.raises(ValueError, match="dispatch='sparse'; choose one of ragged"):
        mixture.Config.from_hf(config, dispatch="sparse")


def test_configs_of_the_hub():
    """As in mistralai/Mixtral-8x7B-v0.1 and Qwen/Qwen3-30B-A3B."""
    config = mixture.Config.from_hf(
        {
            "model_type": "mixtral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "vocab_size": 32000,
        }
    )
    assert config == mixture.Config(
        positions=32768,
        kv_heads=8,
        eps=1e-5,
        rope=rope.Rope(base=1e6),
        balance=0.02,
    )
    assert config == mixture.Config.from_hf({**config.to_hf(), "num_experts": None})
    config = mixture.Config.from_hf(
        {
            "model_type": "qwen3_moe",
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 151936,
        }
    )
    assert (config.experts, config.chosen, config.hidden) == (128, 8, 768)
    assert config.renormalised and config.windows == () and config.qk_norm


@pytest.mark.parametrize("scan, remat", [(True, "full"), (False, "none")])
def test_router_losses_are_those_of_transformers(case, scan, remat):
    """Both losses, with unchanged logits, through scan, remat and adapt."""
    from transformers.models.mixtral import modeling_mixtral as theirs

    directory, reference, tokens, expected = case("mixtral")
    real = golden.left_padded([24, 15], 24)
    told = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(real)}
    with torch.no_grad():
        seen = reference(**told, output_router_logits=True).router_logits
    want = theirs.load_balancing_loss_func(seen, 4, 2, told["attention_mask"]).item()
    wide = torch.stack([x.reshape(*real.shape, 4) for x in seen]).numpy()
    square = np.log(np.exp(wide).sum(-1)) ** 2
    model, params = hf.load(directory, scan=scan, remat=remat)

    def call(params):
        given = {"real": jnp.asarray(real), "mutable": [layers.ROUTING]}
        logits, kept = model.apply({"params": params}, tokens, **given)
        return logits, experts.recorded(kept[layers.ROUTING])

    def loss(params):
        logits = call(params)[1]
        return experts.balance_loss(logits, 2, real), experts.z_loss(logits, real)

    kernels = lorax.discover(call, params)
    adapters, _ = lorax.init(jax.random.key(0), params, TARGETS, kernels)
    plain, found = jax.jit(lorax.adapt(call, on_merge="error"))(adapters, params)
    np.testing.assert_allclose(found[:, real], wide[:, real], rtol=2e-3, atol=1e-3)
    alone = apply(model, params, tokens, real=real)
    np.testing.assert_allclose(plain[real], alone[real], atol=1e-4)
    got = jax.jit(lorax.adapt(loss))(adapters, params)
    assert float(got[0]) == pytest.approx(want, rel=1e-4)
    assert float(got[1]) == pytest.approx(square[:, real].mean(), rel=1e-4)
    slope = jax.jit(jax.grad(lambda p: loss(p)[0]))(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slope["embed"]))
