"""Decay of the spectral norm, of the Frobenius norm, or none: what becomes of spectra?

References:
  Su, kexue.fm 10648 and 11729 (decay of the spectral norm); Loshchilov & Hutter,
  Decoupled Weight Decay Regularization, arXiv:1711.05101.
"""

from typing import Any

import numpy as np

from experiments.studies.method import panels, shared, text
from lorax import analysis

STRENGTH = 1.0  # decay of the factors: lr * STRENGTH of each at every step
SPECTRAL = (0.01, 0.1)
"""Strengths of the update's decay, whose gradient grows with the update's own size.

They are not comparable with STRENGTH; at 1 the toy model learns next to nothing.
"""


def _chain(*links: Any) -> dict[str, Any]:
    chain = (("adam", {"b1": 0.9, "b2": 0.98}), *links)
    return {"optimizer.name": "chain", "optimizer.chain": chain}


def watch(setting: shared.Setting, chosen: Any) -> Any:
    """Returns a function that reads the updates' mean singular values and metrics."""
    del setting, chosen

    def spectra(seed: int, step: int, state: Any, params: Any) -> dict[str, Any]:
        values = analysis.singular_values(state.adapters).values()
        found = {k: float(v) for k, v in analysis.metrics(state.adapters).items()}
        mean = np.mean(
            [np.asarray(v).reshape(-1, v.shape[-1]).mean(0) for v in values], 0
        )
        return {**found, "values": mean.tolist()}

    return spectra


STUDY = text.Study(
    "decay",
    "What does spectral decay do to the spectrum, and to the loss?",
    {
        "no decay": _chain(),
        "Frobenius": _chain(("weight_decay", STRENGTH)),
        **{f"spectral, {x:g}": _chain(("spectral_decay", x)) for x in SPECTRAL},
    },
    "no decay",
    seeds=(1, 2, 3),
    watch=watch,
)


def last_spectrum(axis: Any, results: Any) -> None:
    """Draws the final singular values, as the mean over matrices and seeds."""
    for arm, style in panels.styles(results).items():
        runs = results["arms"][arm]["watched"]
        mean = np.mean([run[-1]["values"] for run in runs], 0)
        axis.semilogy(1 + np.arange(len(mean)), mean, label=arm, **style)
    axis.set(xlabel="index", ylabel="singular value of the update at the end")
    axis.legend(fontsize=7)


PANELS = (
    panels.curves,
    panels.watched("spectral_norm", "largest singular value of any update"),
    last_spectrum,
)
