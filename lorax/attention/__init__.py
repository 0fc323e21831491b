"""Attention, in the form that suits the machine: one function, four implementations.

    mixed = attention.attend(q, k, v, causal=True, segments=segments)

| implementation | where | holds the scores | takes |
|---|---|---|---|
| plain | everywhere | all of them | everything |
| lean | everywhere | a chunk of queries at a time | everything |
| splash | TPUs | never | causal self-attention, windows, soft caps, segments |
| cudnn | NVIDIA GPUs, bfloat16 or float16 | never | all but soft caps |

"flash" is the one of the last three that fits the platform and the arguments:
`choice.chosen` says which, and why.
"""

from lorax.attention.choice import IMPLEMENTATIONS, attend, chosen, segments_of

__all__ = ["IMPLEMENTATIONS", "attend", "chosen", "segments_of"]
