"""ViT and SigLIP's vision tower against `transformers`, and what configs refuse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import lorax
from lorax import tree
from lorax.interop import hf
from lorax.models import FAMILIES, table, vit
from tests.models import encoders_golden as tools

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 2,
    "layer_norm_eps": 0.05,
}
CASES = {
    "vit": "ViTForImageClassification",
    "vit bare": "ViTModel",
    "siglip": "SiglipForImageClassification",
    "siglip pooled": "SiglipVisionModel",
    "siglip bare": "SiglipVisionModel",
}


def images():
    return np.random.default_rng(1).standard_normal((3, 12, 12, 2)).astype(np.float32)


@functools.cache
def theirs(case):
    """The redrawn `transformers` model."""
    torch = pytest.importorskip("torch", reason="needs the golden extra: transformers")
    library = pytest.importorskip("transformers", reason="needs the golden extra")
    if case.startswith("vit"):
        config = library.ViTConfig(**TINY, num_labels=5)
    else:
        pools = {"vision_use_head": case != "siglip bare"}
        config = library.SiglipVisionConfig(**TINY, **pools)
        if case == "siglip":
            vision = config.to_dict()
            text = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 1}
            config = library.SiglipConfig(
                vision_config=vision, text_config=text, num_labels=5
            )
    model = getattr(library, CASES[case])(config)
    gains = {"fc1.weight": 0.3, "classifier.weight": 4.0, "mlp.fc2.weight": 60.0}
    tools.redraw(model, gains, {"fc1.bias": -2.7})
    with torch.no_grad():
        found = model(torch.from_numpy(images()).permute(0, 3, 1, 2))
    part = {"pooled": "pooler_output", "bare": "last_hidden_state"}
    return model, getattr(found, part.get(case.split()[-1], "logits")).numpy()


@functools.cache
def golden(case):
    """Our config and variables, and the outputs of `transformers`."""
    model, want = theirs(case)
    raw = {**model.config.to_dict(), "architectures": [CASES[case]]}
    config = vit.Config.from_hf(raw)
    family = FAMILIES[config.to_hf()["model_type"]]
    tensors = {hf.renamed(family, k): t for k, t in model.state_dict().items()}
    return config, tools.load(tensors, family, config, images()), want


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    config, variables, want = golden(case)
    got = tools.run(vit, config, variables, images())
    assert got.dtype == jnp.float32
    assert tools.error(got, want) <= tools.TOLERANCE


def fewer_heads(variables):
    """The same matrices, split into two heads."""
    wide = {(3, 32, 4, 8): (3, 32, 2, 16), (3, 4, 8, 32): (3, 2, 16, 32)}
    wide[3, 4, 8] = 3, 2, 16
    return jax.tree.map(lambda x: x.reshape(wide.get(x.shape, x.shape)), variables)


def turned(variables):
    """The patch kernel with height and width swapped."""
    params = variables["params"]
    kernel = params["patches"]["kernel"].swapaxes(0, 1)
    return {"params": params | {"patches": params["patches"] | {"kernel": kernel}}}


MUTATIONS = {
    ("vit", "activation"): {"activation": "gelu_new"},
    ("vit", "eps"): {"eps": 1e-12},
    ("vit", "heads"): {"heads": 2},
    ("vit", "biases"): {"biased": False},
    ("vit", "height is not width"): {},
    ("siglip", "activation"): {"activation": "gelu"},
    ("siglip pooled", "activation"): {"activation": "relu"},
    ("siglip pooled", "eps"): {"eps": 1.0},
}


@pytest.mark.parametrize("case, switch", MUTATIONS)
def test_every_switch_moves_the_logits(case, switch):
    config, variables, want = golden(case)
    if switch == "heads":
        variables = fewer_heads(variables)
    elif switch == "height is not width":
        variables = turned(variables)
    other = dataclasses.replace(config, **MUTATIONS[case, switch])
    got = tools.run(vit, other, variables, images())
    assert tools.error(got, want) >= tools.MUTATION


@pytest.mark.parametrize("case", ["vit", "vit bare", "siglip pooled", "siglip"])
def test_checkpoints_of_both_libraries(case, tmp_path):
    """Theirs load here, and ours there, under names that all versions know."""
    model, want = theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    ours, params = hf.load(tmp_path / "theirs")
    variables = {"params": params}
    got = tools.run(vit, ours.config, variables, images())
    assert tools.error(got, want) <= tools.TOLERANCE
    hf.save(tmp_path / "ours", ours.config, params)
    again, same = hf.load(tmp_path / "ours")
    assert again.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, same, params)
    file = "model.safetensors"
    written = safetensors.numpy.load_file(tmp_path / "ours" / file)
    read = safetensors.numpy.load_file(tmp_path / "theirs" / file)
    fronted = {key if key in read else key.split(".", 1)[1]: key for key in written}
    unread = {key for key in read if key not in fronted}
    assert all("head." in key or "pooler." in key for key in unread)
    assert (case in ("siglip", "vit bare")) == bool(unread)
    for key, own in fronted.items():
        np.testing.assert_array_equal(written[own], read[key], err_msg=key)
    loaded = type(model).from_pretrained(tmp_path / "ours").state_dict()
    for key, tensor in model.state_dict().items():
        if key in loaded and not key.startswith(("vision_model.head.", "pooler.")):
            np.testing.assert_array_equal(loaded[key], tensor, err_msg=key)


def test_of_a_whole_siglip_the_vision_tower_is_read(tmp_path):
    library = pytest.importorskip("transformers", reason="needs the golden extra")
    tower, want = theirs("siglip pooled")
    text = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 1}
    text |= {"num_hidden_layers": 1, "intermediate_size": 8}
    vision = tower.config.to_dict()
    whole = library.SiglipModel(
        library.SiglipConfig(vision_config=vision, text_config=text)
    )
    whole.vision_model.load_state_dict(tower.state_dict())
    whole.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="its text tower is left unread"):
        model, params = hf.load(tmp_path)
    got = tools.run(vit, model.config, {"params": params}, images())
    assert tools.error(got, want) <= tools.TOLERANCE


SMALL = vit.Config(
    image=8, patch=4, channels=1, width=16, layers=2, heads=2, hidden=24, labels=3
)
OTHERS = {
    "vit": SMALL,
    "vit bare": dataclasses.replace(SMALL, head="none", biased=False),
    "siglip": dataclasses.replace(SMALL, family="siglip"),
    "siglip pooled": dataclasses.replace(SMALL, family="siglip", head="pooled"),
    "siglip bare": dataclasses.replace(SMALL, family="siglip", head="none"),
}
IMAGES = jnp.asarray(np.random.default_rng(2).standard_normal((2, 8, 8, 1)))


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_the_table_names_every_parameter(config):
    assert vit.Config.from_hf(config.to_hf()) == config
    for scan in (True, False):
        config = dataclasses.replace(config, scan=scan)
        leaves = tree.flatten(hf.abstract(vit.Model(config)))
        axes = table.logical_axes(vit.entries(config), config.stacks, scan)
        assert {path: leaf.ndim for path, leaf in leaves.items()} == {
            path: len(names) for path, names in axes.items()
        }


def test_scan_and_remat_change_nothing_and_bfloat16_little():
    variables = tools.drawn(vit, SMALL, IMAGES)
    want = tools.run(vit, SMALL, variables, IMAGES)
    apart, split = tools.unscanned(SMALL, variables)
    rematerialised = dataclasses.replace(SMALL, remat="save=q,attention")
    for other, values in ((apart, split), (rematerialised, variables)):
        got = tools.run(vit, other, values, IMAGES)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    half = dataclasses.replace(SMALL, dtype=jnp.bfloat16)
    got = tools.run(vit, half, variables, IMAGES)
    assert got.dtype == jnp.float32
    assert 0 < jnp.max(jnp.abs(got - want)) < 0.2 * jnp.std(want)


def test_dropout_and_what_the_call_refuses():
    variables = tools.drawn(vit, SMALL, IMAGES)
    want = tools.run(vit, SMALL, variables, IMAGES)
    config = dataclasses.replace(SMALL, dropout=0.5)
    train = functools.partial(vit.Model(config).apply, deterministic=False)
    moved = tools.call(train, variables, IMAGES, rngs={"dropout": jax.random.key(1)})
    assert jnp.max(jnp.abs(moved - want)) > 0.01
    with pytest.raises(ValueError, match=r"\[16, 16, 1\].*reads \[8, 8, 1\]: resize"):
        vit.Model(SMALL).apply(variables, jnp.zeros((1, 16, 16, 1)))
    with pytest.raises(ValueError, match="head='pooled' is SigLIP's"):
        dataclasses.replace(SMALL, head="pooled")
    with pytest.raises(ValueError, match="patch=3 does not divide image=8"):
        dataclasses.replace(SMALL, patch=3)


REFUSED = {
    "num_attention_heads=5 does not divide": {"num_attention_heads": 5},
    "patch_size=15 does not divide image_size=224": {"patch_size": 15},
    "image_size=.224, 160.; it must be an int": {"image_size": [224, 160]},
    "hidden_act='mish' is not implemented": {"hidden_act": "mish"},
    "layer_scale=True": {"layer_scale": True},
    "MaskedImageModeling.*choose head='classification' or 'none'": {
        "architectures": ["ViTForMaskedImageModeling"]
    },
    "model_type='deit'": {"model_type": "deit"},
    "projector=2": {"model_type": "siglip", "projector": 2, "architectures": []},
}


@pytest.mark.filterwarnings("ignore:lorax reads only the vision tower")
@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_implemented_is_refused(message):
    with pytest.raises(ValueError, match=message):
        vit.Config.from_hf({"model_type": "vit"} | REFUSED[message])


@pytest.mark.parametrize("case", ["vit", "siglip pooled"])
def test_adapters_train(case):
    """Those on attention, on the convolution, and on the probe's attention."""
    config, labels = OTHERS[case], jnp.array([0, 2])
    model, params = vit.Model(config), tools.drawn(vit, OTHERS[case], IMAGES)

    def loss(params):
        logits = model.apply(params, IMAGES)
        xent = optax.softmax_cross_entropy_with_integer_labels
        return jnp.mean(xent(logits, labels))

    targets = [lorax.Target("(layers/[qkv]|patches|pool_qkv)/kernel", rank=2)]
    grads = tools.gradients(loss, params, targets)
    assert grads["patches/kernel"].a.shape == (4, 4, 1, 2)
    assert grads["layers/q/kernel"].b.shape == (2, 2, 2, 8)
