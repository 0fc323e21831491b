"""Writes `docs/results.md` from the results of the studies; nothing is pasted by hand.

python -m experiments.report
"""

from collections.abc import Sequence

from absl import app

from experiments.studies.method import findings


def main(argv: Sequence[str]) -> None:
    """Writes the page."""
    del argv
    print(findings.write())


if __name__ == "__main__":
    app.run(main)
