"""Attention, in the form that suits the machine: one function, five implementations.

    mixed = attention.attend(q, k, v, causal=True, segments=segments)

| implementation | where | holds the scores | takes |
|---|---|---|---|
| plain | everywhere | all of them | everything |
| lean | everywhere | those of 256 queries at a time | everything |
| splash | TPUs | never | causal self-attention, windows, soft caps, segments |
| cudnn | NVIDIA GPUs, bfloat16 or float16 | never | all but soft caps |
| tiles | everywhere; a ring where devices share rows | a tile at a time | as splash |

"flash" picks the one that fits the mesh, the platform and the arguments; `chosen`
returns which. Only "tiles" works with a mesh axis "context".
"""

from lorax.attention.choice import (
    IMPLEMENTATIONS,
    STRIPED,
    attend,
    chosen,
    segments_of,
)
from lorax.attention.ring import stripe, unstripe

__all__ = [
    "IMPLEMENTATIONS",
    "STRIPED",
    "attend",
    "chosen",
    "segments_of",
    "stripe",
    "unstripe",
]
