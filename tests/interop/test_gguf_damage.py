"""GGUF files that are truncated, wrong, or need what is not implemented."""

import struct
import time
import tracemalloc

import numpy as np
import pytest

from lorax.interop import gguf
from lorax.interop.gguf import header
from tests.interop import gguf_files as made

pytestmark = pytest.mark.once


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def number(key, value):
    return text(key) + struct.pack("<II", 4, value)


def tensor(name, dims=(32,), kind=0, offset=0):
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def file(entries=(), tensors=(), *, magic=b"GGUF", version=3, counts=None, data=128):
    """A file written by hand, in the specification's terms."""
    count = (len(tensors), len(entries)) if counts is None else counts
    head = magic + struct.pack("<IQQ", version, *count)
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


ARRAY = text("k") + struct.pack("<I", 9)
BAD = {
    "no GGUF file": (b"GGML" + bytes(40), "starts with b'GGML', so it is not a GGUF"),
    "empty": (b"GGUF", "has 4 bytes, so it is not a GGUF file"),
    "version 1": (file(version=1), "version 1; only 2 and 3 are"),
    "big-endian": (file(version=3 << 24), "big-endian.*gguf-convert-endian"),
    "2^60 keys": (file(counts=(0, 2**60)), f"{2**60} keys.*beyond the end"),
    "2^60 tensors": (file(counts=(2**60, 0)), f"{2**60} tensors.*beyond the end"),
    "a key of 2^63 bytes": (
        file([struct.pack("<Q", 2**63) + b"k"]),
        "key 0: 9223372036854775808 bytes.*beyond",
    ),
    "a value of 2^40 bytes": (
        file([text("k") + struct.pack("<IQ", 8, 2**40)]),
        "k: 1099511627776 bytes from .* beyond",
    ),
    "2^61 numbers": (file([ARRAY + struct.pack("<IQ", 6, 2**61)]), "k: .*beyond"),
    "2^61 texts": (
        file([ARRAY + struct.pack("<IQ", 8, 2**61)]),
        "k, an array of 2305843009213693952 texts: .* beyond",
    ),
    "arrays of arrays": (
        file([ARRAY + struct.pack("<IQ", 9, 1)]),
        "k: arrays of arrays are not supported",
    ),
    "a type of values": (
        file([text("k") + struct.pack("<I", 99)]),
        "k: 99 is not a value type",
    ),
    "a switch of 7": (
        file([text("k") + struct.pack("<IB", 7, 7)]),
        "k: a boolean is 7",
    ),
    "not UTF-8": (
        file([text("k") + struct.pack("<I", 8) + text(b"\xff\xfe")]),
        r"k: b'\\xff\\xfe' is not UTF-8",
    ),
    "a key that is not UTF-8": (
        file([text(b"\xc3(") + struct.pack("<II", 4, 1)]),
        "key 0: .* is not UTF-8",
    ),
    "a key twice": (file([number("k", 1), number("k", 1)]), "key 'k' appears twice"),
    "a tensor twice": (file((), [tensor("t")] * 2), "tensor 't' appears twice"),
    "no dimensions": (file((), [tensor("t", ())]), "'t' has 0 dimensions"),
    "2^31 dimensions": (
        file((), [text("t") + struct.pack("<I", 2**31) + bytes(60)]),
        "'t' has 2147483648 dimensions",
    ),
    "no rows": (file((), [tensor("t", (32, 0))]), r"'t' has the impossible shape"),
    "2^128 weights": (
        file((), [tensor("t", (2**63, 2**63, 4))]),
        "'t' has the impossible shape",
    ),
    "an unknown type": (
        file((), [tensor("t", kind=4)]),
        "'t' has the unknown ggml type 4; convert it",
    ),
    "half a block": (
        file((), [tensor("t", (33,), 2)]),
        "'t' has rows of 33, which Q4_0 blocks of 32",
    ),
    "beyond the end": (
        file((), [tensor("t", (33,))]),
        "'t': 132 bytes from .* are beyond the end of the file.*truncated",
    ),
    "an offset of 2^63": (file((), [tensor("t", offset=2**63)]), "'t': 128 .* beyond"),
    "an odd offset": (file((), [tensor("t", offset=3)]), "'t' begins at 3, not align"),
    "tensors on each other": (
        file((), [tensor("s"), tensor("t", offset=64)], data=256),
        "'s' and 't' overlap",
    ),
    "alignment 0": (file([number("general.alignment", 0)]), "general.alignment=0;"),
    "alignment 48": (file([number("general.alignment", 48)]), "48 is not a power of"),
    "alignment of text": (
        file([text("general.alignment") + struct.pack("<I", 8) + text("32")]),
        "general.alignment='32'; it must be an int",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_headers_that_lie(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=f"(?s)x.gguf.*{message}"):
        gguf.load(path)
    assert time.perf_counter() - begun < 1
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_header_longer_than_any(tmp_path, monkeypatch):
    monkeypatch.setattr(header, "LIMIT", 100)
    path = tmp_path / "x.gguf"
    path.write_bytes(file([text("k") + struct.pack("<I", 8) + text("v" * 200)]))
    with pytest.raises(ValueError, match="k: 200 bytes.*the 100 bytes that a header"):
        header.read(path)


def test_a_file_by_hand_is_read(tmp_path):
    path = tmp_path / "x.gguf"
    entries = [number("k", 7), ARRAY + struct.pack("<IQ", 8, 2) + text("a") + text("é")]
    entries[1] = entries[1].replace(text("k"), text("l"), 1)
    path.write_bytes(file(entries, [tensor("t", (4, 8), 0, 0)]))
    found = header.read(path)
    assert found.metadata == {"k": 7, "l": ["a", "é"]}
    assert found.tensors["t"].shape == (8, 4)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        header.read(tmp_path / "y.gguf")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = made.tiny(tmp_path_factory.mktemp("sound") / "x.gguf")
    content = path.read_bytes()
    begin = min(tensor.raw.offset for tensor in header.read(path).tensors.values())
    return content, begin


HUGE = [0, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]


def outcome(path, content):
    """The outcome for a changed file: "loaded", or "refused" by name."""
    path.write_bytes(content)
    begun = time.perf_counter()
    try:
        gguf.load(path)
        gguf.tokenizer_files(path)
    except ValueError as error:
        assert path.name in str(error)
        return "refused"
    finally:
        assert time.perf_counter() - begun < 10
    return "loaded"


@pytest.mark.parametrize("seed", range(4))
def test_any_change_of_the_header_loads_or_is_refused(tmp_path, sound, seed):
    """Random bytes, huge counts, and truncated files."""
    sound, begin = sound
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(150):
        content = bytearray(sound)
        at = draw.integers(4, begin - 8)
        if draw.integers(4) == 0:
            content = content[: draw.integers(len(sound))]
        elif draw.integers(2):
            content[at] = draw.integers(256)
        else:  # a count, a size, an offset
            value = HUGE[draw.integers(len(HUGE))]
            content[at : at + 8] = value.to_bytes(8, "little")
        found.append(outcome(tmp_path / "x.gguf", bytes(content)))
    assert found.count("refused") > 60
