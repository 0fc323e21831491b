"""Preferences as rows of JSON lines, in the forms that TRL reads.

- `{"prompt": .., "chosen": .., "rejected": ..}`: two completions of a prompt;
- `{"prompt": .., "completion": .., "label": true}`: one, desirable or not.

All of them are texts, or all are lists of messages `{"role": .., "content": ..}`. Two
chats may lack a prompt, or have its text alone beside them: what they open with alike
is the prompt then.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.data.sources import instruction, records
from experiments.data.sources.instruction import Chat

Words = str | Chat
"""A text, or messages."""
SIDES = ("chosen", "rejected")
"""Columns of two completions."""


class Row(NamedTuple):
    """Completions of one prompt.

    Attributes:
      prompt: what they complete.
      completions: chosen and rejected; or one alone.
      desirable: of one alone, whether it is.
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
      ValueError: no row is good. One that mixes texts and messages, whose completions
        are the same, or one of which is empty, is malformed.
    """
    return _read(path, SIDES, _pair)


def read_judged(path: str | os.PathLike[str]) -> Rows:
    """Reads prompts with one completion and a label, true or false.

    Args:
      path: see `records.read`; JSON lines, or any table.

    Raises:
      ValueError: no row is good. One that mixes texts and messages, or whose label is
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
    """What two chats open with alike, and how each of them goes on."""
    places = range(min(len(chosen), len(rejected)))
    differ = (i for i in places if chosen[i] != rejected[i])
    opening = chosen[: next(differ, len(places))]
    while opening and opening[-1]["role"] == "assistant":
        opening.pop()  # where an answer is the same and what follows it differs
    if not opening or prompt not in (None, *(m["content"] for m in opening)):
        raise records.MalformedRow(
            "'chosen' and 'rejected' are chats that do not open with one prompt; give "
            "'prompt' as a list of messages"
        )
    return opening, [chosen[len(opening) :], rejected[len(opening) :]]


def _judged(values: dict[str, Any]) -> Row:
    prompt, label = values["prompt"], values["label"]
    if not isinstance(label, bool):
        raise records.MalformedRow(f"'label' is {label!r}; expected true or false")
    completion = _completion(values["completion"], "completion", prompt)
    return Row(_prompt(prompt), (completion,), label)


def _prompt(found: Any) -> Words:
    """A text, or messages that the assistant is to go on with."""
    if isinstance(found, str):
        return found
    messages = instruction.read_messages(found, "prompt")
    if messages[-1]["role"] == "assistant":
        raise records.MalformedRow("'prompt' ends with a message of the assistant")
    return messages


def _completion(found: Any, column: str, prompt: Any) -> Words:
    """What completes a prompt, of its kind."""
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
            f"{column!r} does not begin with a message of the assistant"
        )
    return messages
