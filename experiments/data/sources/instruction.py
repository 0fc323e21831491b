"""Instructions as JSON lines: prompt and response, or chats.

The columns of a row tell its form:

- "messages": `{"messages": [{"role": .., "content": ..}, ..]}`, a chat;
- "prompt", "response";
- "instruction", "output" and perhaps "input": Alpaca's;
- "question", "answer": GSM8K's.

All of them can be read as chats, for a model with a chat template, and all but the
first as pairs, for a model without one.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.data.examples import Pair
from experiments.data.sources import records

Chat = list[dict[str, Any]]

ROLES = ("system", "user", "assistant", "tool")


class Chats(NamedTuple):
    """Chats in the order of the file."""

    chats: tuple[Chat, ...]
    malformed: tuple[str, ...]


class Pairs(NamedTuple):
    """Prompts and responses in the order of the file."""

    pairs: tuple[Pair, ...]
    malformed: tuple[str, ...]


def read_pairs(
    path: str | os.PathLike[str], template: str = "{prompt}\n", form: str | None = None
) -> Pairs:
    """Reads prompts and responses.

    Args:
      path: see `records.read`; JSON lines, or any table.
      template: what the model sees for a prompt; it must hold `{prompt}` once.
      form: the form of all rows; None to tell it from the columns of each.

    Raises:
      ValueError: no row is good, or the template does not hold `{prompt}` once. A row
        of no known form, or whose response is empty, is malformed.
    """
    if template.count("{prompt}") != 1:
        raise ValueError(
            f"template={template!r}: expected it to hold '{{prompt}}' once"
        )

    def use(row: records.Row) -> records.Row:
        prompt, response = _pair(row.values, form)
        prompt = template.replace("{prompt}", prompt)
        return records.Row(row.where, {"prompt": prompt, "response": response})

    found = records.read(path, use=use)
    pairs = (
        Pair(r.values["prompt"], r.values["response"], r.where) for r in found.rows
    )
    return Pairs(tuple(pairs), found.malformed)


def read_chats(
    path: str | os.PathLike[str], system: str | None = None, form: str | None = None
) -> Chats:
    """Reads chats; a pair becomes a chat of two messages.

    Args:
      path: see `records.read`.
      system: a system message for chats that do not begin with one.
      form: see `read_pairs`.

    Raises:
      ValueError: no row is good. A chat without an assistant message, or with a message
        that is not text, is malformed.
    """

    def use(row: records.Row) -> records.Row:
        if form == "messages" or (form is None and "messages" in row.values):
            messages = read_messages(row.values.get("messages"))
            if not any(message["role"] == "assistant" for message in messages):
                raise records.MalformedRow("no assistant message: nothing to train on")
        else:
            prompt, response = _pair(row.values, form)
            messages = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": response},
            ]
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return records.Row(row.where, {"messages": messages})

    found = records.read(path, use=use)
    return Chats(tuple(r.values["messages"] for r in found.rows), found.malformed)


def _alpaca(values: dict[str, Any]) -> tuple[Any, Any]:
    """Returns the instruction, with its input below if there is one, and the output."""
    parts = (values["instruction"], values.get("input"))
    if not all(isinstance(part, str | None) for part in parts):
        raise records.MalformedRow("'instruction' or 'input' is not text")
    return "\n\n".join(part for part in parts if part), values["output"]


# Name -> the columns that tell the form, and (prompt, response) of a row.
PAIRS: dict[
    str, tuple[tuple[str, str], Callable[[dict[str, Any]], tuple[Any, Any]]]
] = {
    "prompt": (("prompt", "response"), lambda v: (v["prompt"], v["response"])),
    "alpaca": (("instruction", "output"), _alpaca),
    "question": (("question", "answer"), lambda v: (v["question"], v["answer"])),
}


def _pair(values: dict[str, Any], form: str | None) -> tuple[str, str]:
    """Returns prompt and response of a row."""
    if form is not None and form not in PAIRS:
        raise ValueError(f"form={form!r}: choose from {sorted(PAIRS)}.")
    for name, (columns, take) in PAIRS.items():
        if form in (None, name) and all(column in values for column in columns):
            prompt, response = take(values)
            if not isinstance(prompt, str) or not isinstance(response, str):
                raise records.MalformedRow(
                    f"{columns} are {type(prompt).__name__} and "
                    f"{type(response).__name__}, expected two texts"
                )
            if not response.strip():
                raise records.MalformedRow(f"{columns[1]!r} is empty")
            return prompt, response
    known = [columns for columns, _ in PAIRS.values()]
    raise records.MalformedRow(f"columns {sorted(values)} match none of {known}")


def read_messages(found: Any, column: str = "messages") -> Chat:
    """Returns a chat, or raises MalformedRow if it is not one."""
    if not isinstance(found, list) or not found:
        raise records.MalformedRow(f"{column!r} is not a list of messages")
    for i, message in enumerate(found):
        at = f"{column}[{i}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise records.MalformedRow(
                f"{at}: expected an object with a role in {ROLES}"
            )
        content = message.get("content")
        written = message["role"] == "assistant"
        if not isinstance(content, str) or (written and not content.strip()):
            raise records.MalformedRow(f"{at}: 'content' is {content!r}, expected text")
    return found
