"""The text: families by hand, no leakage between splits, deterministic."""

import pytest

from experiments.data.sources import documents
from experiments.data.sources.documents import RUN, Document

QUOTE = " ".join(f"word{i}" for i in range(RUN))


def test_families_are_joined_through_shared_runs():
    a = Document("a", f"Alpha. {QUOTE}".encode())
    # Case, punctuation and line breaks do not hide a quotation.
    b = Document("b", f"beta ({QUOTE.upper()})\nnext: {'x ' * RUN}".encode())
    c = Document("c", b"gamma " + b"x " * RUN)
    d = Document("d", QUOTE.rsplit(" ", 1)[0].encode())  # one word short of a run
    grouped = documents.families([a, b, c, d])
    assert [{m.name for m in family} for family in grouped] == [{"a", "b", "c"}, {"d"}]


def test_no_run_of_words_is_on_two_sides_of_the_topic_split():
    runs = {
        name: set().union(*(documents.runs(d.text) for d in docs))
        for name, docs in documents.topics()._asdict().items()
    }
    assert all(runs.values())
    assert runs["train"].isdisjoint(runs["test"])
    assert runs["train"].isdisjoint(runs["selection"])
    assert runs["selection"].isdisjoint(runs["test"])


def test_held_out_topics_are_enough_to_measure_on():
    sizes = {
        name: sum(len(d.text) for d in docs)
        for name, docs in documents.topics()._asdict().items()
    }
    assert sizes["train"] > 200_000
    assert sizes["selection"] > 25_000
    assert sizes["test"] > 25_000


def test_source_shares_no_run_of_words_with_any_topic():
    topics = set().union(*(documents.runs(d.text) for d in documents.raw_topics()))
    train, test = documents.source_train(), documents.source_test()
    assert not topics & set().union(*(documents.runs(d.text) for d in train + test))
    assert "pdb.py" in {d.name for d in documents.raw_source()}
    assert "pdb.py" not in {d.name for d in train + test}  # it is the text of a topic


def test_source_is_held_out_by_module_and_skips_what_is_no_source():
    train, test = documents.source_train(), documents.source_test()
    tops = [{d.name.split("/")[0] for d in docs} for docs in (train, test)]
    assert tops[0].isdisjoint(tops[1])
    assert not (tops[0] | tops[1]) & documents.SKIPPED
    assert not any("tests" in d.name.split("/") for d in train + test)
    assert sum(len(d.text) for d in test) > 50_000


def test_splits_are_the_same_on_every_call():
    documents.raw_source.cache_clear()
    first = documents.topics(), documents.source_test()
    documents.raw_source.cache_clear()
    assert first == (documents.topics(), documents.source_test())


def test_a_python_without_sources_is_told_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        documents.sysconfig, "get_path", lambda name: str(tmp_path / name)
    )
    documents.raw_source.cache_clear()
    with pytest.raises(FileNotFoundError, match="CPython that ships its sources"):
        documents.raw_source()
    documents.raw_source.cache_clear()
