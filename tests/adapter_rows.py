"""One row per variant of each adapter class: the table for `test_protocols`."""

import functools

import jax
import jax.numpy as jnp

import lorax
from tests.plugin import methods

BATCH, IN, OUT = 3, 6, 5


def matrix(params, x):
    return jnp.tanh(x @ params["w"] + params["bias"])


def layers(params, x):
    step = lambda x, w: (jnp.tanh(x @ w), x.sum())
    return jax.lax.scan(step, x, params["w"])[0] + params["bias"]


def heads(params, x):
    return jnp.tanh(jnp.einsum("bi,hid->bhd", x, params["w"]) + params["bias"])


def fused(params, x):
    return jnp.tanh(jnp.einsum("bi,ihd->bhd", x, params["w"]) + params["bias"])


def joined(params, x):
    return jnp.tanh(
        jnp.einsum("bij,ijo->bo", x.reshape(-1, 2, 3), params["w"]) + params["bias"]
    )


def image(params, x):
    x = jnp.stack([x, -x, 2 * x, x**2], axis=-1)
    y = jax.lax.conv_general_dilated(
        x, params["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    return jnp.tanh(y + params["bias"])


LORA = functools.partial(lorax.Target, "w", rank=2, alpha=3)
LOHA = functools.partial(LORA, adapter="loha")
VERA = functools.partial(LORA, adapter="vera", options={"d_initial": 0.5})
LORA_XS = functools.partial(LORA, adapter="lora_xs")
MISS = functools.partial(LORA, adapter="miss")
DELORA = functools.partial(LORA, adapter="delora")
RANDLORA = functools.partial(LORA, adapter="randlora")
DORA = functools.partial(LORA, adapter="dora")
ADALORA = functools.partial(LORA, adapter="adalora")
OFT = functools.partial(LORA, adapter="oft", options={"block_size": 3})
IA3 = functools.partial(LORA, adapter="ia3")
LOKR = functools.partial(LORA, adapter="lokr")
HRA = functools.partial(LORA, adapter="hra")
WALSH = functools.partial(lorax.Target, "w", adapter=methods.Walsh, alpha=3)
FULL = functools.partial(lorax.Target, "w|bias", adapter="full")
# (name, program, shape of w, size of the bias, target)
ADAPTERS = [
    ("lora", matrix, (IN, OUT), OUT, LORA()),
    ("lora_rank_stabilized", matrix, (IN, OUT), OUT, LORA(scaling="rank_stabilized")),
    ("lora_full_rank", matrix, (IN, OUT), OUT, LORA(rank=5)),
    ("lora_stacked", layers, (3, IN, IN), IN, LORA()),
    ("lora_layer_subset", layers, (3, IN, IN), IN, LORA(layers=(0, 2))),
    ("lora_three_axes", heads, (2, IN, 4), 4, LORA()),
    ("lora_slices", fused, (IN, 3, 4), 4, LORA(slices=(0, 2))),
    ("lora_conv", image, (3, 4, OUT), OUT, LORA()),
    ("loha_layer_subset", layers, (3, IN, IN), IN, LOHA(layers=(0, 2))),
    ("loha_three_axes", heads, (2, IN, 5), 5, LOHA()),
    ("vera_layer_subset", layers, (3, IN, IN), IN, VERA(layers=(0, 2))),
    ("vera_three_axes", heads, (2, IN, 4), 4, VERA(rank=7)),
    ("lora_xs_layer_subset", layers, (3, IN, IN), IN, LORA_XS(layers=(0, 2))),
    ("lora_xs_conv", image, (3, 4, OUT), OUT, LORA_XS()),
    ("miss_layer_subset", layers, (3, IN, IN), IN, MISS(layers=(0, 2))),
    ("miss_several_inputs", joined, (2, 3, OUT), OUT, MISS(rank=4)),
    ("delora_layer_subset", layers, (3, IN, IN), IN, DELORA(layers=(0, 2))),
    ("delora_three_axes", heads, (2, IN, 4), 4, DELORA()),
    ("randlora_layer_subset", layers, (3, IN, IN), IN, RANDLORA(layers=(0, 2))),
    ("randlora_three_axes", heads, (2, IN, 4), 4, RANDLORA()),
    ("dora", matrix, (IN, OUT), OUT, DORA()),
    (
        "dora_whole_gradient",
        matrix,
        (IN, OUT),
        OUT,
        DORA(options={"detach_norm": False}),
    ),
    ("dora_stacked", layers, (3, IN, IN), IN, DORA()),
    ("dora_layer_subset", layers, (3, IN, IN), IN, DORA(layers=(0, 2))),
    ("dora_three_axes", heads, (2, IN, 4), 4, DORA()),
    ("dora_conv", image, (3, 4, OUT), OUT, DORA()),
    ("adalora", matrix, (IN, OUT), OUT, ADALORA()),
    ("adalora_stacked", layers, (3, IN, IN), IN, ADALORA()),
    ("adalora_three_axes", heads, (2, IN, 4), 4, ADALORA()),
    ("adalora_conv", image, (3, 4, OUT), OUT, ADALORA()),
    (
        "oft_exact_and_constrained",
        matrix,
        (IN, OUT),
        OUT,
        OFT(options={"block_size": 3, "cayley_terms": None, "coft": True, "eps": 0.4}),
    ),
    (
        "oft_layer_subset",
        layers,
        (3, IN, IN),
        IN,
        OFT(layers=(0, 2), options={"block_size": 2, "block_share": True}),
    ),
    ("oft_several_inputs", joined, (2, 3, OUT), OUT, OFT()),
    ("ia3_conv", image, (3, 4, OUT), OUT, IA3()),
    ("ia3_layer_subset", layers, (3, IN, IN), IN, IA3(layers=(0, 2))),
    (
        "ia3_feedforward",
        joined,
        (2, 3, OUT),
        OUT,
        IA3(options={"feedforward": True}),
    ),
    ("lokr", heads, (2, IN, 4), 4, LOKR()),
    (
        "lokr_thin_layer_subset",
        layers,
        (3, IN, IN),
        IN,
        LOKR(rank=1, layers=(0, 2), options={"decompose_both": True, "factor": 3}),
    ),
    ("hra", joined, (2, 3, OUT), OUT, HRA(rank=4)),
    ("hra_layer_subset", layers, (3, IN, IN), IN, HRA(layers=(0, 2))),
    (
        "rows_of_a_head",
        matrix,
        (IN, OUT),
        OUT,
        lorax.Target("w", adapter="rows", rows=(1, 4)),
    ),
    ("full", matrix, (IN, OUT), OUT, FULL()),
    ("full_stacked", layers, (3, IN, IN), IN, FULL()),
    # from a package of its own, tests/plugin
    ("walsh", matrix, (IN, OUT), OUT, WALSH()),
    ("walsh_stacked", layers, (3, IN, IN), IN, WALSH()),
    ("walsh_layer_subset", layers, (3, IN, IN), IN, WALSH(layers=(0, 2))),
    ("walsh_three_axes", heads, (2, IN, 4), 4, WALSH()),
]
