"""Reads the fields of a Hugging Face config without silently ignoring any.

A field that changes the architecture but is not implemented is an error; so is an
unknown one, unless it switches nothing on, and one of the wrong type or out of range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from lorax import untrusted
from lorax.untrusted import Rule

# Fields that do not affect the forward pass without dropout.
HARMLESS = frozenset(
    """
    _attn_implementation _name_or_path add_cross_attention architectures
    attention_dropout attention_probs_dropout_prob attn_pdrop auto_map bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    dropout_rate early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing hidden_dropout_prob id2label
    initializer_factor initializer_range is_decoder is_encoder_decoder
    keys_to_ignore_at_inference label2id length_penalty max_length max_window_layers
    min_length model_type n_ctx name_or_path no_repeat_ngram_size num_beam_groups
    num_beams num_labels num_return_sequences output_attentions output_hidden_states
    output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache
    """.split()
)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
}

WINDOWED = {"full_attention": False, "sliding_attention": True}
"""Kinds of layers on disk; True: with a window."""

MOST_LAYERS = 10_000
"""Bounds the table of a model's tensors, which names those of every layer."""


def layer_types(windows: Sequence[int]) -> list[str]:
    """Returns the kinds of layers with these windows; 0: no window."""
    names = {local: name for name, local in WINDOWED.items()}
    return [names[bool(window)] for window in windows]


def label_names(labels: int) -> dict[str, Any]:
    """Returns the fields of a config.json that name this many classes."""
    return {
        "id2label": {str(i): f"LABEL_{i}" for i in range(labels)},
        "label2id": {f"LABEL_{i}": i for i in range(labels)},
    }


def require_divisor(**sizes: int) -> None:
    """Raises ValueError unless the first of two named sizes divides the second."""
    (part, count), (whole, size) = sizes.items()
    if size % count:
        raise ValueError(f"{part}={count} does not divide {whole}={size}")


class Fields:
    """The fields of one config.json; each is taken once."""

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        """Takes a config as read from JSON, and the name of the family for errors."""
        self.left = dict(config)
        self.family = family

    def take(self, name: str, rule: Rule, default: Any) -> Any:
        """Returns the field, or the default where it is absent or null."""
        value = self.left.pop(name, None)
        if value is None:
            return default
        return untrusted.check(f"config.json: {name}", value, rule)

    def integer(
        self,
        name: str,
        default: int | None,
        least: int = 1,
        most: int = untrusted.LARGEST,
    ) -> Any:
        """As `take`, for a whole number in a range."""
        return self.take(name, untrusted.whole(least, most), default)

    def layers(self, name: str, default: int) -> int:
        """As `take`, for the number of layers, each of which has tensors of its own."""
        return self.integer(name, default, most=MOST_LAYERS)

    def flag(self, name: str, default: bool) -> bool:
        """As `take`, for a switch."""
        return self.take(name, untrusted.FLAG, default)

    def epsilon(self, name: str, default: float) -> float:
        """As `take`, for the epsilon of a norm."""
        return self.take(name, untrusted.number(above=0, below=1), default)

    def cap(self, name: str, default: float | None) -> float | None:
        """As `take`, for a soft cap; null means no cap, even if the default is one."""
        off = self.left.get(name, default) is None
        return None if off else self.take(name, untrusted.number(above=0), default)

    def activation(self, name: str, default: str) -> str:
        """As `take`, for the name of a known activation."""
        value = self.take(name, untrusted.TEXT, default)
        if value not in ACTIVATIONS:
            raise ValueError(
                f"config.json: {name}={value!r} is not implemented; known are "
                f"{', '.join(sorted(ACTIVATIONS))}"
            )
        return value

    def head(self, switches: dict[str, Any], known: Mapping[str, Any]) -> Any:
        """Takes the head from the switches, or else the one that `architectures` names.

        Args:
          switches: as given to `Config.from_hf`; the head is removed. With `labels`,
            an encoder without a head gets a classification head.
          known: heads by the suffixes of those names; without a name, the head is
            "classification".
        """
        if "head" in switches:
            return switches.pop("head")
        named = self.take("architectures", untrusted.listed(untrusted.TEXT), [])
        for name in named:
            found = [head for end, head in known.items() if name.endswith(end)]
            if not found:
                choices = " or ".join(map(repr, dict.fromkeys(known.values())))
                raise ValueError(
                    f"config.json: architectures={named}: this head is not "
                    f"implemented; choose head={choices} to put another on the encoder"
                )
            bare = found[0] in ("none", "pooled")
            if bare and switches.get("labels"):  # labels need a head
                return "classification"
            if found[0] != "classification":
                return found[0]
        return "classification"

    def labels(self) -> int:
        """As `take`, for the number of classes, which has three names."""
        told = {n: self.integer(n, None) for n in ("num_labels", "_num_labels")}
        names = self.take("id2label", untrusted.mapping(untrusted.ANY, 1), None)
        told["id2label"] = None if names is None else len(names)
        told = {name: count for name, count in told.items() if count is not None}
        if len(set(told.values())) > 1:
            raise ValueError(
                f"config.json: the number of labels is given twice: {told}; keep one"
            )
        return next(iter(told.values()), 2)

    def windowed(self, depth: int) -> list[bool] | None:
        """As `take`, for which layers have a window; None if no field says so."""
        kinds = self.take("layer_types", untrusted.listed(untrusted.TEXT), None)
        if kinds is None:
            return None
        unknown = sorted(set(kinds) - set(WINDOWED))
        if unknown or len(kinds) != depth:
            raise ValueError(
                f"config.json: layer_types has {len(kinds)} entries for "
                f"num_hidden_layers={depth} and the unknown kinds {unknown}"
            )
        return [WINDOWED[kind] for kind in kinds]

    def divides(self, **sizes: int) -> None:
        """Raises unless the first of two named fields divides the second."""
        try:
            require_divisor(**sizes)
        except ValueError as error:
            raise ValueError(f"config.json: {error}") from None

    def expect(self, **values: Any) -> None:
        """Raises unless each field is absent, null, or has the value given here.

        If that value switches nothing on, any other that switches nothing on will do.
        """
        for name, value in values.items():
            given = self.left.pop(name, None)
            same = type(given) is type(value) and given == value
            off = untrusted.ZERO.fits(given) and untrusted.ZERO.fits(value)
            if given is not None and not same and not off:
                raise ValueError(
                    f"config.json: {name}={untrusted.shown(given)} is not implemented "
                    f"for {self.family}, only {value!r}"
                )

    def finish(self, *harmless: str) -> None:
        """Raises if a field that may change the architecture is left."""
        on = {k for k, v in self.left.items() if not untrusted.ZERO.fits(v)}
        unknown = sorted(on - HARMLESS - set(harmless))
        if unknown:
            shown = untrusted.shown
            told = ", ".join(f"{name}={shown(self.left[name])}" for name in unknown)
            raise ValueError(
                f"config.json of {self.family}: unknown fields, which may change the "
                f"architecture: {told}; remove those that you know to be harmless"
            )
