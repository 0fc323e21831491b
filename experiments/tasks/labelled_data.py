"""The labelled sets by name, for encoders and for text to text alike."""

import ml_collections
import numpy as np

from experiments.data.sources import classification, glue


def load(data: ml_collections.ConfigDict, split: str) -> classification.Data:
    """A split of `config.data.name`: a GLUE task, or a set of the folder of data sets.

    Its rows stand in one fixed random order, so that the first ones are a fair sample:
    files are often sorted by label.

    Args:
      data: `config.data`: `name`, and for GLUE tasks `root`, the folder that holds
        them.
      split: "train" or "valid"; of MNLI the matched validation set.
    """
    found = _read(data, split)
    order = np.random.default_rng(0).permutation(len(found.rows))
    return found._replace(rows=tuple(found.rows[i] for i in order))


def _read(data: ml_collections.ConfigDict, split: str) -> classification.Data:
    if data.name in glue.TASKS:
        own = split if split == "train" else glue.TASKS[data.name].dev[0]
        return glue.load(data.root, data.name, own)
    if data.name == "banking77":
        return glue.banking77("train" if split == "train" else "test")
    return glue.sentences(data.name, split)


def scores_of(name: str) -> tuple[str, ...]:
    """What a set is judged by."""
    return glue.TASKS[name].scores if name in glue.TASKS else ("accuracy",)
