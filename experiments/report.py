"""Writes the pages of results that are written from runs; nothing is pasted by hand.

`docs/results.md` is of the studies on the quickstart's text, and
`docs/results/benchmark/README.md` of the methods on real pretrained models.

python -m experiments.report
"""

from collections.abc import Sequence

from absl import app

from experiments.studies.method import findings
from experiments.studies.pretrained import leaderboard


def main(argv: Sequence[str]) -> None:
    """Writes the pages."""
    del argv
    print(findings.write())
    print(leaderboard.write(findings.DOCS))


if __name__ == "__main__":
    app.run(main)
