"""lorax: low-rank adaptation of Flax models as pure parameter transforms.

kernels = lorax.discover(loss_fn, params, batch)
adapters, params = lorax.init(key, params, [lorax.Target("all-linear")], kernels)
loss = lorax.adapt(loss_fn)                 # (adapters, params, batch)
merged = lorax.merge(adapters, params)      # plain Flax params again

`docs/concepts` explains the terms.
"""

from lorax import analysis, compose, optim, quantized, scaling
from lorax.adapters import AdaLora, Dora, Full, Lora
from lorax.calibration import calibrate
from lorax.compensation import loftq
from lorax.description import describe
from lorax.interpret import CustomRuleWarning, MergeWarning
from lorax.kernels import Kernel, KernelUse, discover
from lorax.merging import merge_report
from lorax.notices import TargetWarning
from lorax.quantization import quantize
from lorax.targets import Target
from lorax.transform import adapt, init, merge
from lorax.types import Adapter, Adapters, Axes, Base

__version__ = "0.1.0"

__all__ = [
    "AdaLora",
    "Adapter",
    "Adapters",
    "Axes",
    "Base",
    "CustomRuleWarning",
    "Dora",
    "Full",
    "Kernel",
    "KernelUse",
    "Lora",
    "MergeWarning",
    "Target",
    "TargetWarning",
    "adapt",
    "analysis",
    "calibrate",
    "compose",
    "describe",
    "discover",
    "init",
    "loftq",
    "merge",
    "merge_report",
    "optim",
    "quantize",
    "quantized",
    "scaling",
]
