"""ROUGE-L, as defined by the COCO caption code, and so by the E2E challenge's scorer.

For a hypothesis of h words and references of r_i words with longest common
subsequences of l_i words,

    P = max_i l_i / h,   R = max_i l_i / r_i,   F = (1 + beta^2) P R / (R + beta^2 P)

with beta = 1.2. The two maxima may come from different references. The score of a
corpus is the mean of its segments' F. Case is ignored, and so are the punctuation marks
that the COCO code leaves out.

The original splits text by Stanford's PTB rules, in Java. On text that is already
tokenised (`tokenize="none"`, such as the E2E files of the LoRA paper) that hardly
matters; on other text "13a" splits clitics ("don't") and currency differently, so do
not compare such a number with published ones to the third digit.

References: Lin, "ROUGE: a package for automatic evaluation of summaries", 2004; Chen et
al., "Microsoft COCO captions", arXiv:1504.00325.
"""

from collections.abc import Sequence

from experiments.tasks.scoring import words

BETA = 1.2  # weighs recall above precision

# What COCO's tokeniser leaves out, in lower case.
PUNCTUATION = frozenset(
    "'' ' `` ` -lrb- -rrb- -lcb- -rcb- . ? ! , : - -- ... ;".split()
)


def rouge_l(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenize: str = "13a",
) -> float:
    """Returns the mean over segments, between 0 and 1.

    Args:
      hypotheses: one text for each group.
      references: groups of texts.
      tokenize: "13a" or "none", see `words.splitter`.

    Raises:
      ValueError: see `words.require_aligned`.
    """
    words.require_aligned(hypotheses, references)
    split = words.splitter(tokenize)

    def kept(text: str) -> list[str]:
        return [word for word in split(text) if word not in PUNCTUATION]

    scores = [
        _segment(kept(hypothesis), [kept(reference) for reference in group])
        for hypothesis, group in zip(hypotheses, references, strict=True)
    ]
    return sum(scores) / len(scores)


def _segment(hypothesis: Sequence[str], group: Sequence[Sequence[str]]) -> float:
    """Returns F of one hypothesis; 0 if it has no words, or none in common."""
    common = [_common(hypothesis, reference) for reference in group]
    if not any(common):
        return 0.0
    precision = max(common) / len(hypothesis)
    recall = max(c / len(r) for c, r in zip(common, group, strict=True) if r)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence, keeping one table row."""
    above = [0] * (len(b) + 1)
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
        above = row
    return above[-1]
