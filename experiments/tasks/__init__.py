"""The tasks that a checkpoint is adapted to: batches, a loss, and scores."""

from experiments.tasks.base import Task
from experiments.tasks.classify import make_classify
from experiments.tasks.contrast import make_contrast
from experiments.tasks.images import make_images
from experiments.tasks.prefer import make_prefer
from experiments.tasks.respond import make_respond
from experiments.tasks.text_to_text import make_text_to_text

TASKS = {
    "e2e": make_respond,
    "instructions": make_respond,
    "classification": make_classify,
    "pairs": make_contrast,
    "images": make_images,
    "text_to_text": make_text_to_text,
    "preferences": make_prefer,
}
"""`config.data.task` -> `(config, model, tokenizer) -> Task`."""

__all__ = ["TASKS", "Task"]
