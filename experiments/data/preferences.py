"""Preferences as JSON lines, in the forms that TRL reads.

- `{"prompt": .., "chosen": .., "rejected": ..}`: two completions of a prompt;
- `{"prompt": .., "completion": .., "label": true}`: one, desirable or not.

The values are all texts, or all lists of messages `{"role": .., "content": ..}`. Two
chats may come without a prompt, or with only its text; the messages that they share at
the start are then the prompt.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.data.sources import instruction, records
from experiments.data.sources.instruction import Chat

Words = str | Chat
"""A text, or messages."""
SIDES = ("chosen", "rejected")
"""The columns of a pair of completions."""


class Row(NamedTuple):
    """Completions of one prompt.

    Attributes:
      prompt: what they complete.
      completions: chosen and rejected, or a single one.
      desirable: whether a single completion is desirable.
    """

    prompt: Words
    completions: tuple[Words, ...]
    desirable: bool | None = None


class Rows(NamedTuple):
    """Rows in the order of the file."""

    rows: tuple[Row, ...]
    malformed: tuple[str, ...]


def read_pairs(path: str | os.PathLike[str]) -> Rows:
    """Reads prompts with a chosen and a rejected completion.

    Args:
      path: see `records.read`; JSON lines, or any table.

    Raises:
      ValueError: no row is good. A row that mixes texts and messages, or whose
        completions are equal or empty, is malformed.
    """
    return _read(path, SIDES, _pair)


def read_judged(path: str | os.PathLike[str]) -> Rows:
    """Reads prompts with one completion and a label, true or false.

    Args:
      path: see `records.read`; JSON lines, or any table.

    Raises:
      ValueError: no row is good. A row that mixes texts and messages, or whose label is
        neither true nor false, is malformed.
    """
    return _read(path, ("prompt", "completion", "label"), _judged)


def _read(
    path: str | os.PathLike[str],
    columns: tuple[str, ...],
    make: Callable[[dict[str, Any]], Row],
) -> Rows:
    def use(row: records.Row) -> records.Row:
        return records.Row(row.where, {"": make(row.values)})

    found = records.read(path, columns=columns, use=use)
    return Rows(tuple(row.values[""] for row in found.rows), found.malformed)


def _pair(values: dict[str, Any]) -> Row:
    prompt, sides = values.get("prompt"), [values[name] for name in SIDES]
    if sides[0] == sides[1]:
        raise records.MalformedRow("'chosen' and 'rejected' are the same")
    if not isinstance(prompt, list) and all(isinstance(x, list) for x in sides):
        prompt, sides = _parted(prompt, *map(instruction.read_messages, sides, SIDES))
    made = [_completion(*x, prompt) for x in zip(sides, SIDES, strict=True)]
    return Row(_prompt(prompt), tuple(made))


def _parted(prompt: Any, chosen: Chat, rejected: Chat) -> tuple[Chat, list[Chat]]:
    """Returns the messages that two chats share at the start, and the rest of each."""
    places = range(min(len(chosen), len(rejected)))
    differ = (i for i in places if chosen[i] != rejected[i])
    opening = chosen[: next(differ, len(places))]
    while opening and opening[-1]["role"] == "assistant":
        opening.pop()  # an answer that both share belongs to the completions
    if not opening or prompt not in (None, *(m["content"] for m in opening)):
        raise records.MalformedRow(
            "'chosen' and 'rejected' are chats that do not begin with the same prompt; "
            "give 'prompt' as a list of messages"
        )
    return opening, [chosen[len(opening) :], rejected[len(opening) :]]


def _judged(values: dict[str, Any]) -> Row:
    prompt, label = values["prompt"], values["label"]
    if not isinstance(label, bool):
        raise records.MalformedRow(f"'label' is {label!r}; expected true or false")
    completion = _completion(values["completion"], "completion", prompt)
    return Row(_prompt(prompt), (completion,), label)


def _prompt(found: Any) -> Words:
    """Returns a prompt: a text, or messages that the assistant is to continue."""
    if isinstance(found, str):
        return found
    messages = instruction.read_messages(found, "prompt")
    if messages[-1]["role"] == "assistant":
        raise records.MalformedRow("'prompt' ends with an assistant message")
    return messages


def _completion(found: Any, column: str, prompt: Any) -> Words:
    """Returns a completion, of the same kind as its prompt."""
    if isinstance(prompt, str) and isinstance(found, str):
        if not found.strip():
            raise records.MalformedRow(f"{column!r} is empty")
        return found
    if not isinstance(prompt, list) or not isinstance(found, list):
        raise records.MalformedRow(
            f"'prompt' is {type(prompt).__name__} and {column!r} "
            f"{type(found).__name__}; expected two texts, or two lists of messages"
        )
    messages = instruction.read_messages(found, column)
    if messages[0]["role"] != "assistant":
        raise records.MalformedRow(
            f"{column!r} does not begin with an assistant message"
        )
    return messages
