"""The benchmark's wiring; its numbers come from the command."""

import pytest

from experiments.benchmarks.quantized import quantization_loss as loss
from lorax.interop import hf
from lorax.quantized import Int4
from tests.data_paths import DATA, needs_data

pytestmark = pytest.mark.once


@needs_data
def test_columns_of_a_real_kernel():
    model, params = hf.load(DATA / "stories260k")
    dense, kernels = loss.linear(model, params, [1, 4])
    assert len(dense) == 6 and all(len(leaf) == 2 for leaf in dense.values())
    path = "layers/up/kernel"
    found = loss.losses({path: dense[path]}, {path: kernels[path]}, Int4(), 4)
    assert list(found) == ["plain", *loss.WAYS]
    assert found["LoftQ 5"] < found["LoftQ 1"] < found["plain"] < 0.2
    assert found["QPiSSA 5"] < found["QPiSSA 1"] < found["QPiSSA"] < found["plain"]
