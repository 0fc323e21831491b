"""Quantised leaves: a frozen kernel in a few bits a weight."""

from lorax.quantized.formats import FORMATS, NF4, Format, Fp8, Int4, Int8, recode
from lorax.quantized.leaf import NestedScales, Quantized, dequantize, is_quantized

__all__ = [
    "FORMATS",
    "NF4",
    "Format",
    "Fp8",
    "Int4",
    "Int8",
    "NestedScales",
    "Quantized",
    "dequantize",
    "is_quantized",
    "recode",
]
