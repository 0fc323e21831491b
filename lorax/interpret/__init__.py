"""The one jaxpr walker: rules for linear operations, views and control flow.

Importing the package fills the walker's table of rules.
"""

from lorax.interpret import control, custom, gather, rules, views
from lorax.interpret.linear import Use, branches, fits, frozen, low_rank
from lorax.interpret.tracked import Term, Tracked, dense, watch
from lorax.interpret.walker import RULES, Visitor, Walker

__all__ = [
    "RULES",
    "Term",
    "Tracked",
    "Use",
    "Visitor",
    "Walker",
    "branches",
    "control",
    "custom",
    "dense",
    "fits",
    "frozen",
    "gather",
    "low_rank",
    "rules",
    "views",
    "watch",
]
