"""PEFT's part: the same checkpoint, adapters and tokens in transformers and torch.

It runs as Hugging Face's Trainer does with `bf16=True`: float32 adapters under
autocast, torch's fused attention and fused AdamW. Full fine-tuning trains the bfloat16
weights themselves; lorax keeps float32 master weights.
"""

import contextlib
import gc
import pathlib
import time
from collections.abc import Callable
from typing import Any

from experiments.benchmarks.gpu import ours
from experiments.benchmarks.gpu.sizes import Sizes
from experiments.benchmarks.rivals import torch_peft, trainers


def device() -> str:
    """Returns the device on which torch runs."""
    return "cuda" if torch_peft.sees_cuda() else "cpu"


def _model(directory: pathlib.Path, sizes: Sizes, adapters: str | None) -> Any:
    import peft
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, sizes.dtype), attn_implementation="sdpa"
    )
    model = model.to(device())
    if adapters is None:
        return model
    folder = directory / adapters
    config = peft.PeftConfig.from_pretrained(str(folder))
    if adapters == "adalora":
        settings = {"target_r": sizes.rank // 2, **torch_peft.ADALORA}
        for field, value in (
            settings | {"orth_reg_weight": torch_peft.PENALTY}
        ).items():
            setattr(config, field, value)
    made: Any = peft.PeftModel.from_pretrained(
        model, folder, is_trainable=True, config=config
    )
    return made.base_model  # a PeftModel without a task omits AdaLoRA's penalty


def make_trainer(
    sizes: Sizes, directory: pathlib.Path, method: str, compiled: bool
) -> ours.Trainer:
    """Builds the step of a method on the files that `ours` wrote.

    Args:
      sizes: of the benchmark.
      directory: of the checkpoint and the adapters.
      method: "lora", "dora", "adalora" or "full".
      compiled: whether to use `torch.compile`.
    """
    import torch

    began = time.perf_counter()
    model = _model(directory, sizes, None if method == "full" else method)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    tx = torch.optim.AdamW(
        trained, trainers.RATE, weight_decay=trainers.DECAY, fused=True
    )
    run_model = torch.compile(model) if compiled else model
    tokens = torch.from_numpy(sizes.draw()).long().to(device())
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    autocast: Any = contextlib.nullcontext()
    if sizes.dtype != "float32":
        autocast = torch.autocast(device(), getattr(torch, sizes.dtype))
    count = 0

    def step() -> Any:
        nonlocal count
        with autocast:
            loss = run_model(inputs, shift_labels=targets, labels=targets).loss
        loss.backward()
        tx.step()
        count += 1
        if method == "adalora":
            model.update_and_allocate(count)
        tx.zero_grad()
        return loss.detach()

    def steps(times: int) -> list[float]:
        return torch.stack([step() for _ in range(times)]).float().tolist()

    first = steps(1)  # compiles both passes
    facts = {"build_seconds": time.perf_counter() - began, "first_loss": first[0]}
    return ours.Trainer(steps, facts)


def peak_bytes() -> int:
    """Returns torch's peak GPU bytes since the last call, and frees its cache."""
    import torch

    if device() == "cpu":
        return 0
    torch.compiler.reset()  # compiled code keeps its model alive
    gc.collect()
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak


def decoder(sizes: Sizes, directory: pathlib.Path) -> Callable[[], Any]:
    """Returns greedy decoding by transformers' `generate`, with adapters merged."""
    import torch

    model = _model(directory, sizes, "lora").merge_and_unload().eval()
    prompts = torch.from_numpy(sizes.draw()[:, : sizes.prompt]).long().to(device())

    def run() -> Any:
        with torch.inference_mode():
            return model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=sizes.new,
                min_new_tokens=sizes.new,
                do_sample=False,
                pad_token_id=0,
            ).cpu()

    return run
