"""Quantised leaves: frozen kernels stored in a few bits per weight."""

from lorax.quantized.formats import FORMATS, NF4, Format, Fp8, Int4, Int8, recode
from lorax.quantized.leaf import NestedScales, Quantized, dequantize, is_quantized
from lorax.quantized.stacks import chosen, map_kernels

__all__ = [
    "FORMATS",
    "NF4",
    "Format",
    "Fp8",
    "Int4",
    "Int8",
    "NestedScales",
    "Quantized",
    "chosen",
    "dequantize",
    "is_quantized",
    "recode",
    "map_kernels",
]
