"""How a model sees images: their size, and pixels as its preprocessor scales them."""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.data import tokenization
from lorax import untrusted

METHODS = {0: "nearest", 1: "lanczos3", 2: "linear", 3: "cubic"}
"""Methods of `jax.image.resize` by PIL's numbers."""


class Look(NamedTuple):
    """How a model sees images.

    Attributes:
      size: height and width.
      channels: usually 1 or 3.
      mean: subtracted from pixels in [0, 1]; one for all channels or one for each.
      std: divides the difference, likewise.
      method: of `jax.image.resize`.
    """

    size: int
    channels: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    method: str = "linear"

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Returns an image as the model reads it, float32.

        Raises:
          ValueError: the image has neither one channel nor as many as the model.

        Example:
          >>> Look(2, 1)(np.array([[[0.0], [1.0]], [[0.5], [1.0]]]))[..., 0]
          array([[-1.,  1.],
                 [ 0.,  1.]], dtype=float32)
        """
        if pixels.shape[-1] not in (1, self.channels):
            raise ValueError(
                f"an image has {pixels.shape[-1]} channels, but the model reads "
                f"{self.channels}: convert the images, or give greyscale ones"
            )
        shape = self.size, self.size, pixels.shape[-1]
        if pixels.shape != shape:
            pixels = np.asarray(jax.image.resize(pixels, shape, self.method))
            pixels = pixels.clip(0, 1)
        pixels = np.broadcast_to(pixels, (*shape[:2], self.channels))
        return ((pixels - np.array(self.mean)) / np.array(self.std)).astype(np.float32)


def look_of(folder: pathlib.Path | None, size: int, channels: int) -> Look:
    """Returns what a checkpoint's preprocessor_config.json says.

    Args:
      folder: of the checkpoint; with None, or without the file, pixels go from -1 to 1,
        as ViT and SigLIP were trained.
      size: height and width that the model reads.
      channels: channels that the model reads.

    Raises:
      ValueError: a field has the wrong type, or asks for what is not implemented.
    """
    path = folder / "preprocessor_config.json" if folder else None
    fields = tokenization.read_config(path) if path else {}

    def take(name: str, rule: untrusted.Rule, default: Any) -> Any:
        value = fields.get(name)
        given = default if value is None else value
        return untrusted.check(f"{path}: {name}", given, rule)

    if take("do_center_crop", untrusted.FLAG, False):
        raise ValueError(f"{path}: do_center_crop=true is not implemented; resize only")
    scaled = take("do_rescale", untrusted.FLAG, True)
    factor = take("rescale_factor", untrusted.number(above=0), 1 / 255)
    if not scaled or abs(255 * factor - 1) > 1e-6:
        raise ValueError(
            f"{path}: do_rescale={scaled} and rescale_factor={factor} are not "
            f"implemented: pixels are scaled to [0, 1] by 1/255; fold other factors "
            "into image_mean and image_std"
        )
    numbers = untrusted.listed(untrusted.number(), 1)
    mean = tuple(take("image_mean", numbers, (0.5,)))
    positive = untrusted.listed(untrusted.number(above=0), 1)
    std = tuple(take("image_std", positive, (0.5,)))
    if not take("do_normalize", untrusted.FLAG, True):
        mean, std = (0.0,), (1.0,)
    if {len(mean), len(std)} - {1, channels}:
        raise ValueError(
            f"{path}: image_mean and image_std have {len(mean)} and {len(std)} "
            f"numbers, but the model reads {channels} channels"
        )
    known = untrusted.Rule(f"one of {sorted(METHODS)}", lambda v: v in METHODS)
    return Look(size, channels, mean, std, METHODS[take("resample", known, 2)])
