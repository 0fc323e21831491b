"""What the configs of decoders with grouped heads and windows share."""

from __future__ import annotations

from lorax import attention as attentions


class Decoder:
    """Holds a config to what its attention needs.

    Attributes:
      layers: blocks.
      heads: heads of the queries.
      kv_heads: heads of keys and values; they divide `heads`.
      windows: of every layer, the number of tokens it sees, itself included; 0 for
        all. Empty: every layer sees all.
      attention: "plain"; or as `attention.attend` has it for training: "flash" is what
        suits the machine; decoding is plain.
    """

    layers: int
    heads: int
    kv_heads: int
    windows: tuple[int, ...]
    attention: str

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads of queries cannot share {self.kv_heads} of keys"
            )
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(
                f"{len(self.windows)} windows for {self.layers} layers; give one each"
            )
        if self.attention not in attentions.IMPLEMENTATIONS:
            known = ", ".join(attentions.IMPLEMENTATIONS)
            raise ValueError(f"attention={self.attention!r}; choose one of {known}")

    @property
    def striped(self) -> bool:
        """Devices along a mesh axis "context" share rows, see `attention.stripe`."""
        return self.attention in attentions.STRIPED

    @property
    def stacks(self) -> dict[str, int]:
        """Layers of every stack."""
        return {"layers": self.layers}
