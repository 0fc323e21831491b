"""The GPU's command, rehearsed where there is none: the same script, at toy sizes."""

import json
import os
import subprocess
import sys

import pytest

from experiments.benchmarks.gpu import parts, sizes, table
from experiments.benchmarks.rivals import torch_peft
from tests import children

pytestmark = pytest.mark.once


@pytest.mark.skipif(not torch_peft.available(), reason="torch or peft is not installed")
def test_steps_and_decoding_beside_peft(tmp_path):
    size, result = sizes.SIZES["toy"], {"steps": {}, "decoding": {}}
    torch_peft.pin(1)
    for section, rows in (
        ("steps", parts.lorax_rows(size, tmp_path, ["lora", "adalora"])),
        ("steps", parts.torch_rows(size, tmp_path, ["lora", "adalora"], (False,))),
        ("decoding", parts.decode_rows(size, tmp_path, ["merged"])),
    ):
        result[section] |= {name: row() for name, row in rows.items()}
    ours, theirs = (
        {method: result["steps"][f"{who}, {method}"] for method in ("lora", "adalora")}
        for who in ("lorax", "PEFT")
    )
    theirs["lora"]["losses"].pop()
    assert ours["lora"]["losses"] == pytest.approx(theirs["lora"]["losses"], rel=1e-5)
    penalised = ours["adalora"]["losses"][0] + ours["adalora"]["penalty"]
    assert penalised == pytest.approx(theirs["adalora"]["losses"][0], rel=1e-5)
    text = table.render(result)
    for name in ("lorax, adalora", "PEFT, adalora", "lorax, merged", "PEFT, merged"):
        assert f"\n| {name} |" in text


def test_the_script_and_a_row_that_fails(tmp_path):
    out = tmp_path / "gpu.json"
    env = {**os.environ, "PYTHON": sys.executable, "SIZES": "toy", "PARTS": "decode"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "ROWS": "merged"}
    script = children.ROOT / "experiments" / "benchmarks" / "gpu.sh"
    ran = subprocess.run([script, out], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(out.read_text())
    assert "no file" in result["decoding"]["lorax, merged"]["not_run"]
    assert "lorax, merged: not run, FileNotFoundError" in table.render(result)


def test_what_pytest_wrote(tmp_path):
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite tests="3" skipped="1" time="2.5"><testcase '
        'classname="tests.a" name="b"><failure/></testcase><testcase classname="c" '
        'name="d"/></testsuite></testsuites>'
    )
    suite = parts.tests_row(tmp_path)
    assert suite == {"tests": 3, "skipped": 1, "failed": ["tests.a::b"], "seconds": 2.5}
    assert table.tests(suite) == (
        "Tests on the GPU: 1 passed, 1 skipped, 1 failed\n- tests.a::b"
    )


def test_operations_by_hand():
    """Two layers of width 4: 4 heads of 2, 2 of keys; hidden 8; 16 tokens; 3 x 5."""
    fields = sizes.TOY | {"hidden_size": 4, "intermediate_size": 8, "head_dim": 2}
    size = sizes.Sizes(fields | {"vocab_size": 16}, batch=3, time=5)
    weights = 2 * (4 * 8 + 2 * 4 * 4 + 8 * 4 + 3 * 4 * 8) + 4 * 16  # q, k and v, o, mlp
    scores = 2 * (2 * 2 * 8 * 5 // 2)  # layers x (scores and mix) of 8, half of 5 keys
    assert sizes.model_flops(size, "lora") == 15 * (4 * weights + 3 * scores)
    assert sizes.model_flops(size, "full") == 15 * (6 * weights + 3 * scores)
