"""The same step in PyTorch with Hugging Face PEFT: a yardstick from outside JAX."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmarks import gpt2_shaped as gpt2
from experiments.benchmarks.programs import Case


def available() -> bool:
    """True where torch and peft are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "peft"))


def step(
    case: Case, shape: gpt2.Shape, threads: int
) -> Callable[[], tuple[float, Any]]:
    """Builds the PEFT model with the weights and factors of an unscanned case.

    Args:
      case: from `programs.adapted`.
      shape: its sizes.
      threads: how many torch may use.

    Returns:
      A function that runs forward and backward and returns the loss and the gradients
      as `{path: (a, b)}`, in lorax's orientation.
    """
    import peft
    import torch

    torch.set_num_threads(threads)
    config = peft.LoraConfig(
        r=shape.rank,
        lora_alpha=int(shape.alpha),
        lora_dropout=0.0,
        target_modules=list(gpt2.LINEARS),
    )
    model: Any = peft.get_peft_model(_model(shape, case.params), config)
    layers = {}
    with torch.no_grad():
        for path, adapter in case.trained.items():
            owner = path.removesuffix("/kernel").replace("h_", "h.").replace("/", ".")
            layer = model.get_submodule(f"base_model.model.{owner}")
            pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            pair[0].copy_(torch.from_numpy(np.array(adapter.a.T)))
            pair[1].copy_(torch.from_numpy(np.array(adapter.b.T)))
            layers[path] = pair
    tokens = torch.from_numpy(np.array(case.tokens)).long()

    def run() -> tuple[float, dict[str, Any]]:
        model.zero_grad(set_to_none=True)
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, shape.vocabulary), tokens[:, 1:].reshape(-1)
        )
        loss.backward()
        return loss.item(), {p: (a.grad.T, b.grad.T) for p, (a, b) in layers.items()}

    return run


def _model(shape: gpt2.Shape, params: Any) -> Any:
    """A torch module with the parameters of an unscanned `gpt2_shaped.Gpt2`."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width, hidden = shape.width, shape.hidden
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
            self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

        def forward(self, x: Any) -> Any:
            split = (*x.shape[:-1], shape.heads, -1)
            h = self.ln_1(x)
            q, k, v = (
                f(h).view(split).transpose(1, 2) for f in (self.q, self.k, self.v)
            )
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(mixed.transpose(1, 2).reshape(x.shape))
            h = functional.gelu(self.up(self.ln_2(x)), approximate="tanh")
            return x + self.down(h)

    class Gpt2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(shape.vocabulary, shape.width)
            self.wpe = nn.Embedding(shape.time, shape.width)
            self.h = nn.ModuleList(Block() for _ in range(shape.layers))
            self.ln_f = nn.LayerNorm(shape.width)
            self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

        def forward(self, tokens: Any) -> Any:
            x = self.wte(tokens) + self.wpe.weight
            for block in self.h:
                x = block(x)
            return self.head(self.ln_f(x))

    model = Gpt2()
    with torch.no_grad():
        for name, value in model.named_parameters():
            *owner, leaf = name.replace("h.", "h_").split(".")
            node = params
            for part in owner:
                node = node[part]
            kernel = "kernel" in node and leaf == "weight"
            array = (
                node["kernel"].T
                if kernel
                else next(
                    node[key] for key in (leaf, "scale", "embedding") if key in node
                )
            )
            value.copy_(torch.from_numpy(np.array(array)))
    return model
