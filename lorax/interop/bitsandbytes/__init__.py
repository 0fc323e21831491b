"""Loads checkpoints quantised by bitsandbytes."""

from lorax.interop.bitsandbytes.headers import gathered
from lorax.interop.bitsandbytes.leaves import Plan, plans
from lorax.interop.bitsandbytes.matrices import Coded, is_coded

__all__ = ["Coded", "Plan", "gathered", "is_coded", "plans"]
