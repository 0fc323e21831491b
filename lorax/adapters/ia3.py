"""(IA)^3: a learned gain on a kernel's outputs, or on its inputs.

    W = W0 diag(l)        keys and values of attention
    W = diag(l) W0        the second kernel of a feed-forward block: feedforward=True

with l = 1 at init. In the paper l multiplies the activations: keys, values, and the
hidden layer of the feed-forward block, which is what its second kernel reads. Here a
gain acts on the kernel alone. If the module has a bias, PEFT multiplies it by the same
output gain; the paper's T5 has none. Such files are not loaded: the bias is a separate
leaf, and a second gain on it would train independently of the kernel's.

References:
  Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
  In-Context Learning, arXiv:2205.05638.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from lorax.adapters import layout, making
from lorax.adapters.parametrisation import Parametrisation, register
from lorax.types import Axes, Factors, Field, KernelSpec, LinearMap, TargetSpec


@register("ia3")
@flax.struct.dataclass
class Ia3(Parametrisation):
    """A gain on every output of a kernel, or on every input.

    Attributes:
      axes: the leaf's in, out and batch axes.
      gain: `[*batch, *out]`, 1 at init; None for no gain on outputs. Never decay it.
      input_gain: `[*batch, *in]`, the same for inputs.
      layers: the layers of the first batch axis that have gains; None for all.
    """

    axes: Axes = flax.struct.field(pytree_node=False)
    gain: jax.Array | None = None
    input_gain: jax.Array | None = None
    layers: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)

    fields = {
        "gain": Field("magnitude", "batch out", optional=True),
        "input_gain": Field("magnitude", "batch in", optional=True),
    }
    options = {"feedforward": False}
    drops = False

    @classmethod
    def check_target(cls, target: TargetSpec) -> None:
        """Raises ValueError for an option that is neither True nor False."""
        given = making.options(target, cls.options)["feedforward"]
        if not isinstance(given, bool):
            raise ValueError(
                f"{target.pattern!r}: feedforward={given!r} for adapter='ia3'; give "
                "True for a gain on the inputs, False for one on the outputs"
            )

    @classmethod
    def make(
        cls,
        key: jax.Array,
        kernel: KernelSpec,
        target: TargetSpec,
        shared: Mapping[str, jax.Array],
    ) -> Ia3:
        """Returns gains of one, on the inputs if the target's option says so.

        Raises:
          ValueError: gains on the inputs of an embedding lookup.
        """
        del key, shared
        in_, out, batch = making.sizes(kernel, target)
        axes, layers = kernel.linear_axes(), target.layers

        def ones(sizes: tuple[int, ...]) -> jax.Array:
            return jnp.ones((*batch, *sizes), target.dtype)

        if not making.options(target, cls.options)["feedforward"]:
            return cls(axes, gain=ones(out), layers=layers)
        making.require_inputs(kernel, "ia3")
        return cls(axes, input_gain=ones(in_), layers=layers)

    def factors(self, kernel: jax.Array) -> Factors:
        """Returns the gain, and D = diag(input gain) - I.

        Layers without gains stay unchanged.
        """
        depth = layout.depth(kernel, self.axes)
        gain, inputs = self.gain, None
        if gain is not None:
            gain = layout.spread(gain, self.layers, depth, fill=1.0)
        if self.input_gain is not None:
            own = self.input_gain.astype(layout.wide(self.input_gain))
            own = layout.spread(own, self.layers, depth, fill=1.0)
            in_, _, batch = self.axes.sizes(kernel.shape)
            inputs = LinearMap(own.reshape(*batch, math.prod(in_)) - 1, scaled)
        return layout.without_product(kernel, self.axes, gain=gain, inputs=inputs)


def scaled(gain: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x diag(gain) for x `[n, in]`."""
    return x * gain
