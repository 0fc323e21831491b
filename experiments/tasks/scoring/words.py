"""Splits texts into words, and has the checks that all text scores share."""

import functools
from collections.abc import Callable, Sequence

from experiments.data import extras

TOKENIZERS = ("13a", "none")


def splitter(tokenize: str) -> Callable[[str], list[str]]:
    """Returns `split(text)`, which lower-cases, as mteval does by default.

    Args:
      tokenize: "13a", mteval-v13a's rules (sacrebleu's own code), for text as people
        write it; "none" splits at spaces, for text that is already tokenised, such as
        the E2E files of the LoRA paper.
    """
    require_tokenize(tokenize)
    if tokenize == "none":
        return lambda text: text.lower().split()
    rules = _rules_13a()
    return lambda text: str(rules(text)).lower().split()


def require_tokenize(tokenize: str) -> None:
    """Raises ValueError if `tokenize` is not one of `TOKENIZERS`."""
    if tokenize not in TOKENIZERS:
        raise ValueError(
            f"tokenize={tokenize!r}: choose '13a' for text as people write it, or "
            "'none' for text that is already tokenised."
        )


def require_aligned(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> None:
    """Checks that every hypothesis has references.

    Raises:
      ValueError: there are no hypotheses, the numbers differ, or a group of references
        is empty or holds an empty text.
    """
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(
            f"{len(hypotheses)} hypotheses and {len(references)} groups of references: "
            "give one hypothesis for each group, and at least one."
        )
    for i, group in enumerate(references):
        if isinstance(group, str) or not group or not all(r.strip() for r in group):
            raise ValueError(
                f"references[{i}] is {group!r}: expected a list of one or more texts, "
                "none of them empty."
            )


@functools.cache
def _rules_13a() -> Callable[[str], str]:
    """Returns the tokeniser, cached because it caches the lines it has seen."""
    module = "sacrebleu.tokenizers.tokenizer_13a"
    rules: Callable[[str], str] = extras.require(
        module, "experiments", "Splitting text by mteval's rules"
    ).Tokenizer13a()
    return rules
