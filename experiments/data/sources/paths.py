"""Where real data lies: the one place that knows."""

import os
import pathlib

ROOT = pathlib.Path(__file__).parents[3]
VARIABLE = "LORAX_DATA"


def root() -> pathlib.Path:
    """The folder of data sets: `$LORAX_DATA`, else `../shared/data` by the repository.

    It need not exist.
    """
    return pathlib.Path(os.environ.get(VARIABLE) or ROOT.parent / "shared" / "data")


def find(name: str | os.PathLike[str]) -> pathlib.Path:
    """A path as given if it is absolute, else below the folder of data sets.

    Args:
      name: such as "e2e_nlg/lora_format/test.txt.gz". A part may be a zip archive:
        "e2e_nlg/e2e-dataset.zip/e2e-dataset/devset.csv".

    Raises:
      FileNotFoundError: if neither the path nor an archive on the way to it exists.
    """
    path = root() / name
    if not any(
        p.exists() and (p == path or p.is_file()) for p in (path, *path.parents)
    ):
        raise FileNotFoundError(
            f"No data at {path}. Relative names are looked up in ${VARIABLE} (now "
            f"{os.environ.get(VARIABLE)!r}), else in `../shared/data` beside the "
            f"repository: set {VARIABLE} to the folder that holds "
            f"{pathlib.Path(name).parts[0]!r}, or give an absolute path."
        )
    return path
