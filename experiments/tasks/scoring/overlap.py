"""All scores of generated texts, in one row."""

from collections.abc import Sequence

from experiments.tasks.scoring import bleu as bleu_
from experiments.tasks.scoring import nist as nist_
from experiments.tasks.scoring import rouge


def generation_scores(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenize: str = "13a",
    lowercase: bool = True,
) -> dict[str, float | str]:
    """Returns BLEU, NIST and ROUGE-L over groups of references.

    Args:
      hypotheses: one text for each group.
      references: groups of texts, such as those of `data.sources.e2e.groups`.
      tokenize: "none" for E2E's `lora_format`, which is already tokenised.
      lowercase: whether BLEU ignores case, as the E2E scorer's does; NIST and ROUGE-L
        always ignore it, as there.

    Returns:
      `bleu` (0 to 100), `bleu_signature`, `nist`, `rouge_l` (0 to 1).
    """
    score, signature = bleu_.bleu(hypotheses, references, tokenize, lowercase)
    return {
        "bleu": score,
        "bleu_signature": signature,
        "nist": nist_.nist(hypotheses, references, tokenize),
        "rouge_l": rouge.rouge_l(hypotheses, references, tokenize),
    }
