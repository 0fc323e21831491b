"""E2E in both of its forms, by hand and on the real files."""

import zipfile

import pytest

from experiments.data.examples import Pair
from experiments.data.sources import e2e, paths


def test_lora_format_by_hand(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("name : X | area : y||X is in y . \nname : Z||Z ! \n", "utf-8")
    assert e2e.read(path).pairs == (
        Pair("name : X | area : y||", "X is in y .", f"{path}:1"),
        Pair("name : Z||", "Z !", f"{path}:2"),
    )


def test_the_official_form_by_hand(tmp_path):
    with zipfile.ZipFile(tmp_path / "e2e.zip", "w") as archive:
        archive.writestr("d/devset.csv", '"mr","ref"\n"name[X], area[y]","X, in y."\n')
    path = tmp_path / "e2e.zip" / "d" / "devset.csv"
    assert e2e.read(path).pairs == (
        Pair("name[X], area[y]||", "X, in y.", f"{path}:2"),
    )


def test_groups_keep_the_order_of_prompts():
    pairs = [Pair("b", "1"), Pair("a", "2"), Pair("b", "3")]
    assert e2e.groups(pairs) == [("b", ("1", "3")), ("a", ("2",))]


def test_malformed_lines_are_counted_once(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a||b\nno bars\na||b||c\na|| \n")
    with pytest.warns(UserWarning, match="dropped 3 malformed of 4") as caught:
        data = e2e.read(path)
    assert len(caught) == 1
    assert data.malformed == (
        f"{path}:2: 0 times '||', expected it once",
        f"{path}:3: 2 times '||', expected it once",
        f"{path}:4: 'ref' is empty",
    )


def test_unknown_splits_are_listed():
    with pytest.raises(ValueError, match=r"no split 'dev' of form 'official'.*'valid'"):
        e2e.load("dev", "official")


SIZES = [("train", 42061, 4862), ("valid", 4672, 547), ("test", 4693, 630)]


@pytest.mark.parametrize("form", sorted(e2e.FILES))
@pytest.mark.parametrize(("split", "pairs", "groups"), SIZES)
def test_the_real_data(form, split, pairs, groups):
    if not (paths.root() / "e2e_nlg").is_dir():
        pytest.skip(f"no {paths.root() / 'e2e_nlg'}: set {paths.VARIABLE}")
    data = e2e.load(split, form)
    assert (len(data.pairs), len(e2e.groups(data.pairs))) == (pairs, groups)
    assert data.malformed == ()
    if (form, split) == ("lora_format", "test"):
        assert data.pairs[0][:2] == (
            "name : Blue Spice | Type : coffee shop | area : city centre||",
            "A coffee shop in the city centre area called Blue Spice .",
        )
