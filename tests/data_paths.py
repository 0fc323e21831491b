"""Where the real data is; tests that need it skip if it is missing."""

import os
import pathlib

import pytest

DATA = pathlib.Path(
    os.environ.get("LORAX_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data")
)
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no data at ../shared/data")
