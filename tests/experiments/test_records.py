"""Reading rows: every kind of file; errors name the file and the line."""

import gzip
import zipfile

import pytest

from experiments.data import extras
from experiments.data.sources import paths, records


def values(found):
    return [row.values for row in found.rows]


def test_csv_with_quotes_line_breaks_and_a_mark(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        '\ufeffmr,ref\r\n"x, y","two\r\nlines"\r\nu,"é ""q"""\r\n'.encode()
    )
    found = records.read(path, columns=["mr", "ref"])
    assert values(found) == [
        {"mr": "x, y", "ref": "two\r\nlines"},
        {"mr": "u", "ref": 'é "q"'},
    ]
    assert [row.where for row in found.rows] == [f"{path}:2", f"{path}:4"]
    assert found.malformed == ()


def test_in_a_tsv_quotes_are_letters(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_text('sentence\tlabel\n"an odd one\t1\n')
    assert values(records.read(path)) == [{"sentence": '"an odd one', "label": "1"}]


def test_a_file_without_header_gets_its_names(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("gj04\t1\t\tfine\n")
    (row,) = values(records.read(path, header=["source", "label", "mark", "sentence"]))
    assert row == {"source": "gj04", "label": "1", "mark": "", "sentence": "fine"}


@pytest.mark.parametrize(
    "name, text, told",
    [
        (
            "a.csv",
            "a,b,a\n1,2,3\n",
            "a.csv:1: the column 'a' is in the header 2 times, at 1, 3 of 3",
        ),
        (
            "a.tsv",
            "x\t\t\tx\tx\n",
            "a.tsv:1: the column 'x' is in the header 3 times, at 1, 4, 5 of",
        ),
        (
            "a.jsonl",
            '{"a": 1, "a": 2}\n',
            "a.jsonl:1: not JSON: the key 'a' is in an object more",
        ),
        ("a.json", '[{"b": {"a": 1, "a": 2}}]', "a.json: not JSON: the key 'a' is"),
    ],
)
def test_a_name_that_stands_twice_is_no_choice_of_the_last(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=told):
        records.read(tmp_path / name)


def test_columns_without_a_name_and_names_given_twice(tmp_path):
    (tmp_path / "a.csv").write_text("a,,\n1,2,3\n")  # as spreadsheets end a line
    assert values(records.read(tmp_path / "a.csv", columns=["a"])) == [
        {"a": "1", "": "3"}
    ]
    with pytest.raises(ValueError, match="a.csv: the column 'x' is in the header 2"):
        records.read(tmp_path / "a.csv", header=["x", "y", "x"])


def test_json_lines_and_lists(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"a": 1}\n\n{"a": "line\u2028separator"}\n')
    assert values(records.read(lines)) == [{"a": 1}, {"a": "line\u2028separator"}]
    whole = tmp_path / "a.json"
    whole.write_text('[{"a": 1}, {"a": 2}]')
    assert values(records.read(whole)) == [{"a": 1}, {"a": 2}]


def test_compressed_and_inside_an_archive(tmp_path):
    text = b"a,b\n1,2\n"
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(text))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("in/x.csv", text)
    for name in ("x.csv.gz", "x.zip/in/x.csv"):
        assert values(records.read(tmp_path / name)) == [{"a": "1", "b": "2"}]
    with pytest.raises(FileNotFoundError, match=r"no member 'in/y.csv'.*in/x.csv"):
        records.read(tmp_path / "x.zip/in/y.csv")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(text)[:-9])
    with pytest.raises(ValueError, match=r"cut.csv.gz is not an intact gzip"):
        records.read(tmp_path / "cut.csv.gz")


BROKEN = [
    ("a.csv", b"a,b\n1,2\n3\n4,5\n", 3, "1 fields, but 2 columns"),
    ("a.csv", b"a,b\n1,2\n\xff,5\n", 3, "byte 0xff is not valid utf-8"),
    ("a.csv", b'a,b\n1,2\n"never closed,5\n6,7\n', 3, "unexpected end of data"),
    ("a.csv", b'a,b\n1,2\n"closed"early,5\n6,7\n', 3, "expected after"),
    ("a.tsv", b"a\tb\n1\t2\n1\t2\t3\n", 3, "3 fields, but 2 columns"),
    ("a.jsonl", b'{"a": "1", "b": "2"}\n{"a": "1"\n', 2, "not JSON"),
    (
        "a.jsonl",
        b'{"a": "1", "b": "2"}\n["a", "b"]\n',
        2,
        "expected an object, got list",
    ),
    (
        "a.jsonl",
        b'{"a": "1", "b": "2"}\n{"a": 1, "b": NaN}\n',
        2,
        "NaN is not a JSON value .under 'b'",
    ),
    ("a.jsonl", b'{"a": "1", "b": "2"}\n{"a": "1"}\n', 2, r"no 'b' among \['a'\]"),
    ("a.jsonl", b'{"a": "1", "b": "2"}\n{"a": 1, "b": null}\n', 2, "no 'b' among"),
    ("a.jsonl", b'{"a": "1", "b": "2"}\n{"\xff": 1}\n', 2, "0xff is not valid utf-8"),
]


@pytest.mark.parametrize(("name", "content", "line", "reason"), BROKEN)
def test_malformed_rows_are_named_and_counted(tmp_path, name, content, line, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.warns(
        UserWarning, match=rf"dropped 1 malformed of \d rows.*\n.*{reason}"
    ):
        found = records.read(path, columns=["a", "b"])
    assert values(found)[0] == {"a": "1", "b": "2"}
    (malformed,) = found.malformed
    assert malformed.startswith(f"{path}:{line}: ")


def test_an_error_when_no_row_is_good(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("sentence,label\n" + "x,1\n" * 9)
    with pytest.raises(
        ValueError, match=r"(?s)no usable row; 9 malformed.*no 'text'.*\.\.\."
    ):
        records.read(path, columns=["text"])
    path.write_text("")
    with pytest.raises(ValueError, match=r"a.csv: no usable row\."):
        records.read(path)


def test_other_endings_and_other_json(tmp_path):
    with pytest.raises(ValueError, match=r"not from '.parquet'"):
        records.read(tmp_path / "a.parquet")
    path = tmp_path / "a.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected a JSON list, got dict"):
        records.read(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="a.json: not JSON"):
        records.read(path)


def test_text_in_the_wrong_encoding_names_the_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ncaf\xe9\n")
    assert records.read_text(path, "latin-1") == "one\ncafé\n"
    with pytest.raises(ValueError, match=r"a.txt:2: byte 0xe9 is not valid utf-8"):
        records.read_text(path)


def test_data_is_found_below_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.VARIABLE, str(tmp_path))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.csv").write_text("a\n")
    assert paths.find("set/a.csv") == tmp_path / "set" / "a.csv"
    assert paths.find(tmp_path / "set" / "a.csv") == tmp_path / "set" / "a.csv"
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("b.csv", "b\n")
    assert paths.find("x.zip/b.csv") == tmp_path / "x.zip" / "b.csv"
    with pytest.raises(
        FileNotFoundError, match=r"No data at .*/other/b.csv, nor at .*\$LORAX_DATA"
    ):
        paths.find("other/b.csv")
    monkeypatch.delenv(paths.VARIABLE)
    assert paths.root() == paths.ROOT.parent / "shared" / "data"


def test_a_missing_library_comes_with_its_command():
    with pytest.raises(ImportError, match=r"parquet needs `no_such`.*\.\[interop\]"):
        extras.require("no_such", "interop", "Reading parquet")
