"""A progress bar with loss, throughput, memory and time left."""

import contextlib
from collections.abc import Iterator

import rich.console
import rich.progress

from experiments.machine import memory
from lorax import description

SHOWN = 40  # leaves in a table; if there are more, only those left out


class Meter:
    """One bar of a `Progress`: steps done, loss, tokens a second, memory, time left."""

    def __init__(self, bars: rich.progress.Progress, name: str, steps: int) -> None:
        """Adds a bar of `steps` steps, its clock at zero."""
        self._bars = bars
        self._task = bars.add_task(name, total=steps, loss="-", speed="-", held="-")

    def update(self, step: int, loss: float, speed: float) -> None:
        """Moves the bar to `step`; `loss` as in the log, `speed` in tokens a second."""
        self._bars.update(
            self._task,
            completed=step,
            loss=f"{loss:.3f}",
            speed=f"{speed:,.0f}",
            held=f"{memory.peak() / 2**30:.1f}",
        )


def tell_targets(console: rich.console.Console, found: description.Description) -> None:
    """Prints what targets adapt and which matrices they leave out, with the reason."""
    leaves = found.leaves if len(found.leaves) <= SHOWN else found.left_out
    console.print(found.table(leaves), markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def bars(console: rich.console.Console) -> Iterator[rich.progress.Progress]:
    """Draws bars on `console` while the context is open."""
    columns = (
        rich.progress.TextColumn("{task.description:>10}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("loss {task.fields[loss]}"),
        rich.progress.TextColumn("{task.fields[speed]} tokens/s"),
        rich.progress.TextColumn("{task.fields[held]} GiB"),
        rich.progress.TextColumn("ETA"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console) as progress:
        yield progress
