"""Sizes and switches of ViT and SigLIP's tower, and their parameters on disk."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from lorax import untrusted
from lorax.models import hf_config, table

Family = Literal["vit", "siglip"]
Head = Literal["classification", "pooled", "none"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches; the defaults are ViT-base.

    Attributes:
      family: "vit": with a [CLS] token; "siglip": without. It also sets the names of
        tensors on disk.
      image: height and width of the images, in pixels; other sizes are refused, as the
        positions of patches are learnt.
      patch: height and width of a patch; it divides the image.
      channels: of the images.
      width: of the residual stream.
      layers: number of blocks.
      heads: number of attention heads; it divides the width.
      hidden: width of the MLP.
      activation: of the MLP, by its Hugging Face name.
      eps: of the layer norms.
      biased: queries, keys and values have biases.
      head: "classification", of [CLS] or of the mean; "pooled": SigLIP's attention from
        its probe; "none": hidden states, after the last norm.
      labels: number of classes.
      dropout: in training, rate on embeddings and on what blocks add.
      scan: layers are stacked on axis 0.
      remat: see `lorax.models.remat`.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    family: Family = "vit"
    image: int = 224
    patch: int = 16
    channels: int = 3
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    activation: str = "gelu"
    eps: float = 1e-12
    biased: bool = True
    head: Head = "classification"
    labels: int = 2
    dropout: float = 0.0
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        """Checks the sizes and the head."""
        hf_config.require_divisor(heads=self.heads, width=self.width)
        hf_config.require_divisor(patch=self.patch, image=self.image)
        if self.family == "vit" and self.head == "pooled":
            raise ValueError(
                "head='pooled' is SigLIP's; a ViT has 'classification' or 'none'"
            )

    @property
    def stacks(self) -> dict[str, int]:
        """Number of layers in every stack."""
        return {"layers": self.layers}

    @property
    def positions(self) -> int:
        """Patches, and [CLS] where there is one."""
        return (self.image // self.patch) ** 2 + (self.family == "vit")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **switches: Any) -> Config:
        """Reads a config.json; `switches` set head, dropout, scan, ...

        Without `head`, the name in `architectures` decides. Of a whole SigLIP, only the
        vision tower is read.
        """
        kind = config.get("model_type")
        if kind == "vit":
            return cls._read(hf_config.Fields(config, "vit"), "vit", switches)
        if kind == "siglip_vision_model":
            return cls._read(hf_config.Fields(config, kind), "siglip", switches)
        if kind != "siglip":
            raise ValueError(
                f"config.json: model_type={untrusted.shown(kind)}; this family reads "
                "'vit', 'siglip' and 'siglip_vision_model'"
            )
        outer = hf_config.Fields(config, "siglip")
        vision = dict(outer.take("vision_config", untrusted.TABLE, {}))
        own = {"architectures", "id2label", "num_labels", "_num_labels"}
        vision |= {name: config[name] for name in own & set(config)}
        if "SiglipForImageClassification" not in config.get("architectures", ()):
            warnings.warn(
                "lorax reads only the vision tower of this siglip checkpoint; its text "
                "tower is left unread",
                stacklevel=2,
            )
        outer.finish("text_config")
        return cls._read(hf_config.Fields(vision, "siglip"), "siglip", switches)

    @classmethod
    def _read(
        cls, fields: hf_config.Fields, family: Family, switches: dict[str, Any]
    ) -> Config:
        """Reads the fields of one tower."""
        vit = family == "vit"
        width = fields.integer("hidden_size", 768)
        heads = fields.integer("num_attention_heads", 12)
        fields.divides(num_attention_heads=heads, hidden_size=width)
        fields.expect(is_decoder=False, pruned_heads={}, head_dim=width // heads)
        image = fields.integer("image_size", 224)
        patch = fields.integer("patch_size", 16)
        fields.divides(patch_size=patch, image_size=image)
        pools = not vit and fields.flag("vision_use_head", True)
        head = fields.head(switches, _head_names(family, pools))
        own = cls(
            family=family,
            image=image,
            patch=patch,
            channels=fields.integer("num_channels", 3),
            width=width,
            layers=fields.layers("num_hidden_layers", 12),
            heads=heads,
            hidden=fields.integer("intermediate_size", 3072),
            activation=fields.activation(
                "hidden_act", "gelu" if vit else "gelu_pytorch_tanh"
            ),
            eps=fields.epsilon("layer_norm_eps", 1e-12 if vit else 1e-6),
            biased=fields.flag("qkv_bias", True) if vit else True,
            head=head,
            labels=switches.pop("labels", None) or fields.labels(),
            **switches,
        )
        # for the head that predicts masked patches, and for a pooler that is not read
        fields.finish("encoder_stride", "pooler_act", "pooler_output_size")
        return own

    def to_hf(self) -> dict[str, Any]:
        """Returns the fields of a config.json."""
        sizes = {
            "image_size": self.image,
            "patch_size": self.patch,
            "num_channels": self.channels,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.hidden,
            "hidden_act": self.activation,
            "layer_norm_eps": self.eps,
        }
        labels = hf_config.label_names(self.labels)
        classifies = self.head == "classification"
        if self.family == "vit":
            name = "ViTForImageClassification" if classifies else "ViTModel"
            told = {"architectures": [name], "model_type": "vit"}
            return {**told, **sizes, "qkv_bias": self.biased, **labels}
        kind = "siglip_vision_model"
        sizes |= {"vision_use_head": self.head == "pooled", "model_type": kind}
        if not classifies:
            return {"architectures": ["SiglipVisionModel"], **sizes, **labels}
        return {
            "architectures": ["SiglipForImageClassification"],
            "model_type": "siglip",
            "vision_config": sizes,
            **labels,
        }


def _head_names(family: Family, pools: bool) -> dict[str, Head]:
    """Suffixes of names in `architectures`, and the heads that they mean."""
    bare: Head = "pooled" if pools else "none"
    names = ["ViTModel"] if family == "vit" else ["VisionModel", "SiglipModel"]
    return {"ForImageClassification": "classification", **dict.fromkeys(names, bare)}


OLDER = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
}
"""Parts of a ViT's layer by their names on disk, and as modules of transformers 5."""

OLDER_MODULES = tuple(
    (f"encoder.layer.{{}}.{old}", f"layers.{{}}.{new}") for old, new in OLDER.items()
)
"""Modules of transformers 4, and what they are now; `{}` is a layer's number."""

ALIASES = (
    (r"(embeddings|encoder|layers|layernorm|pooler)\.", r"vit.\1."),
    *(
        (rf"vit\.encoder\.layer\.(\d+)\.{old}\.", rf"vit.layers.\1.{new}.")
        for old, new in OLDER.items()
    ),
)
"""Names on disk that modules do not have, as `(regex of a prefix, replacement)`."""

WRITTEN = tuple(
    (rf"(vit\.)?layers\.(\d+)\.{new}\.", rf"\1encoder.layer.\2.{old}.")
    for old, new in OLDER.items()
)
"""From names of modules to names on disk, which every version reads."""

HEADS = ("classifier_out/.*",)
"""Paths that a checkpoint may lack; `interop.hf.load` then draws them."""

IGNORED = (r"vit\.pooler\..*", r"vit\.embeddings\.mask_token", r"classifier\..*")
"""What this model may leave unread: a pooler that nothing reads, the token of masked
patches, and the head that was not chosen."""

SAME = (0, 1, 2)
AXES = (None, None, "embed")
_linear = functools.partial(table.linear, bias=True)


def within(config: Config) -> tuple[table.Entry, ...]:
    """Returns the table of parameters for a tower inside a model with a head."""
    whole = _vit_entries(config) if config.family == "vit" else _siglip_entries(config)
    if config.head == "classification":
        whole += _linear("classifier", "classifier_out", ("embed",), (None,))
    return tuple(whole)


def entries(config: Config) -> tuple[table.Entry, ...]:
    """Returns the table of parameters; a bare ViT's names have no family prefix."""
    bare = config.family == "vit" and config.head == "none"
    return table.bare(within(config), "vit") if bare else within(config)


FURTHER = (within,)
"""Other tables that a checkpoint may follow."""


def _vit_entries(config: Config) -> list[table.Entry]:
    heads, width, at = ("heads", "head_dim"), ("embed",), "vit.embeddings"
    projection = functools.partial(table.linear, bias=config.biased)
    block = [
        *table.layer_norm("layernorm_before", "norm_attn"),
        *projection("attention.q_proj", "q", width, heads),
        *projection("attention.k_proj", "k", width, heads),
        *projection("attention.v_proj", "v", width, heads),
        *_linear("attention.o_proj", "o", heads, width),
        *table.layer_norm("layernorm_after", "norm_mlp"),
        *_mlp(""),
    ]
    return [
        *table.convolution(f"{at}.patch_embeddings.projection", "patches"),
        table.Entry(f"{at}.cls_token", "cls", AXES, order=SAME),
        table.Entry(f"{at}.position_embeddings", "positions", AXES, order=SAME),
        *table.inside("vit.layers.{}", "layers{}", block),
        *table.layer_norm("vit.layernorm", "norm_out"),
    ]


def _siglip_entries(config: Config) -> list[table.Entry]:
    heads, width, at = ("heads", "head_dim"), ("embed",), "vision_model"
    block = [
        *table.layer_norm("layer_norm1", "norm_attn"),
        *(e for n in "qkv" for e in _linear(f"self_attn.{n}_proj", n, width, heads)),
        *_linear("self_attn.out_proj", "o", heads, width),
        *table.layer_norm("layer_norm2", "norm_mlp"),
        *_mlp(""),
    ]
    positions = f"{at}.embeddings.position_embedding.weight"
    whole = [
        *table.convolution(f"{at}.embeddings.patch_embedding", "patches"),
        table.Entry(positions, "positions", AXES, order=((0, 1), 2)),
        *table.inside(f"{at}.encoder.layers.{{}}", "layers{}", block),
        *table.layer_norm(f"{at}.post_layernorm", "norm_out"),
    ]
    if config.head == "pooled":
        head, qkv, out = f"{at}.head", "pool_qkv", (None, *heads)
        joined = f"{head}.attention.in_proj"
        whole += [
            table.Entry(f"{head}.probe", "probe", AXES, order=SAME),
            table.Entry(f"{joined}_weight", f"{qkv}/kernel", (*width, *out), True),
            table.Entry(f"{joined}_bias", f"{qkv}/bias", out, inputs=0),
            *_linear(f"{head}.attention.out_proj", "pool_o", heads, width),
            *table.layer_norm(f"{head}.layernorm", "norm_pool"),
            *(e._replace(key=f"{head}.{e.key}") for e in _mlp("pool_")),
        ]
    return whole


def _mlp(front: str) -> list[table.Entry]:
    """The two maps of an MLP, with `front` before their names here."""
    width, hidden = ("embed",), ("mlp",)
    return [
        *_linear("mlp.fc1", f"{front}up", width, hidden),
        *_linear("mlp.fc2", f"{front}down", hidden, width),
    ]
