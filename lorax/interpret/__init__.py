"""The one jaxpr walker: rules for linear operations, views and control flow.

Importing the package fills the walker's table of rules; README.md follows one dot
through the package.
"""

from lorax.interpret import rules
from lorax.interpret.computed import plan_of
from lorax.interpret.emitter import CustomRuleWarning, Emitter, MergeWarning
from lorax.interpret.origins import not_last
from lorax.interpret.program import (
    NEEDS_VALUES,
    Program,
    as_leaf,
    trace,
    traced,
)
from lorax.interpret.recorder import KernelUse, Recorder
from lorax.interpret.terms.dense import dense
from lorax.interpret.terms.tracked import Term, Tracked, unadapted, watch
from lorax.interpret.uses.pairs import fits
from lorax.interpret.uses.plan import NOTHING, Plan
from lorax.interpret.uses.thin import window
from lorax.interpret.uses.use import Use
from lorax.interpret.walker import Visitor, Walker, frozen

__all__ = [
    "NEEDS_VALUES",
    "NOTHING",
    "CustomRuleWarning",
    "Emitter",
    "KernelUse",
    "MergeWarning",
    "Plan",
    "Program",
    "Recorder",
    "Term",
    "Tracked",
    "Use",
    "Visitor",
    "Walker",
    "as_leaf",
    "dense",
    "fits",
    "frozen",
    "not_last",
    "plan_of",
    "rules",
    "trace",
    "traced",
    "unadapted",
    "watch",
    "window",
]
