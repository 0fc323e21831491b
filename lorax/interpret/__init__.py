"""The one jaxpr walker: rules for linear operations, views and control flow.

Importing the package fills the walker's table of rules.
"""

from lorax.interpret import control, custom, gather, rules, views
from lorax.interpret.linear import frozen, low_rank, thin_only
from lorax.interpret.pairs import fits
from lorax.interpret.tracked import Term, Tracked, dense, watch
from lorax.interpret.use import Dims, Use
from lorax.interpret.walker import RULES, Visitor, Walker

__all__ = [
    "RULES",
    "Dims",
    "Term",
    "Tracked",
    "Use",
    "Visitor",
    "Walker",
    "control",
    "custom",
    "dense",
    "fits",
    "frozen",
    "gather",
    "low_rank",
    "rules",
    "thin_only",
    "views",
    "watch",
]
