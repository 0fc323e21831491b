"""Bits per byte: a loss that does not depend on the tokenizer."""

import math


def bits_per_byte(total_nats: float, total_bytes: int) -> float:
    """Returns total negative log-likelihood / ln 2 / UTF-8 bytes of the references.

    The nats are those of every trained token, EOS included: a model that does not know
    where to stop pays for it. The bytes are those of the text only.

    Args:
      total_nats: summed, not averaged, over the references' tokens.
      total_bytes: `len(text.encode())` summed over the references; the sum of
        `batch["bytes"]` over batches of `experiments.data.examples`.

    Raises:
      ValueError: if the nats are NaN or infinite, or there are no bytes.

    Example:
      >>> bits_per_byte(8 * math.log(2), 4)
      2.0
    """
    if not math.isfinite(total_nats):
        raise ValueError(
            f"total_nats is {total_nats}: the model's loss is not finite on this data."
        )
    if total_bytes <= 0:
        raise ValueError(f"total_bytes is {total_bytes}: there is no reference text.")
    return total_nats / math.log(2) / total_bytes
