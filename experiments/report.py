"""Draws a finished run: its results, curves, spectra and ranks of updates, and config.

    lorax report runs/quickstart

Writes `report.html` into the run's folder, as one self-contained file. Without a
folder, in a checkout, writes the pages of results from the runs of the studies:
`docs/results.md`, `docs/results/claims.md` and `docs/results/benchmark/README.md`;
nothing is pasted by hand.
"""

import pathlib
from collections.abc import Sequence

from absl import app

import lorax_cli
from experiments.reading import command


def main(argv: Sequence[str]) -> None:
    """Writes the run's page, or the pages of the studies."""
    studies = lorax_cli.ROOT / "experiments" / "studies"
    if len(argv) > 2 or (len(argv) == 1 and not studies.is_dir()):
        raise app.UsageError("give the folder of one run, such as runs/quickstart")
    if len(argv) == 1:
        from experiments.studies.method import findings, scorecard
        from experiments.studies.pretrained import leaderboard

        findings.draw()
        print(findings.write())
        print(scorecard.write(findings.DOCS))
        print(leaderboard.write(findings.DOCS))
        return
    from experiments.pages import run_page

    with command.refusing():
        print(f"Written: {run_page.write(pathlib.Path(argv[1]))}")


if __name__ == "__main__":
    command.run(main)
