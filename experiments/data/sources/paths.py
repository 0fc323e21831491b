"""Where the data sets are: no other module knows."""

import os
import pathlib

ROOT = pathlib.Path(__file__).parents[3]
VARIABLE = "LORAX_DATA"


def root() -> pathlib.Path:
    """Returns the folder of data sets: `$LORAX_DATA`, else `../shared/data`.

    The latter is relative to the repository. The folder need not exist.
    """
    return pathlib.Path(os.environ.get(VARIABLE) or ROOT.parent / "shared" / "data")


def find(name: str | os.PathLike[str]) -> pathlib.Path:
    """Finds a name in the folder of data sets, else in the working directory.

    Args:
      name: such as "e2e_nlg/lora_format/test.txt.gz", or an absolute path. A part may
        be a zip archive: "e2e_nlg/e2e-dataset.zip/e2e-dataset/devset.csv".

    Raises:
      FileNotFoundError: neither the path nor an archive on the way to it exists.
    """
    places = (root() / name, pathlib.Path(name))
    for path in places:
        if path.exists() or any(above.is_file() for above in path.parents):
            return path
    given = os.environ.get(VARIABLE)
    raise FileNotFoundError(
        f"No data at {places[0]}, nor at {places[1].absolute()}. Names are looked up "
        f"in the folder of data sets, ${VARIABLE} (now {given!r}) or `../shared/data` "
        "beside the repository, and then in the working directory."
    )
