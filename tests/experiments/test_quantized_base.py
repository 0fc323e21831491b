"""The study of quantised bases: its wiring on a few rows, and its table by hand."""

import math

import pytest

from experiments.studies import quantized_base as study
from tests.data_paths import needs_data

SMALL = {
    "run.steps": 2,
    "optimizer.warmup_steps": 1,
    "data.train_rows": 64,
    "data.batch_size": 4,
    "data.lengths": (344,),
}


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("form", ["", "int8"])
def test_a_run_of_the_study(form):
    config = study.configured("stories260k", form, **SMALL)
    line = study.measured(config, 1, 8)
    assert math.isfinite(line["before"]) and len(line["curve"]) == 1
    assert line["bits"] == (32 if not form else pytest.approx(8.5, abs=0.5))


def test_the_table_by_hand():
    line = lambda before, after, bits: {
        "before": before,
        "curve": [after],
        "bits": bits,
    }
    lines = {
        "": [line(2.0, 1.0, 32.0), line(2.0, 1.2, 32.0)],
        "nf4": [line(2.1, 1.2, 4.13), line(2.1, 1.1, 4.13)],
    }
    dense, packed = study.table(lines).splitlines()[2:]
    assert dense.split("|")[1:-1] == [
        *(" float32 ", " 32.00 ", " 2.0000 ", " 1.1000 ", " 100.0% ")
    ]
    share = (0.8 / 1.0 + 0.9 / 0.8) / 2
    assert [cell.strip() for cell in packed.split("|")[1:-1]] == [
        *("nf4", "4.13", "2.1000", "1.1500", f"{share:.1%}")
    ]
