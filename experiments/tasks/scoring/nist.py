r"""NIST, as mteval-v13a and the E2E challenge's scorer define it.

    NIST = penalty * sum_n  sum_{matched n-grams w} info(w) / (n-grams in hypotheses)

    info(w_1 .. w_n) = log2( count(w_1 .. w_{n-1}) / count(w_1 .. w_n) )

with counts over all references of the corpus (for n = 1 the numerator is their number
of words), matches clipped by the largest count in one reference of the segment, and

    penalty = exp(-beta * log(ratio)^2),  ratio = min(1, L_sys / L_ref)

where L_ref sums each segment's *mean* reference length, and beta makes the penalty 1/2
at a ratio of 2/3. Case is ignored.

One difference: a hypothesis shorter than n has 0 n-grams here; the E2E scorer's Python
port counts it as a negative number, which only matters for texts of under five words.

References: Doddington, "Automatic evaluation of machine translation quality using
n-gram co-occurrence statistics", HLT 2002; Dusek et al., "Evaluating the
state-of-the-art of end-to-end natural language generation", arXiv:1901.07931.
"""

import collections
import math
from collections.abc import Iterable, Sequence

from experiments.tasks.scoring import words

BETA = math.log(2) / math.log(1.5) ** 2  # exp(-BETA * log(2/3)^2) = 1/2

Gram = tuple[str, ...]
Counts = collections.Counter[Gram]


def nist(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenize: str = "13a",
    order: int = 5,
) -> float:
    """Returns corpus NIST, with any number of references for each text.

    Args:
      hypotheses: one text for each group.
      references: groups of texts.
      tokenize: "13a" or "none", see `words.splitter`.
      order: longest n-gram.

    Raises:
      ValueError: see `words.require_aligned`.
    """
    words.require_aligned(hypotheses, references)
    split = words.splitter(tokenize)
    systems = [split(text) for text in hypotheses]
    groups = [[split(text) for text in group] for group in references]
    corpus: Counts = collections.Counter()  # of all orders, () the number of words
    for reference in (r for group in groups for r in group):
        corpus[()] += len(reference)
        for n in range(1, order + 1):
            corpus.update(_grams(reference, n))
    score = 0.0
    for n in range(1, order + 1):
        total = sum(max(0, len(system) - n + 1) for system in systems)
        information = sum(
            count * math.log2(corpus[gram[:-1]] / corpus[gram])
            for system, group in zip(systems, groups, strict=True)
            for gram, count in _matches(system, group, n).items()
        )
        score += information / total if total else 0.0
    mean = sum(sum(map(len, group)) / len(group) for group in groups)
    return score * _penalty(sum(map(len, systems)) / mean)


def _penalty(ratio: float) -> float:
    """Returns 1 for a ratio of 1 or more, 1/2 at 2/3, 0 for no words at all."""
    if ratio <= 0:
        return 0.0
    return math.exp(-BETA * math.log(min(1.0, ratio)) ** 2)


def _grams(tokens: Sequence[str], n: int) -> Iterable[Gram]:
    """Returns all n-grams."""
    return (tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _matches(system: Sequence[str], group: Sequence[Sequence[str]], n: int) -> Counts:
    """Counts the hypothesis' n-grams, clipped by the largest count in one reference."""
    most: Counts = collections.Counter()
    for reference in group:
        most |= collections.Counter(_grams(reference, n))  # the larger count
    return collections.Counter(_grams(system, n)) & most  # the smaller count
