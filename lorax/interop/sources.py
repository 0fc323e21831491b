"""Finds checkpoints by name: directories, Python packages, the hub."""

from __future__ import annotations

import difflib
import importlib.util
import os
import pathlib
import re
from collections.abc import Sequence

HUB_FILES = ("*.json", "*.safetensors", "tokenizer*", "*.jinja", "LICENSE*")

HUB = "hf:"
"""Prefix of a name to look up on the hub, even if such a directory exists."""

PACKAGE = "package:"
"""Prefix for a folder or file in an installed Python package, "package:NAME/PATH"."""


def locate(
    source: str | pathlib.Path,
    revision: str | None = None,
    folders: Sequence[pathlib.Path] = (),
    files: Sequence[str] = HUB_FILES,
) -> pathlib.Path:
    """Returns the directory of a checkpoint, downloaded if `source` is a hub id.

    Args:
      source: a directory, a name below one of `folders`, "package:NAME/PATH" for a
        folder in an installed Python package, or a hub id, which may start with "hf:".
      revision: of a hub id.
      folders: where to look up relative names, before the working directory.
      files: patterns of the files to download.

    Raises:
      FileNotFoundError: see `find_local`; or huggingface_hub is not installed.
    """
    directory = find_local(source, folders)
    if directory is not None:
        return directory
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"the directory {source} does not exist; to look it up on the hub, install "
            "lorax-flax[interop]"
        ) from error
    return pathlib.Path(
        huggingface_hub.snapshot_download(
            str(source).removeprefix(HUB),
            revision=revision,
            allow_patterns=list(files),
        )
    )


def find_local(
    source: str | pathlib.Path, folders: Sequence[pathlib.Path] = ()
) -> pathlib.Path | None:
    """Returns the directory that a name refers to; None for a hub id.

    Raises:
      FileNotFoundError: the name is a path that does not exist; or there is no such
        directory but one with a similar name, so it is not looked up on the hub.
    """
    text = str(source)
    if text.startswith(HUB):
        return None
    if text.startswith(PACKAGE):
        return in_package(text)
    given = pathlib.Path(os.path.expanduser(source))  # never raises
    places = [*(folder / given for folder in folders), given]
    for place in places:
        if place.is_dir():
            return place
    hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text) and not given.exists()
    beside = [p for place in places for p in _siblings(place)]
    names = dict.fromkeys(path.name for path in beside)
    near = difflib.get_close_matches(given.name, names, cutoff=0.75)
    local = given.parent != pathlib.Path() and bool(beside)
    if hub_id and not near and not local:
        return None
    told = f"; nearby: {', '.join(near or list(names)[:8])}" if names else ""
    advice = f". For a model with that name on the hub, write {HUB}{text}"
    raise FileNotFoundError(
        f"the directory {text} does not exist{told}{advice if hub_id else ''}"
    )


def in_package(source: str, file: bool = False) -> pathlib.Path:
    """Returns the path of "package:NAME/PATH" without importing the package.

    Args:
      source: such a name.
      file: True for a file, False for a folder.

    Raises:
      FileNotFoundError: the package is not installed, or has no such folder or file.
    """
    package, _, path = source.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    roots = (spec.submodule_search_locations if spec else None) or []
    places = (pathlib.Path(root, path) for root in roots)
    found = next((p for p in places if (p.is_file() if file else p.is_dir())), None)
    if found is None:
        kind = "file" if file else "folder"
        why = f"has no {kind} {path!r}" if roots else "is not installed here"
        raise FileNotFoundError(f"{source}: the package {package!r} {why}")
    return found


def _siblings(path: pathlib.Path) -> list[pathlib.Path]:
    """The directories next to a path, which need not exist."""
    try:
        return sorted(other for other in path.parent.iterdir() if other.is_dir())
    except OSError:  # the folder does not exist or cannot be read
        return []
