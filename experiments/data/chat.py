"""Chats to text and tokens by the template that comes with a checkpoint.

What is trained on is what the assistant writes: its text and the mark that ends its
turn. Where the template has `{% generation %}` blocks, they say what that is. Elsewhere
it is found by rendering twice a turn: the chat before it, with the prompt for the
assistant to go on, must be a prefix of the chat with it, and the rest is the turn.
"""

import json
import os
import pathlib
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.data import chat_limits, examples, extras, tokenization

Message = Mapping[str, Any]  # "role", "content" and what else the template knows


class ChatTemplateError(ValueError):
    """A template that cannot be used, or does not fit a chat; names its file."""


class Rendered(NamedTuple):
    """A chat as text."""

    text: str
    generated: tuple[tokenization.Span, ...]  # of `{% generation %}` blocks


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
          seconds: that one rendering may take.
          characters: that it may write.

        Raises:
          ChatTemplateError: if it is no jinja2 template.
        """
        self._jinja2 = extras.require("jinja2", "interop", f"The chat template {name}")
        from experiments.data import chat_sandbox  # it needs jinja2 to be there

        self._limits = chat_limits.Limits(seconds, characters)
        self.name = name
        self.special_tokens = dict(special_tokens)
        # Marks that no text holds by accident, nor by design of whoever wrote it.
        nonce = secrets.token_hex(8)
        self._begin, self._end = f"\x02{nonce}\x02", f"\x03{nonce}\x03"
        try:
            self._template = chat_sandbox.compile_template(
                source, self._begin, self._end
            )
        except (self._jinja2.TemplateError, RecursionError) as e:
            line = getattr(e, "lineno", None)
            where = f"{name}:{line}" if line else name
            raise ChatTemplateError(f"{where}: not a chat template: {e}") from e

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> Rendered:
        """The chat as text.

        Args:
          messages: in order.
          add_generation_prompt: end with what comes before the assistant's next turn.

        Raises:
          ChatTemplateError: if the template raises, loops or writes too much.
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
            with chat_limits.limited(self._limits):
                marked = "".join(self._template.generate(values))
        except chat_limits.LimitError as e:
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
        """Takes the marks of generation blocks out, and notes where they were."""
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
    """The chat template of a checkpoint directory.

    It is `chat_template.jinja` or, where there is none, `chat_template` in
    `tokenizer_config.json`: a string, or a list of named ones, of which "default".

    Raises:
      ChatTemplateError: if there is none.
    """
    folder = pathlib.Path(directory)
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if path.is_file():
        return ChatTemplate(
            path.read_text("utf-8"), str(path), tokenizer.special_tokens
        )
    found = None
    if config.is_file():
        found = json.loads(config.read_text("utf-8")).get("chat_template")
    if isinstance(found, list):
        found = {t.get("name"): t.get("template") for t in found}.get("default")
    if not isinstance(found, str):
        raise ChatTemplateError(
            f"{folder} has no chat template: neither {path.name}, nor `chat_template` "
            f"in {config.name}. Base models have none: write one to {path}, or train "
            "on prompt and response."
        )
    return ChatTemplate(found, f"{config}:chat_template", tokenizer.special_tokens)


def assistant_spans(
    template: ChatTemplate, messages: Sequence[Message]
) -> tuple[str, tuple[tokenization.Span, ...]]:
    """The chat's text, and the characters of it that the assistant writes.

    A span ends with the mark that ends the turn; white space behind that is not in it.

    Raises:
      ChatTemplateError: if the template changes what stands before a turn depending on
        what follows, so that turns cannot be told apart.
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


def prompt_ids(
    tokenizer: tokenization.Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
) -> list[int]:
    """Ids of a chat that the assistant is to go on with."""
    return tokenizer.encode(template.render(messages, True).text)


def encode_chat(
    tokenizer: tokenization.Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
) -> examples.Example:
    """One example: the whole chat, the assistant's turns in the loss.

    The template writes BOS and EOS where it wants them; none is added.
    """
    text, spans = assistant_spans(template, messages)
    ids, places = tokenizer.encode_spans(text)
    written = (m["content"] for m in messages if m["role"] == "assistant")
    return examples.make(ids, list(_inside(places, spans)), "".join(written))


def encode_chats(
    tokenizer: tokenization.Tokenizer,
    template: ChatTemplate,
    chats: Iterable[Sequence[Message]],
    max_length: int,
    source: str,
) -> examples.Encoded:
    """Examples of chats, see `encode_chat` and `examples.truncate`."""
    encoded = (encode_chat(tokenizer, template, chat) for chat in chats)
    return examples.truncate(encoded, max_length, source)


def _inside(
    places: Iterable[tokenization.Span], spans: Iterable[tokenization.Span]
) -> Iterator[int]:
    """1 for tokens that begin in a span."""
    inside = {i for begin, end in spans for i in range(begin, end)}
    return (int(begin in inside and end > begin) for begin, end in places)
