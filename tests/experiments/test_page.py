"""The benchmarks' page matches their JSON files."""

import json

from experiments.benchmarks import page


def test_the_committed_page_is_written_from_the_files_beside_it(tmp_path):
    written = page.write(page=tmp_path / "performance.md").read_text()
    assert written == (page.DOCS / "performance.md").read_text(), (
        "run python -m experiments.benchmarks.page"
    )


def test_the_summary_holds_the_best_step_to_the_other_programs_best():
    def seconds(**other):
        return {"seconds": {"lorax": [0.5, 0.3]} | other}

    steps = {name: seconds() for name in page.METHODS}
    steps["lora"] = seconds(**{"PEFT + PyTorch": [0.4, 0.9], "qwix": [0.6]})
    steps["full"] = seconds(PyTorch=[0.15])
    told = page.summary({"frameworks_amd": {"steps": steps}})
    assert "| PEFT + PyTorch, AMD EPYC | 0.75 |  |  | 2.00 |  |" in told
    assert "| qwix, AMD EPYC | 0.50 |  |  |  |  |" in told


def test_what_did_not_run_is_left_out(tmp_path):
    steps = json.loads((page.FOLDER / "frameworks_amd.json").read_text())
    (tmp_path / "frameworks_amd.json").write_text(json.dumps(steps))
    text = page.write(tmp_path, tmp_path / "page.md").read_text()
    assert "## In short" in text and "Intel" not in text.partition("## A train step")[2]
