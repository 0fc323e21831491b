"""Adam's epsilon: when does it turn the steps of a small factor into SGD's?

The gradient of `a` is proportional to b, which starts at zero: with a large epsilon, a
trains as with slow SGD while b takes sign-like steps. The loss does not tell for how
many coordinates epsilon dominates, but a sweep shows where the loss begins to suffer.

References:
  Su, kexue.fm 10563 (Adam's epsilon and scaling laws); `lorax.scaling`.
"""

from typing import Any

from experiments.studies.method import panels, text

VALUES = (1e-8, 1e-6, 1e-4, 1e-2)


def _arm(eps: float) -> dict[str, Any]:
    return {"optimizer.options": (("eps", eps),)}


STUDY = text.Study(
    "epsilon",
    "How large may Adam's epsilon be before adapters learn less?",
    {f"eps = {eps:g}": _arm(eps) for eps in VALUES},
    f"eps = {VALUES[0]:g}",
)
PANELS = (panels.curves, panels.rates)
