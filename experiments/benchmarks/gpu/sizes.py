"""What runs on the GPU: the shapes of the model and a batch, and how often."""

import dataclasses
from typing import Any

import jax
import numpy as np

from lorax.models import llama


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmark; the defaults are those of the page.

    Attributes:
      model: fields of the checkpoint's config.json.
      batch: sequences per step.
      time: tokens per sequence.
      rank: of the adapters; alpha is twice that.
      blocks: timed blocks; the best and the spread of their means are reported.
      steps: steps per block; the device is waited for after each block.
      prompt: tokens of a prompt, in decoding.
      new: tokens to add.
      attention: as in `llama.Config`, unless a row chooses another.
      dtype: of frozen weights and activations.
    """

    model: dict[str, Any]
    batch: int = 8
    time: int = 2048
    rank: int = 16
    blocks: int = 4
    steps: int = 5
    prompt: int = 128
    new: int = 128
    attention: str = "flash"
    dtype: str = "bfloat16"

    @property
    def tokens(self) -> int:
        """The number of tokens in a step."""
        return self.batch * self.time

    def draw(self) -> np.ndarray:
        """Returns random tokens `[batch, time + 1]`, the same for every program."""
        high = self.model["vocab_size"]
        draw = np.random.default_rng(0)
        return draw.integers(0, high, (self.batch, self.time + 1), dtype=np.int32)


ONE_BILLION = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128_256,
}
"""The shape of Llama 3.2 1B; the weights are random."""

TOY = ONE_BILLION | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}

SIZES = {
    "1b": Sizes(ONE_BILLION),
    "toy": Sizes(
        TOY,
        batch=2,
        time=16,
        rank=4,
        blocks=2,
        steps=2,
        prompt=8,
        new=4,
        attention="plain",
        dtype="float32",
    ),
}

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s of the SXM cards, by part of their name; NVIDIA's figures."""


def peak() -> float | None:
    """Returns the peak of this device; None if it is not known."""
    kind = jax.devices()[0].device_kind
    return next((PEAKS[name] for name in PEAKS if name in kind), None)


def model_flops(sizes: Sizes, method: str) -> float:
    """Returns the operations that a step needs, whatever a program does.

    Each product counts two per weight and token in the forward pass, as many for the
    gradient of the activations and, in full fine-tuning, as many for that of the
    weights. Causal attention counts half of its scores, and twice that in the backward
    pass. Adapters, norms and recomputation are not counted.
    """
    config = llama.Config.from_hf(sizes.model)
    heads = config.heads + config.kv_heads
    block = config.width * (2 * heads * config.head_dim + 3 * config.hidden)
    products = config.layers * block + config.width * config.vocabulary
    mixing = 2 * sizes.time * config.heads * config.head_dim * config.layers
    passes = 3 if method == "full" else 2
    return sizes.tokens * (2 * passes * products + 3 * mixing)
