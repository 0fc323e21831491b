"""Corpus BLEU by sacrebleu, with the signature that says how it was computed.

References: Papineni et al., "BLEU: a method for automatic evaluation of machine
translation", ACL 2002; Post, "A call for clarity in reporting BLEU scores",
arXiv:1804.08771.
"""

from collections.abc import Sequence
from typing import NamedTuple

from experiments.data import extras
from experiments.tasks.scoring import words


class Bleu(NamedTuple):
    """A score and how it was computed."""

    score: float  # 0 .. 100
    signature: str  # report it with the score


def bleu(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenize: str = "13a",
    lowercase: bool = False,
) -> Bleu:
    """Returns corpus BLEU-4, with any number of references for each text.

    Args:
      hypotheses: one text for each group.
      references: groups of texts; groups may differ in size.
      tokenize: "13a" or "none", see `words.splitter`.
      lowercase: compare without case. The E2E scorer does; sacrebleu by default does
        not.

    Raises:
      ValueError: see `words.require_aligned`.
    """
    words.require_tokenize(tokenize)
    words.require_aligned(hypotheses, references)
    library = extras.require("sacrebleu", "experiments", "BLEU")
    # force: no warning about tokenised text if the caller said that it is tokenised
    metric = library.BLEU(
        tokenize=tokenize, lowercase=lowercase, force=tokenize == "none"
    )
    most = max(map(len, references))
    streams = [[g[i] if i < len(g) else None for g in references] for i in range(most)]
    score = metric.corpus_score(list(hypotheses), streams)
    return Bleu(float(score.score), str(metric.get_signature()))
