"""Labelled images: scikit-learn's digits, arrays in .npz files, folders by class.

| `config.data.name` | what it is | split |
|---|---|---|
| digits | 1,797 handwritten digits, 8 x 8 shades of grey (scikit-learn) | by seed |
| NAME.npz | `images` [n, height, width] or [.., channels], `labels` [n] | by seed |
| NAME | a folder with train.npz and valid.npz | as given |
| NAME | a folder with a folder of images for every class | by seed |

Arrays hold bytes, or floats from 0 to 1. Relative names are looked up in the folder of
data sets. A split by seed holds out the same share of every class.

    pixels: float32 [height, width, channels], scaled as the model's preprocessor does
    label:  int32 []

References: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
"""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
import numpy as np

from experiments.data import extras
from experiments.data.examples import Example
from experiments.data.sources import paths
from experiments.data.vision.look import Look


class Images(NamedTuple):
    """A set of images.

    Attributes:
      pixels: of every image `[height, width, channels]`, from 0 to 1.
      labels: int `[n]`.
      names: of the classes, in the order of their numbers.
    """

    pixels: Sequence[np.ndarray]
    labels: np.ndarray
    names: tuple[str, ...]

    def chosen(self, index: np.ndarray) -> "Images":
        """Returns some of the images."""
        return self._replace(
            pixels=[self.pixels[i] for i in index], labels=self.labels[index]
        )


def load(data: ml_collections.ConfigDict) -> dict[str, Images]:
    """Returns the sets "train" and "valid" of `config.data`.

    Args:
      data: `name`; `held_out`, the share of every class to hold out, and `split_seed`,
        for sets without a split; `classes`, the classes to keep, which are renumbered
        from 0; () for all.

    Raises:
      FileNotFoundError: no such set.
      ValueError: files that are not images with labels, or unknown classes.
    """
    if data.name == "digits":
        return _split(_chosen(digits(), data.classes), data)
    path = paths.find(data.name)
    if path.suffix == ".npz":
        return _split(_chosen(arrays(path), data.classes), data)
    if (path / "train.npz").is_file():
        parts = {split: arrays(path / f"{split}.npz") for split in ("train", "valid")}
        return {split: _chosen(own, data.classes) for split, own in parts.items()}
    return _split(_chosen(folders(path), data.classes), data)


def digits() -> Images:
    """Returns scikit-learn's digits: 17 shades of grey, in the order of the package."""
    library = extras.require("sklearn.datasets", "experiments", "the set 'digits'")
    found = library.load_digits()
    pixels = (found.images / 16.0).astype(np.float32)[..., None]
    return Images(list(pixels), found.target.astype(np.int32), tuple("0123456789"))


def arrays(path: pathlib.Path) -> Images:
    """Reads the images and labels of an .npz file."""
    with np.load(path, allow_pickle=False) as file:
        if missing := {"images", "labels"} - set(file.files):
            raise ValueError(f"{path}: {sorted(missing)} are missing from {file.files}")
        pixels, labels = file["images"], file["labels"]
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    whole = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    if pixels.ndim != 4 or not whole or len(labels) != len(pixels) or not len(labels):
        raise ValueError(
            f"{path}: images {pixels.shape} and labels {labels.dtype}{labels.shape}; "
            "give [n, height, width] or [n, height, width, channels], and n integers"
        )
    if pixels.dtype == np.uint8:
        pixels = pixels / np.float32(255)
    elif not np.issubdtype(pixels.dtype, np.floating) or not _inside(pixels):
        raise ValueError(
            f"{path}: images are {pixels.dtype} from {pixels.min()} to {pixels.max()}; "
            "give bytes, or floats from 0 to 1"
        )
    if labels.min() < 0:
        raise ValueError(f"{path}: label {labels.min()}; number classes from 0")
    names = tuple(map(str, range(labels.max() + 1)))
    return Images(list(pixels.astype(np.float32)), labels.astype(np.int32), names)


def folders(path: pathlib.Path) -> Images:
    """Reads images from a folder for every class, sorted by name."""
    library = extras.require("PIL.Image", "experiments", str(path))
    names = sorted(p.name for p in path.iterdir() if p.is_dir())
    endings = set(library.registered_extensions())
    pixels, labels = list[np.ndarray](), list[int]()
    for label, name in enumerate(names):
        files = sorted(
            p for p in (path / name).iterdir() if p.suffix.lower() in endings
        )
        if not files:
            raise ValueError(f"{path / name}: a class without images")
        for file in files:
            with library.open(file) as image:
                mode = "L" if image.mode in ("1", "L", "I;16") else "RGB"
                own = np.asarray(image.convert(mode), np.float32) / 255
            pixels.append(own[..., None] if own.ndim == 2 else own)
            labels.append(label)
    if len(names) < 2:
        raise ValueError(
            f"{path}: {len(names)} class folders; give train.npz and valid.npz, or a "
            "folder of images for each of two or more classes"
        )
    return Images(pixels, np.array(labels, np.int32), tuple(names))


def encode(found: Images, look: Look) -> list[Example]:
    """Returns the images as a model reads them, with their labels."""
    return [
        {"pixels": look(pixels), "label": np.asarray(label, np.int32)}
        for pixels, label in zip(found.pixels, found.labels, strict=True)
    ]


def _inside(pixels: np.ndarray) -> bool:
    return bool(pixels.min() >= 0 and pixels.max() <= 1)


def _chosen(found: Images, classes: Sequence[int]) -> Images:
    """Keeps the images of some classes, renumbered in the order given."""
    if not classes:
        return found
    if unknown := sorted(set(classes) - set(range(len(found.names)))):
        raise ValueError(
            f"data.classes={tuple(classes)}: there is no class {unknown[0]}; the set "
            f"has the classes 0 to {len(found.names) - 1}"
        )
    kept = found.chosen(np.flatnonzero(np.isin(found.labels, classes)))
    number = {old: new for new, old in enumerate(classes)}
    return Images(
        kept.pixels,
        np.array([number[int(label)] for label in kept.labels], np.int32),
        tuple(found.names[old] for old in classes),
    )


def _split(found: Images, data: ml_collections.ConfigDict) -> dict[str, Images]:
    """Holds out a share of every class; both parts are in random order."""
    rng = np.random.default_rng(data.split_seed)
    held, kept = list[int](), list[int]()
    for label in range(len(found.names)):
        own = rng.permutation(np.flatnonzero(found.labels == label))
        count = round(data.held_out * len(own))
        held += own[:count].tolist()
        kept += own[count:].tolist()
    parts = {"train": kept, "valid": held}
    return {name: found.chosen(rng.permutation(own)) for name, own in parts.items()}
