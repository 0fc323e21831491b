"""Token sequences with a loss mask: a prompt, and a response with EOS to train on.

An example is a dict of numpy arrays:

    tokens:    int32 [length]    BOS (if the tokenizer opens with one), text, EOS
    loss_mask: float32 [length]  1 where the token is to be predicted
    bytes:     int32 []          UTF-8 bytes of the text trained on, without EOS

Sequences that are compared form one example, `[sides, length]`; see `together`.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from experiments.data import tokenization

Example = dict[str, np.ndarray]


class Pair(NamedTuple):
    """A prompt and the text that should follow it."""

    prompt: str
    response: str
    where: str = ""  # "file:line"


class Encoded(NamedTuple):
    """The examples that can be trained on, and how many were truncated or dropped."""

    examples: list[Example]
    truncated: int = 0  # lost the end of their response, and EOS; still in `examples`
    dropped: int = 0  # lost all of their response: nothing left to train on


def prompt_ids(tokenizer: tokenization.Tokenizer, prompt: str) -> list[int]:
    """Returns a prompt's ids, for training and generation: BOS once, then the text."""
    ids = tokenizer.encode(prompt)
    if tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id]:
        return ids
    return [tokenizer.bos_id, *ids]


def encode_pair(
    tokenizer: tokenization.Tokenizer, prompt: str, response: str
) -> Example:
    """Returns one example, with the loss on the response and EOS only.

    The two are tokenised separately and joined, so that a prompt has the same tokens in
    generation, where no response follows. EOS is there once, whether or not the
    response already ends with its text.

    Raises:
      ValueError: the tokenizer has no EOS, without which the model never learns to
        stop.

    Example:
      >>> example = encode_pair(tokenization.ByteTokenizer(), "a", "bc")
      >>> example["tokens"].tolist(), example["loss_mask"].astype(int).tolist()
      ([256, 97, 98, 99, 257], [0, 0, 1, 1, 1])
    """
    if tokenizer.eos_id is None:
        raise ValueError(
            f"{tokenizer.name} has no EOS token, so no response would ever end: set "
            "`eos_token` in tokenizer_config.json."
        )
    opened = prompt_ids(tokenizer, prompt)
    closed = tokenizer.encode(response)
    if closed[-1:] != [tokenizer.eos_id]:
        closed = [*closed, tokenizer.eos_id]
    return make(opened + closed, [0] * len(opened) + [1] * len(closed), response)


def encode_pairs(
    tokenizer: tokenization.Tokenizer,
    pairs: Iterable[Pair],
    max_length: int,
    source: str,
) -> Encoded:
    """Returns examples of prompts and responses; see `encode_pair` and `truncate`."""
    encoded = (encode_pair(tokenizer, pair.prompt, pair.response) for pair in pairs)
    return truncate(encoded, max_length, source)


def truncate(examples: Iterable[Example], max_length: int, source: str) -> Encoded:
    """Truncates examples at the end, and drops those with nothing left to train on.

    Args:
      examples: complete ones.
      max_length: positions of the model. An example keeps one token more, because the
        last is only a target.
      source: names the data in the warning.

    Returns:
      The examples and two counts. If any were dropped, a warning says how many. The
      `bytes` of a truncated example are scaled to its share of trained tokens.

    Raises:
      ValueError: all examples are dropped.
    """
    kept: list[Example] = []
    truncated = dropped = 0
    for example in examples:
        cut = _cut(example, max_length + 1)
        # the first token is not a target: nothing comes before it
        if not cut["loss_mask"][..., 1:].any(-1).all():
            dropped += 1
            continue
        truncated += cut["tokens"].shape[-1] < example["tokens"].shape[-1]
        kept.append(cut)
    if not kept:
        raise ValueError(
            f"{source}: none of {dropped} examples has a response within "
            f"max_length={max_length}: raise it, or shorten the prompts."
        )
    if dropped:
        warnings.warn(
            f"{source}: dropped {dropped} of {dropped + len(kept)} examples, whose "
            f"response starts beyond max_length={max_length}"
            + (f"; {truncated} more lost the end of it." if truncated else "."),
            stacklevel=2,
        )
    return Encoded(kept, truncated, dropped)


def make(tokens: Sequence[int], loss_mask: Sequence[int], text: str) -> Example:
    """Makes an example from lists; `text` is what is trained on, for `bytes`."""
    return {
        "tokens": np.asarray(tokens, np.int32),
        "loss_mask": np.asarray(loss_mask, np.float32),
        "bytes": np.asarray(len(text.encode()), np.int32),
    }


def together(sides: Sequence[Example]) -> Example:
    """Stacks several examples into one, padded to the longest, outside of the loss."""
    longest = max(len(side["tokens"]) for side in sides)

    def filled(name: str) -> np.ndarray:
        found = [side[name] for side in sides]
        return np.stack([np.pad(x, (0, longest - len(x))) for x in found])

    return {
        "tokens": filled("tokens"),
        "loss_mask": filled("loss_mask"),
        "bytes": np.stack([side["bytes"] for side in sides]),
    }


def trained_text(tokenizer: tokenization.Tokenizer, example: Example) -> Iterator[str]:
    """Yields the decoded runs of tokens that an example trains on."""
    mask = np.concatenate([[0], example["loss_mask"] > 0, [0]])
    edges = np.flatnonzero(np.diff(mask))
    for begin, end in edges.reshape(-1, 2):
        yield tokenizer.decode(example["tokens"][begin:end].tolist())


def _cut(example: Example, length: int) -> Example:
    """Returns an example's first `length` tokens."""
    mask = example["loss_mask"]
    if mask.shape[-1] <= length:
        return example
    share = mask[..., :length].sum(-1) / np.maximum(mask.sum(-1), 1)
    return {
        **example,
        "tokens": example["tokens"][..., :length],
        "loss_mask": mask[..., :length],
        "bytes": np.round(example["bytes"] * share).astype(np.int32),
    }
