"""The matcher against `re`, and patterns on which `re` takes too long."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax.interop.patterns import Pattern

CASES = [
    (r".*\.(q|v)_proj", ["a.q_proj", "q_proj", "a.k_proj", "x.y.v_proj", "a.q_projx"]),
    (r"model\.layers\.(0|1[0-9])\.mlp", ["model.layers.0.mlp", "model.layers.12.mlp"]),
    (r"^(?!.*vision).*(fc1|fc2)$", ["text.fc1", "vision.fc1", "fc2", "fc3"]),
    (r"(?=.*b)[^\]x-z]{2,}?", ["ab", "aa", "xb", "b]", "aab", ""]),
    (r"a{,2}b{2}c{1,}d{x}", ["aabbcd{x}", "bbccd{x}", "aaabbcd{x}", "bbd{x}"]),
    (r"\w+\.\d+\.[a\]\d]+|\x41", ["h.12.a]3", "h.x.a", "A", "h.1.b"]),
    (r"(?P<name>ab)*(?:c|)", ["", "ababc", "abac", "c"]),
    (r"\bin\b.*\B", ["in", "in.a", "inner", "in.ab"]),
    ("[]a]+$|^$", ["]a", "", "b"]),
    (r"\0|\101|\$\{", ["\0", "A", "${", "$"]),
    ("(a|b|)+c?", ["abac", "abca", ""]),
]


@pytest.mark.parametrize("pattern, names", CASES, ids=[c[0] for c in CASES])
def test_as_re(pattern, names):
    for name in names:
        want = re.fullmatch(pattern, name) is not None
        assert Pattern(pattern).fullmatch(name) == want, name
        want = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert Pattern(pattern).tail(name) == want, name


atoms = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\.", r"\w", "^", "$", r"\b"])
quantifiers = st.sampled_from(["", "*", "+", "?", "{2}", "{1,2}", "*?", "{,1}"])
patterns = st.recursive(
    st.tuples(atoms, quantifiers).map(
        lambda p: p[0] + (p[1] if p[0] not in "^$" and p[0] != r"\b" else "")
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.tuples(inner, inner).map(lambda p: f"({p[0]}|{p[1]})"),
        st.tuples(inner, quantifiers).map(lambda p: f"(?:{p[0]}){p[1]}"),
        inner.map(lambda p: f"(?={p})"),
        inner.map(lambda p: f"(?!{p})"),
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(patterns, st.text("ab.", max_size=7))
def test_as_re_at_random(pattern, name):
    want = re.fullmatch(pattern, name) is not None
    assert Pattern(pattern).fullmatch(name) == want


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|aa)*c", "(.*.*.*)*x", "((a?)+){9}b"])
def test_no_exponential_backtracking(pattern):
    start = time.process_time()
    assert not Pattern(pattern).fullmatch("a" * 60)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("(a", "is not a regular expression"),
        (3, "is not a regular expression"),
        (r"(a)\1", "back-reference"),
        ("(?<=a)b", r"uses \(\?<"),
        ("(?i)a", r"uses \(\?i"),
        ("a++", "possessive"),
        ("(" * 60 + ")" * 60, "nested groups"),
        ("a{5000}", "repetitions"),
        ("a" * 5000, "5000 characters"),
    ],
)
def test_what_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        Pattern(pattern)
