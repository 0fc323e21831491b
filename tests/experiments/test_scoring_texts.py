"""BLEU, NIST and ROUGE-L: three meaning representations worked out by hand."""

import math

import pytest

from experiments.tasks.scoring import words
from experiments.tasks.scoring.bits import bits_per_byte
from experiments.tasks.scoring.bleu import bleu
from experiments.tasks.scoring.nist import nist
from experiments.tasks.scoring.overlap import generation_scores
from experiments.tasks.scoring.rouge import rouge_l

pytest.importorskip("sacrebleu", reason="needs the experiments extra: sacrebleu")

HYPOTHESES = ["a b c d", "x y", "a a b"]
REFERENCES = [["a b c d", "a b d"], ["x y z", "y x"], ["a b", "a c b b"]]


def test_bleu_by_hand():
    # matches of n words, clipped:  8/9 (the second a of the third text is clipped)
    #   ab bc cd xy ab = 5/6;  abc bcd = 2/3;  abcd = 1/1
    # closest reference lengths 4, 2 and, of 2 and 4 as near to 3, the shorter 2: 8 < 9,
    # no penalty
    expected = 100 * (8 / 9 * 5 / 6 * 2 / 3 * 1) ** 0.25  # 83.83
    score, signature = bleu(HYPOTHESES, REFERENCES, tokenize="none")
    assert score == pytest.approx(expected) == pytest.approx(83.8289, abs=1e-3)
    assert "tok:none" in signature and "case:mixed" in signature
    assert signature.startswith("nrefs:2|")


def test_nist_by_hand():
    # Words in all references: 4 + 3 + 3 + 2 + 2 + 4 = 18: 4 a, 5 b, 2 c, 2 d, 2 x, 2 y.
    # n = 1, nine words: matched a b c d, x y, a b (the other a is clipped):
    #   2 log2(18/4) + 2 log2(18/5) + 4 log2(18/2) = 4.33985 + 3.69599 + 12.67970
    # n = 2, six pairs: ab, bc, cd; xy; ab. Pair ab occurs three times in references:
    #   2 log2(4/3) + log2(5/1) + log2(2/1) + log2(2/1) = 0.83007 + 2.32193 + 1 + 1
    # n = 3, three triples: abc, bcd:  log2(3/1) + log2(1/1) = 1.58496
    # n = 4, one: abcd, log2(1/1) = 0.  n = 5: none.
    # Mean reference lengths 3.5 + 2.5 + 3 = 9 = words written: no penalty.
    by_hand = 20.71554 / 9 + 5.15200 / 6 + 1.58496 / 3
    assert by_hand == pytest.approx(3.68871, abs=1e-5)
    assert nist(HYPOTHESES, REFERENCES, "none") == pytest.approx(by_hand, abs=1e-5)


def test_nist_penalises_brevity_by_half_at_two_thirds():
    # References: one of 6 words and two of them, so that the mean is 6, not the
    # closest. Two of three words would match fully; count(w) = 2 each of 12.
    #   n = 1: log2(12/2) a word; n >= 2: log2(2/2) = 0
    full = nist(["a b c d e f"], [["a b c d e f"] * 2], "none")
    assert full == pytest.approx(math.log2(6))
    short = nist(["a b c d"], [["a b c d e f"] * 2], "none")
    assert short == pytest.approx(0.5 * math.log2(6))
    # mean length of 4 and 8 is 6: again two thirds, though one reference is as short.
    # Words: 12, each of a b c d twice.
    mean = nist(["a b c d"], [["a b c d", "a b c d e f g h"]], "none")
    assert mean == pytest.approx(0.5 * math.log2(6))


def test_rouge_l_by_hand():
    # Common subsequences: abcd 4 of 4 and abd 3 of 3: P = 1, R = 1, F = 1.
    # x y: of (x y z) 2, of (y x) 1: P = 2/2, R = max(2/3, 1/2).
    #   F = 2.44 * 2/3 / (2/3 + 1.44) = 0.772152
    # a a b: of (a b) 2, of (a c b b) 2: P = 2/3, R = max(2/2, 2/4) = 1.
    #   F = 2.44 * 2/3 / (1 + 1.44 * 2/3) = 0.829932
    by_hand = (1 + 0.772152 + 0.829932) / 3
    assert rouge_l(HYPOTHESES, REFERENCES, "none") == pytest.approx(by_hand, abs=1e-6)


def test_rouge_l_takes_precision_and_recall_from_different_references():
    # P = 4/4 from the first, R = 2/2 from the second
    assert rouge_l(["p q r s"], [["p q r s t u", "p q"]], "none") == 1.0
    assert rouge_l(["p q"], [["q p"]], "none") == pytest.approx(0.5)


def test_case_and_for_rouge_punctuation_are_ignored():
    assert rouge_l(["The Mill , ."], [["the mill"]], "none") == 1.0
    assert nist(["THE mill"], [["the mill"]], "none") == nist(
        ["the mill"], [["the mill"]], "none"
    )
    assert bleu(["A B C D"], [["a b c d"]], "none", lowercase=True).score == (
        pytest.approx(100)
    )
    assert bleu(["A B C D"], [["a b c d"]], "none").score == 0


def test_13a_splits_what_people_write():
    split = words.splitter("13a")
    assert split("The Mill, at £20.50.") == ["the", "mill", ",", "at", "£20.50", "."]
    written, spaced = "The Mill is cheap.", "The Mill is cheap ."
    assert bleu([written], [[spaced]]).score == pytest.approx(100)
    assert bleu([written], [[spaced]], "none").score < 100


def test_all_in_one_row():
    scores = generation_scores(HYPOTHESES, REFERENCES, "none")
    assert scores["bleu"] == pytest.approx(83.8289, abs=1e-3)
    assert scores["nist"] == pytest.approx(3.68871, abs=1e-5)
    assert scores["rouge_l"] == pytest.approx(0.867361, abs=1e-6)
    assert "case:lc" in scores["bleu_signature"]


def test_groups_of_different_sizes():
    # The second group's one reference must not be scored against padding.
    references = [["a b c d e", "z"], ["p q r s t"]]
    scores = generation_scores(["a b c d e", "p q r s t"], references, "none")
    assert scores["bleu"] == pytest.approx(100)
    assert scores["bleu_signature"].startswith("nrefs:var|")
    assert scores["rouge_l"] == 1.0


def test_an_empty_hypothesis_scores_nothing():
    scores = generation_scores(["", "."], [["a b"], ["c d"]], "none")
    assert (scores["bleu"], scores["nist"], scores["rouge_l"]) == (0, 0, 0)


BAD = [
    ([], [], "0 hypotheses and 0 groups"),
    (["a"], [["a"], ["b"]], "1 hypotheses and 2 groups"),
    (["a", "b"], [["a"], []], r"references\[1\] is \[\]"),
    (["a"], ["a"], r"references\[0\] is 'a': expected a list"),
    (["a"], [["a", " "]], "none of them empty"),
]


@pytest.mark.parametrize(("hypotheses", "references", "message"), BAD)
@pytest.mark.parametrize("score", [bleu, nist, rouge_l])
def test_what_does_not_line_up_is_refused(score, hypotheses, references, message):
    with pytest.raises(ValueError, match=message):
        score(hypotheses, references, "none")


@pytest.mark.parametrize("score", [bleu, nist, rouge_l])
def test_an_unknown_tokenisation_is_refused(score):
    with pytest.raises(ValueError, match="tokenize='intl': choose '13a'.*or 'none'"):
        score(["a"], [["a"]], "intl")


def test_bits_per_byte():
    # "é" and EOS at a probability of 1/4 each: four bits over two bytes
    assert bits_per_byte(2 * math.log(4), len("é".encode())) == pytest.approx(2)
    with pytest.raises(ValueError, match="total_nats is nan"):
        bits_per_byte(math.nan, 3)
    with pytest.raises(ValueError, match="no reference text"):
        bits_per_byte(1.0, 0)
