"""Instructions and chats as JSON lines, and plain text in windows."""

import json
import pathlib

import numpy as np
import pytest

from configs import common
from experiments.data import examples, tokenization
from experiments.data.sources import instruction, paths, plain_text
from experiments.tasks import respond

BYTES = tokenization.ByteTokenizer()


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
]


def test_every_form_as_pairs_and_as_chats(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "p", "response": "r"},
        {"instruction": "i", "input": "", "output": "o"},
        {"instruction": "i", "input": "n", "output": "o"},
        {"question": "q", "answer": "a", "id": 3},
    )
    expected = [("p", "r"), ("i", "o"), ("i\n\nn", "o"), ("q", "a")]
    pairs = instruction.read_pairs(path, template="Q: {prompt}\nA:").pairs
    assert [pair[:2] for pair in pairs] == [(f"Q: {p}\nA:", r) for p, r in expected]
    assert pairs[3].where == f"{path}:4"
    chats = instruction.read_chats(path, system="s").chats
    assert [[m["content"] for m in chat] for chat in chats] == [
        ["s", p, r] for p, r in expected
    ]
    assert [m["role"] for m in chats[0]] == ["system", "user", "assistant"]


def test_a_chat_keeps_its_own_system_message(tmp_path):
    own = [{"role": "system", "content": "own"}, *CHAT]
    path = write(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": own})
    first, second = instruction.read_chats(path, system="s").chats
    assert [first[0]["content"], second[0]["content"]] == ["s", "own"]
    assert instruction.read_chats(path).chats == (CHAT, own)


BROKEN = [
    ({"prompt": "p", "response": " "}, "'response' is empty"),
    ({"prompt": "p", "response": 3}, "are str and int, expected two texts"),
    ({"instruction": ["i"], "output": "o"}, "'instruction' or 'input' is not text"),
    ({"text": "t"}, "columns .'text'. match none of"),
    ({"messages": []}, "'messages' is not a list of messages"),
    ({"messages": CHAT[:1]}, "no assistant message: nothing to train on"),
    ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\]: .*'assistant'"),
    (
        {"messages": [CHAT[0], {"role": "assistant", "content": None}]},
        "is None, expect",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BROKEN)
def test_malformed_rows_are_named_and_counted(tmp_path, row, reason):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "response": "r"}, row)
    with pytest.warns(
        UserWarning, match=f"(?s)dropped 1 malformed of 2.*:2: .*{reason}"
    ):
        found = instruction.read_chats(path)
    assert len(found.chats) == len(found.malformed) == 1


def test_options_are_checked(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "response": "r"})
    with pytest.raises(ValueError, match=r"expected it to hold '{prompt}' once"):
        instruction.read_pairs(path, template="Q:")
    with pytest.raises(ValueError, match="form='gsm8k': choose from .*'question'"):
        instruction.read_pairs(path, form="gsm8k")
    with pytest.raises(ValueError, match="no usable row"):
        instruction.read_pairs(path, form="question")
    with pytest.raises(ValueError, match="'messages' is not a list"):
        instruction.read_chats(path, form="messages")


def test_gsm8k():
    path = paths.root() / "gsm8k" / "test.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path}: set {paths.VARIABLE}")
    found = instruction.read_pairs(path)
    assert (len(found.pairs), found.malformed) == (1319, ())
    assert found.pairs[0].prompt.startswith("Janet’s ducks lay 16 eggs")
    assert found.pairs[0].response.endswith("#### 18")


def test_windows_predict_every_token_once():
    texts = ["abcdé", "xy"]
    made = plain_text.windows(BYTES, texts, 4, "x")
    # 256 a b c | d 195 169 257 | 256 x y 257, each window with the next token
    assert [e["tokens"].tolist() for e in made] == [
        [256, 97, 98, 99, 100],
        [100, 195, 169, 257, 256],
        [256, 120, 121, 257],
    ]
    assert [e["loss_mask"].tolist() for e in made] == [
        [0, 1, 1, 1, 1],
        [0, 1, 1, 1, 1],
        [0, 1, 1, 1],
    ]
    assert [int(e["bytes"]) for e in made] == [4, 2, 2]
    assert list(examples.trained_text(BYTES, made[1])) == ["é"]


def test_windows_of_a_length_that_divides_leave_none_empty():
    made = plain_text.windows(BYTES, ["abc"], 2, "x")  # five tokens, four predictions
    assert [len(e["tokens"]) for e in made] == [3, 3]
    assert len(plain_text.windows(BYTES, ["abc"], 4, "x")) == 1


def test_documents_of_every_kind(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one\n<|book|>\ntwo<|book|>\n")
    assert plain_text.read(text).texts == ("one\n<|book|>\ntwo<|book|>\n",)
    assert plain_text.read(text, "<|book|>").texts == ("one\n", "\ntwo")
    listed = tmp_path / "a.json"
    listed.write_text('["one", 2, "three"]')
    with pytest.warns(UserWarning, match=r"a.json\[1\]: 'text' is 2, not text"):
        found = plain_text.read(listed)
    assert (found.texts, len(found.malformed)) == (("one", "three"), 1)
    rows = write(tmp_path / "a.jsonl", {"story": "one"}, {"story": "two"})
    assert plain_text.read(rows, column="story").texts == ("one", "two")


def test_no_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="a.txt: no text"):
        plain_text.read(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="x: 0 tokens of text"):
        plain_text.windows(BYTES, [], 4, "x")
    with pytest.raises(ValueError, match="length=0"):
        plain_text.windows(BYTES, ["a"], 0, "x")


def test_mojibake_is_repaired_and_nothing_else():
    wrong = "“It’s é” – 😀".encode()
    # Windows-1252, with Latin-1 for the bytes without a character
    read = "".join(
        bytes([b]).decode("cp1252", errors="ignore") or chr(b) for b in wrong
    )
    assert plain_text.repair_mojibake(read) == "“It’s é” – 😀"
    # much software drops the bytes that Windows-1252 lacks
    assert plain_text.repair_mojibake("â€œHi!â€ she said") == "“Hi!” she said"
    for right in ("plain", "café “quoted”", "Ã alone", ""):
        assert plain_text.repair_mojibake(right) == right


def test_real_text():
    root = paths.root()
    if not (root / "tinystories_1000").is_dir():
        pytest.skip(f"no {root / 'tinystories_1000'}: set {paths.VARIABLE}")
    stories = plain_text.read(root / "tinystories_1000" / "tinystories_1000.json").texts
    assert len(stories) == 1000
    repaired = [plain_text.repair_mojibake(story) for story in stories]
    assert sum("â€" in story for story in stories) == 83
    assert sum("â€" in story for story in repaired) == 0
    books = plain_text.read(root / "books_pd" / "books.txt.gz", "<|book|>").texts
    assert len(books) == 42
    made = plain_text.windows(BYTES, repaired[:9], 256, "stories")
    assert sum(int(e["bytes"]) for e in made) == sum(
        len(story.encode()) for story in repaired[:9]
    )
    assert np.concatenate([e["tokens"][1:] for e in made]).size == (
        sum(len(story.encode()) + 2 for story in repaired[:9]) - 1
    )


def test_a_table_without_another_holds_out_its_last_tenth(tmp_path, monkeypatch):
    """Looked up in the working directory, where there is no such data set."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(15)]
    mine = pathlib.Path("mine.jsonl")
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = common.checkpoint_run().data
    data.update(task="instructions", template="{prompt}: ", train="mine.jsonl")
    train, valid = (respond.read_pairs(data, split) for split in ("train", "valid"))
    assert [pair.response for pair in train] == [f"r{i}" for i in range(13)]
    assert [pair.prompt for pair in valid] == ["p13: ", "p14: "]
    data.valid = "mine.jsonl"
    assert len(respond.read_pairs(data, "train")) == 15
    mine.write_text(json.dumps(rows[0]) + "\n")
    data.valid = ""
    with pytest.raises(ValueError, match="one good row, and a tenth"):
        respond.read_pairs(data, "train")
    with pytest.raises(FileNotFoundError, match=r"nor at .*/other.jsonl"):
        paths.find("other.jsonl")
