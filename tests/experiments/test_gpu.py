"""The GPU command, rehearsed without a GPU: the same script at toy sizes."""

import json
import os
import subprocess
import sys

import pytest

from experiments.benchmarks.gpu import ours, parts, sizes, table
from experiments.benchmarks.rivals import torch_peft
from tests import children

pytestmark = pytest.mark.once


@pytest.mark.slow
@pytest.mark.skipif(not torch_peft.available(), reason="torch or peft is not installed")
def test_steps_beside_peft(tmp_path):
    size, steps = sizes.SIZES["toy"], {}
    torch_peft.pin(1)
    ours.write_files(size, tmp_path)
    for rows in (
        parts.lorax_rows(size, tmp_path, ["lora", "adalora"]),
        parts.torch_rows(size, tmp_path, ["lora", "adalora"], (False,)),
    ):
        steps |= {name: row() for name, row in rows.items()}
    own, theirs = (
        {method: steps[f"{who}, {method}"] for method in ("lora", "adalora")}
        for who in ("lorax", "PEFT")
    )
    theirs["lora"]["losses"].pop()
    assert own["lora"]["losses"] == pytest.approx(theirs["lora"]["losses"], rel=1e-5)
    penalised = own["adalora"]["losses"][0] + own["adalora"]["penalty"]
    assert penalised == pytest.approx(theirs["adalora"]["losses"][0], rel=1e-5)
    text = table.render({"steps": steps})
    assert "\n| lorax, adalora |" in text and "\n| PEFT, adalora |" in text


@pytest.mark.slow
def test_the_script(tmp_path):
    out = tmp_path / "gpu.json"
    env = {**os.environ, "PYTHON": sys.executable, "SIZES": "toy", "PARTS": "decode"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "ROWS": "merged"}
    script = children.ROOT / "experiments" / "benchmarks" / "gpu.sh"
    ran = subprocess.run([script, out], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(out.read_text())
    assert result["decoding"]["lorax, merged"]["tokens_per_second"] > 0
    assert "\n| lorax, merged |" in table.render(result)


def test_a_row_that_fails():
    rows = {"lorax, lora": {"not_run": "MemoryError: 3 | 4\nmore"}}
    text = table.render({"steps": rows, "decoding": rows})
    assert text.count("\n| lorax, lora: not run, MemoryError: 3 / 4 |") == 2


def test_what_pytest_printed(tmp_path):
    lines = [
        "[gw0] [ 33%] PASSED tests/a.py::b[1 x 2] ",
        "tests/a.py::c ",
        "[gw11] [ 66%] FAILED tests/a.py::c ",
        "[gw1] [100%] SKIPPED tests/a.py::d ",
    ]
    (tmp_path / "tests.log").write_text("\n".join(lines))
    told = table.tests(parts.tests_row(tmp_path))
    counts = "Tests on the GPU: 1 passed, 1 skipped, 1 failed"
    assert (
        told == f"{counts}; stopped by the time limit before the last\n- tests/a.py::c"
    )
    last = ["=== 1 failed, 1 passed, 1 skipped in 2.45s ==="]
    (tmp_path / "tests.log").write_text("\n".join(lines + last))
    assert table.tests(parts.tests_row(tmp_path)) == f"{counts}\n- tests/a.py::c"


def test_operations_by_hand():
    """Two layers of width 4: 4 heads of 2, 2 of keys; hidden 8; 16 tokens; 3 x 5."""
    fields = sizes.TOY | {"hidden_size": 4, "intermediate_size": 8, "head_dim": 2}
    size = sizes.Sizes(fields | {"vocab_size": 16}, batch=3, time=5)
    weights = 2 * (4 * 8 + 2 * 4 * 4 + 8 * 4 + 3 * 4 * 8) + 4 * 16  # q, k and v, o, mlp
    scores = 2 * (2 * 2 * 8 * 5 // 2)  # layers x (scores and mix) of 8, half of 5 keys
    assert sizes.model_flops(size, "lora") == 15 * (4 * weights + 3 * scores)
    assert sizes.model_flops(size, "full") == 15 * (6 * weights + 3 * scores)
