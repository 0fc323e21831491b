"""Examples of compared completions: `[sides, length]` for every prompt.

The two sides are the chosen and the rejected completion. For completions that are
judged alone, they are the prompt's own completion and another prompt's, by which KTO
estimates how far the policy has moved; such examples also have `desirable`.
"""

from collections.abc import Callable, Sequence

import numpy as np

from experiments.data import batches, examples, tokenization
from experiments.data.chat import templates
from experiments.data.examples import Example
from experiments.data.preferences import Row, Words

PLAIN = "{prompt}"
"""A template that leaves a prompt as it is."""


class Encoder:
    """Encodes prompts and completions as tokens: texts, and chats by their template."""

    def __init__(
        self,
        tokenizer: tokenization.Tokenizer,
        template: str,
        load: Callable[[], templates.ChatTemplate],
    ) -> None:
        """Reads no chat template yet.

        Args:
          tokenizer: of the model.
          template: what the model sees for a text prompt; holds `{prompt}`.
          load: loads the chat template, when the first chat needs it.

        Raises:
          ValueError: the template does not hold `{prompt}` once.
        """
        if template.count(PLAIN) != 1:
            raise ValueError(
                f"template={template!r}: expected it to hold {PLAIN!r} once"
            )
        self._tokenizer, self._text, self._load = tokenizer, template, load
        self._chat: tuple[templates.ChatTemplate, templates.Ends] | None = None

    def __call__(self, prompt: Words, completion: Words) -> Example:
        """Returns one example, with the loss on the completion and its end only.

        Raises:
          ValueError: a chat, although the template is for texts.
        """
        if isinstance(prompt, str) and isinstance(completion, str):
            text = self._text.replace(PLAIN, prompt)
            return examples.encode_pair(self._tokenizer, text, completion)
        if self._text != PLAIN:
            raise ValueError(
                f"template={self._text!r} is for text prompts, but these are chats, "
                f"which the checkpoint's own template renders; give {PLAIN!r}"
            )
        if self._chat is None:
            found = self._load()
            self._chat = found, templates.turn_ends(self._tokenizer, found)
        template, ends = self._chat
        return templates.encode_chat(
            self._tokenizer, template, [*prompt, *completion], ends, len(prompt)
        )


def pairs(
    encode: Encoder, rows: Sequence[Row], max_length: int, source: str
) -> examples.Encoded:
    """Returns examples of pairs, truncated as in `examples.truncate`."""
    made = (
        examples.together([encode(row.prompt, side) for side in row.completions])
        for row in rows
    )
    return examples.truncate(made, max_length, source)


def judged(
    encode: Encoder, rows: Sequence[Row], max_length: int, source: str, seed: int
) -> examples.Encoded:
    """Returns examples of rows judged alone, each with another row's completion.

    The other row is the one before it in a shuffle of all rows, because neighbours in a
    file may share a prompt. TRL takes the neighbour in the batch.

    Raises:
      ValueError: fewer than two rows, or a mix of texts and chats.
    """
    if len(rows) < 2:
        raise ValueError(f"{source}: a single row has no other to be compared with")
    order = np.random.default_rng(seed).permutation(len(rows))
    before = dict(zip(order, np.roll(order, 1), strict=True))

    def example(i: int) -> Example:
        prompt, (own,), desirable = rows[i]
        (other,) = rows[before[i]].completions
        if isinstance(prompt, str) != isinstance(other, str):
            raise ValueError(f"{source}: some rows are texts and some are chats")
        found = examples.together([encode(prompt, own), encode(prompt, other)])
        return {**found, "desirable": np.asarray(desirable, np.bool_)}

    return examples.truncate(map(example, range(len(rows))), max_length, source)


def collate(example: Example, length: int, pad_id: int) -> batches.Batch:
    """Returns a row of a batch, `[sides, length]`."""
    row = batches.next_token(example, length, pad_id)
    return row | {k: v for k, v in example.items() if k == "desirable"}
