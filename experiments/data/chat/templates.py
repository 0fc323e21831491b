"""Turns chats into text and tokens with the template that comes with a checkpoint.

Training is on what the assistant writes: its text and the mark that ends its turn. If
the template has `{% generation %}` blocks, they mark it. Otherwise each turn is found
by rendering twice: the chat before the turn, with the generation prompt, must be a
prefix of the chat with the turn, and the rest is the turn.

A model that was never trained to end its turn never does. If a template writes nothing
after the assistant's words, the mark of the next message ends the turn and is trained
on; `turn_ends` finds it, and generation stops there:

    ends = templates.turn_ends(tokenizer, template)
    encoded = templates.encode_chats(tokenizer, template, chats, max_length, source)
    continuations.make_writer(..., end_ids=ends.ids, stop=ends.texts)
"""

import json
import os
import pathlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.data import examples, extras, tokenization
from experiments.data.chat import limits
from lorax import untrusted

Message = Mapping[str, Any]  # "role", "content" and what else the template knows


class ChatTemplateError(ValueError):
    """A template cannot be used, or does not fit a chat; the message names its file."""


class Rendered(NamedTuple):
    """A chat as text."""

    text: str
    generated: tuple[tokenization.Span, ...]  # of `{% generation %}` blocks


class Ends(NamedTuple):
    """What ends a turn of the assistant, in training and in generation.

    Attributes:
      ids: end tokens; generation stops at each of them.
      texts: a mark that is not a single token, such as ChatML's with a base model's
        tokenizer; generation stops at it as text.
      marks: the texts of both.
      closing: what comes between the assistant's words and the next message, up to and
        including the mark that ends the turn; it is added after the last turn. "" if
        the template ends turns itself.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    marks: tuple[str, ...]
    closing: str = ""


class ChatTemplate:
    """A chat template in a sandbox with limits."""

    def __init__(
        self,
        source: str,
        name: str,
        special_tokens: Mapping[str, str],
        seconds: float = 2.0,
        characters: int = 4_000_000,
    ) -> None:
        """Compiles a template.

        Args:
          source: the jinja2 template.
          name: where it comes from, for messages.
          special_tokens: what the template knows as `bos_token` and so on.
          seconds: time limit of one rendering.
          characters: limit of its output.

        Raises:
          ChatTemplateError: it is not a jinja2 template.
        """
        self._jinja2 = extras.require("jinja2", "interop", f"The chat template {name}")
        from experiments.data.chat import sandbox  # it needs jinja2

        self._limits = limits.Limits(seconds, characters)
        self.name = name
        self.special_tokens = dict(special_tokens)
        # Marks that no text can contain, by accident or on purpose.
        nonce = secrets.token_hex(8)
        self._begin, self._end = f"\x02{nonce}\x02", f"\x03{nonce}\x03"
        try:
            self._template = sandbox.compile_template(source, self._begin, self._end)
        except (self._jinja2.TemplateError, RecursionError) as e:
            line = getattr(e, "lineno", None)
            where = f"{name}:{line}" if line else name
            raise ChatTemplateError(f"{where}: not a chat template: {e}") from e

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> Rendered:
        """Renders a chat as text.

        Args:
          messages: in order.
          add_generation_prompt: end with what comes before the assistant's next turn.

        Raises:
          ChatTemplateError: the template raises, loops or writes too much.
        """
        plain = [{k: v for k, v in m.items() if v is not None} for m in messages]
        values = {
            **self.special_tokens,
            "messages": json.loads(json.dumps(plain)),  # plain data, and a copy
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with limits.limited(self._limits):
                marked = "".join(self._template.generate(values))
        except limits.LimitError as e:
            raise ChatTemplateError(
                f"{self.name}: the template was stopped: {e}"
            ) from e
        except RecursionError as e:
            raise ChatTemplateError(
                f"{self.name}: the template was stopped: it calls itself without end"
            ) from e
        except Exception as e:  # anything that a template's own code may raise
            raise ChatTemplateError(
                f"{self.name}: the template does not render this chat: "
                f"{type(e).__name__}: {e}"
            ) from e
        return self._unmarked(marked)

    def _unmarked(self, marked: str) -> Rendered:
        """Removes the marks of generation blocks, and records where they were."""
        text, spans = "", []
        first, *blocks = marked.split(self._begin)
        text += first
        for block in blocks:
            inside, _, after = block.partition(self._end)
            spans.append((len(text), len(text) + len(inside)))
            text += inside + after
        return Rendered(text, tuple(spans))


def load(
    directory: str | os.PathLike[str], tokenizer: tokenization.Tokenizer
) -> ChatTemplate:
    """Loads the chat template of a checkpoint directory or a GGUF file.

    It is `chat_template.jinja` or, if there is none, `chat_template` in
    `tokenizer_config.json`: a string, or the one named "default" in a list.

    Raises:
      ChatTemplateError: there is none.
      ValueError: a field of the file has the wrong type; names file and key.
    """
    folder = pathlib.Path(directory)
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if path.is_file():
        return ChatTemplate(
            path.read_text("utf-8"), str(path), tokenizer.special_tokens
        )
    found = tokenization.read_configs(folder)[config.name].get("chat_template")
    if isinstance(found, list):
        found = _default(found, f"{config}: chat_template")
    if not isinstance(found, str):
        raise ChatTemplateError(
            f"{folder} has no chat template: neither {path.name}, nor `chat_template` "
            f"in {config.name}. Base models have none: write one to {path}, or train "
            "on prompts and responses."
        )
    return ChatTemplate(found, f"{config}:chat_template", tokenizer.special_tokens)


def _default(templates: list[Any], where: str) -> str | None:
    """Returns the template named "default", or None."""
    named = {}
    for i, template in enumerate(templates):
        at = f"{where}[{i}]"
        name = untrusted.field(template, "name", untrusted.TEXT, at)
        named[name] = untrusted.field(template, "template", untrusted.TEXT, at)
    return named.get("default")


def assistant_spans(
    template: ChatTemplate, messages: Sequence[Message]
) -> tuple[str, tuple[tokenization.Span, ...]]:
    """Returns the chat's text, and the spans of it that the assistant writes.

    A span ends with the mark that ends the turn, if the template writes one; white
    space after it is not included.

    Raises:
      ChatTemplateError: the text before a turn depends on what follows, so that turns
        cannot be told apart.
    """
    whole = template.render(messages)
    if whole.generated:
        return whole.text, whole.generated
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:i], add_generation_prompt=True).text
        after = template.render(messages[: i + 1]).text
        if not (after.startswith(before) and whole.text.startswith(after.rstrip())):
            raise ChatTemplateError(
                f"{template.name}: the text up to message {i} changes with what "
                "follows it, so what the assistant writes cannot be told apart. Put "
                "{% generation %} and {% endgeneration %} around it in the template."
            )
        spans.append((len(before), len(after.rstrip())))
    return whole.text, tuple(spans)


PROBE = "Zephyr"
"""Content of the messages that `turn_ends` renders; no template writes it itself."""


def turn_ends(tokenizer: tokenization.Tokenizer, template: ChatTemplate) -> Ends:
    """Finds what ends a turn of the assistant, by rendering short chats.

    It is what the template writes after the assistant's words. If that is nothing, it
    is the mark that opens the next message, provided that it is a single token: the
    model then learns to write it, and generation stops there.

    Raises:
      ChatTemplateError: nothing ends a turn; says what to add to the template.
    """
    turn = [{"role": role, "content": PROBE} for role in ("user", "assistant")]
    text, spans = assistant_spans(template, turn)
    begin, end = spans[-1]
    mark = text[begin:end].rpartition(PROBE)[2].strip()
    if own := _longest(tokenizer, mark.endswith):
        marks = tuple(dict.fromkeys((own, _end_of_call(tokenizer, template) or own)))
        return Ends(tuple(tokenizer.marks[mark] for mark in marks), (), marks)
    if len(mark) > 1:  # one character, a quote or a full stop, is in any answer
        return Ends((), (mark,), (mark,))
    closing, found = "", {}
    for role in ("user", "tool", "system", "assistant"):
        try:
            longer = template.render([*turn, {"role": role, "content": PROBE}]).text
        except ChatTemplateError:
            continue  # a role that the template does not allow here
        behind = longer[end:] if longer.startswith(text[:end]) else ""
        opening = _longest(tokenizer, behind.lstrip().startswith)
        if opening:
            found[opening] = tokenizer.marks[opening]
            closing = closing or behind[: behind.index(opening) + len(opening)]
    if not found:
        raise _endless(tokenizer, template, "a turn of the assistant")
    return Ends(tuple(found.values()), (), tuple(found), closing)


def _end_of_call(tokenizer: tokenization.Tokenizer, template: ChatTemplate) -> str:
    """Returns the mark that ends a turn with a tool call, which may be its own."""
    call = {"type": "function", "function": {"name": PROBE, "arguments": {}}}
    answer = {"role": "assistant", "content": PROBE, "tool_calls": [call]}
    try:
        text, spans = assistant_spans(
            template, [{"role": "user", "content": PROBE}, answer]
        )
    except ChatTemplateError:  # a template without tools
        return ""
    begin, end = spans[-1]
    return _longest(tokenizer, text[begin:end].rstrip().endswith)


def _longest(tokenizer: tokenization.Tokenizer, stands: Callable[[str], bool]) -> str:
    """Returns the longest of the tokenizer's marks that fits; "" for none."""
    return max(filter(stands, filter(None, tokenizer.marks)), key=len, default="")


def _endless(
    tokenizer: tokenization.Tokenizer, template: ChatTemplate, turn: str
) -> ChatTemplateError:
    eos = tokenizer.special_tokens.get("eos_token")
    return ChatTemplateError(
        f"{template.name}: nothing ends {turn}: the template writes no mark after the "
        f"assistant's words, and no next message begins with a single token of "
        f"{tokenizer.name}. A model trained on it would never stop. Write "
        "{{ eos_token }}" + (f", here {eos!r}," if eos else "") + " after the content "
        "of the assistant's messages, inside {% generation %} if that is used."
    )


def closed_spans(
    tokenizer: tokenization.Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    ends: Ends,
) -> tuple[str, tuple[tokenization.Span, ...]]:
    """As `assistant_spans`, with each span up to its end mark; see `turn_ends`.

    Raises:
      ChatTemplateError: as `assistant_spans`, or nothing ends a turn.
    """
    text, spans = assistant_spans(template, messages)
    closed = []
    for number, (begin, end) in enumerate(spans, 1):
        behind = text[end:]
        mark = next(filter(behind.lstrip().startswith, ends.marks), "")
        if text[begin:end].rstrip().endswith(ends.marks):
            pass
        elif mark:
            end += behind.index(mark) + len(mark)
        elif ends.closing and not behind.strip():
            text = text[:end] + ends.closing
            end = len(text)
        else:
            raise _endless(tokenizer, template, f"turn {number} of the assistant")
        closed.append((begin, end))
    return text, tuple(closed)


def prompt_ids(
    tokenizer: tokenization.Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
) -> list[int]:
    """Returns the ids of a chat that the assistant is to continue."""
    return tokenizer.encode(template.render(messages, True).text)


def encode_chat(
    tokenizer: tokenization.Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    ends: Ends | None = None,
    after: int = 0,
) -> examples.Example:
    """Returns one example: a chat, with the assistant's turns and ends in the loss.

    The template writes BOS and EOS where it wants them; none is added.

    Args:
      tokenizer: of the model.
      template: of the chats.
      messages: in order.
      ends: from `turn_ends`; None calls it.
      after: the first `after` messages are not trained on, even the assistant's.

    Raises:
      ChatTemplateError: the template does not fit the chat, or a turn never ends.
    """
    ends = ends or turn_ends(tokenizer, template)
    text, spans = closed_spans(tokenizer, template, messages, ends)
    ids, places = tokenizer.encode_spans(text)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if len(turns) != len(spans):
        raise ChatTemplateError(
            f"{template.name}: the assistant has {len(turns)} turns, but the template "
            f"marks {len(spans)}; put {{% generation %}} around each turn once"
        )
    kept = [(i, span) for i, span in zip(turns, spans, strict=True) if i >= after]
    mask = _inside(places, [span for _, span in kept])
    written = "".join(messages[i]["content"] for i, _ in kept)
    return examples.make(ids, list(mask), written)


def encode_chats(
    tokenizer: tokenization.Tokenizer,
    template: ChatTemplate,
    chats: Iterable[Sequence[Message]],
    max_length: int,
    source: str,
) -> examples.Encoded:
    """Returns examples of chats; see `encode_chat` and `examples.truncate`."""
    ends = turn_ends(tokenizer, template)
    encoded = (encode_chat(tokenizer, template, chat, ends) for chat in chats)
    return examples.truncate(encoded, max_length, source)


def _inside(
    places: Iterable[tokenization.Span], spans: Iterable[tokenization.Span]
) -> Iterator[int]:
    """Yields 1 for tokens that begin in a span, else 0."""
    inside = {i for begin, end in spans for i in range(begin, end)}
    return (int(begin in inside and end > begin) for begin, end in places)
