"""The same model in PyTorch with Hugging Face PEFT: a comparison from outside JAX."""

from __future__ import annotations

import importlib.util
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.cases import gpt2_shaped as gpt2
from experiments.benchmarks.cases import programs

ADALORA: dict[str, Any] = {"total_step": 1000, "tinit": 0, "tfinal": 100, "deltaT": 1}
"""AdaLoRA's settings by PEFT's names, in steps; the last is PEFT's default."""

PENALTY = 0.5
"""AdaLoRA's weight on orthogonality, PEFT's default."""

# lorax's field -> where PEFT has it
_FIELDS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "lora": {
        "a": lambda layer: layer.lora_A["default"].weight,
        "b": lambda layer: layer.lora_B["default"].weight,
    },
    "adalora": {
        "p": lambda layer: layer.lora_A["default"],
        "lam": lambda layer: layer.lora_E["default"],
        "q": lambda layer: layer.lora_B["default"],
    },
}
_FIELDS["dora"] = _FIELDS["lora"] | {
    "magnitude": lambda layer: layer.lora_magnitude_vector["default"].weight
}


class Adapted(NamedTuple):
    """A PEFT model and where lorax's trained leaves are in it."""

    model: Any
    trained: dict[tuple[str, str], Any]  # by lorax's path and field


def available() -> bool:
    """Whether torch and peft are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "peft"))


def sees_cuda() -> bool:
    """Whether torch has a GPU."""
    import torch

    return torch.cuda.is_available()


def pin(threads: int) -> None:
    """Limits torch to `threads` threads."""
    import torch

    torch.set_num_threads(threads)


def oriented(path: str, parameter: Any) -> Any:
    """Returns a torch tensor in lorax's orientation: kernels are transposed."""
    turned = path.endswith("/kernel") and parameter.ndim == 2
    return parameter.T if turned else parameter


def adapted(
    case: programs.Case, shape: gpt2.Shape, method: str, device: str = "cpu"
) -> Adapted:
    """Builds the model with the weights and factors of an unscanned case.

    Args:
      case: from `programs.adapted`; its dtype is the model's. PEFT keeps the adapters
        in float32.
      shape: its sizes.
      method: the case's.
      device: where to put the model.
    """
    import peft
    import torch

    model = _filled(shape, case.params).to(device)
    linears = list(gpt2.LINEARS)
    trained = {}
    if method in programs.WHOLE:
        for parameter, path in _paths(model, case.params):
            parameter.requires_grad_(path in case.trained)
            if path in case.trained:
                trained[path, "value"] = parameter
        return Adapted(model, trained)
    config: Any = peft.LoraConfig(
        r=shape.rank,
        lora_alpha=int(shape.alpha),
        target_modules=linears,
        use_dora=method == "dora",
    )
    if method == "adalora":
        config = peft.AdaLoraConfig(
            init_r=shape.rank,
            target_r=shape.rank // 2,
            lora_alpha=int(shape.alpha),
            target_modules=linears,
            orth_reg_weight=PENALTY,
            **ADALORA,
        )
    made: Any = peft.get_peft_model(model, config)
    with torch.no_grad():
        for path, adapter in case.trained.items():
            owner = path.removesuffix("/kernel").replace("h_", "h.").replace("/", ".")
            layer = made.get_submodule(f"base_model.model.{owner}")
            for field, get in _FIELDS[method].items():
                parameter, value = get(layer), getattr(adapter, field)
                parameter.copy_(_tensor(value.T).reshape(parameter.shape))
                trained[path, field] = parameter
    # what PeftModelForCausalLM calls; a PeftModel without a task omits the penalty
    return Adapted(made.base_model, trained)


def step(
    case: programs.Case, shape: gpt2.Shape, threads: int
) -> Callable[[], tuple[float, Any]]:
    """Returns LoRA's forward and backward pass.

    Args:
      case: from `programs.adapted`.
      shape: its sizes.
      threads: how many torch may use.

    Returns:
      A function that runs both and returns the loss and the gradients as
      `{path: (a, b)}`, in lorax's orientation.
    """
    import torch

    pin(threads)
    model, trained = adapted(case, shape, "lora")
    paths = {path for path, _ in trained}
    tokens = torch.from_numpy(np.array(case.tokens)).long()

    def run() -> tuple[float, dict[str, Any]]:
        model.zero_grad(set_to_none=True)
        loss = model(tokens).loss
        loss.backward()

        def grad(path: str, field: str) -> Any:
            return oriented(path, trained[path, field].grad)

        return loss.item(), {p: (grad(p, "a"), grad(p, "b")) for p in paths}

    return run


def _tensor(array: Any) -> Any:
    import torch

    return torch.from_numpy(np.array(array, np.float32))


def _paths(model: Any, params: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """Yields every parameter of the plain model with its path in Flax's tree."""
    for name, parameter in model.named_parameters():
        *owner, leaf = re.sub(r"^h\.", "h_", name).split(".")
        node: Any = params
        for part in owner:
            node = node[part]
        names = (leaf, "kernel", "scale", "embedding")
        yield parameter, "/".join([*owner, next(n for n in names if n in node)])


def _filled(shape: gpt2.Shape, params: Mapping[str, Any]) -> Any:
    """Returns a torch module with the parameters of an unscanned `gpt2_shaped.Gpt2`."""
    import torch

    model = _model(shape)
    with torch.no_grad():
        for parameter, path in _paths(model, params):
            value: Any = params
            for part in path.split("/"):
                value = value[part]
            parameter.copy_(_tensor(value.T if path.endswith("kernel") else value))
    return model.to(getattr(torch, str(params["head"]["kernel"].dtype)))


def _model(shape: gpt2.Shape) -> Any:
    """Returns the module, whose loss comes as PEFT expects it from transformers."""
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
            x = self.wte(tokens[:, :-1]) + self.wpe.weight
            for block in self.h:
                x = block(x)
            logits = self.head(self.ln_f(x)).float().flatten(0, 1)
            loss = functional.cross_entropy(logits, tokens[:, 1:].flatten())
            # AdaLoRA's penalty is added to `loss` in place
            return types.SimpleNamespace(loss=loss, task=loss.detach().clone())

    return Gpt2()
