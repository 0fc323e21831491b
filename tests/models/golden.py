"""Tiny transformers models on disk with every weight redrawn, and their logits.

At transformers' own initial weights a wrong rotary base moves logits by only 4e-4; with
these they have a standard deviation of at least 1, and every mistake shows.
"""

import contextlib

import jax
import numpy as np

# Test modules skip without them. If a helper skipped during its import, the doctest
# collector would leave it half-imported for the next module.
with contextlib.suppress(ImportError):
    import torch

TOLERANCE = 1e-4  # of the standard deviation of the logits
SAME = 1e-5  # relative, for models with the same weights and adapters


def redraw(model, seed=0, size=1.0):
    """Redraws kernels, norms and biases, so that nothing keeps its default."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(size * noise / p.shape[-1] ** 0.5)
            else:
                p.copy_(0.5 * noise + ("norm" in name or "ln_" in name))
    return model.eval()


def reference(model, tokens, real=None, positions=None):
    """The logits in float64."""
    model = model.double()
    told = {"input_ids": torch.tensor(tokens)}
    if real is not None:
        told["attention_mask"] = torch.tensor(real).long()
    if positions is not None:
        told["position_ids"] = torch.tensor(positions)
    with torch.no_grad():
        return model(**told).logits.numpy()


def cached(model, params, tokens, real):
    """The logits through a cache: all but eight tokens at once, then one by one."""

    @jax.jit
    def read(params, part, real, cache):
        return model.apply({"params": params}, part, real=real, cache=cache)

    batch, time = tokens.shape
    cache, found, begin = model.cache(batch, time + 8), [], 0
    for end in range(time - 8, time + 1):
        part = tokens[:, begin:end], real[:, begin:end]
        logits, cache = read(params, *part, cache)
        found.append(logits)
        begin = end
    return np.concatenate(found, axis=1)


def assert_close(logits, expected, where=slice(None)):
    """Asserts logits are within the tolerance, relative to their spread."""
    spread = expected.std()
    assert spread >= 1, spread
    error = np.abs(np.asarray(logits, np.float64) - expected)[where].max()
    assert error <= TOLERANCE * spread, (error, spread)


def assert_same(logits, expected, *, each=True):
    """Asserts float32 logits are within `SAME`: in norm, and each against the largest.

    Rounding alone takes a tenth of that: torch's own float32 is 1e-7 (DeBERTa, ViT) to
    2e-6 (Gemma 2) of the norm away from its float64, and so are we.
    """
    error = np.abs(np.asarray(logits, np.float64) - expected)
    norm = np.linalg.norm(error) / np.linalg.norm(expected)
    assert norm <= SAME, norm
    largest = error.max() / np.abs(expected).max()
    assert not each or largest <= SAME, largest


def assert_apart(logits, expected):
    """Asserts that a mutated model is 100 tolerances away from the reference."""
    error = np.abs(np.asarray(logits, np.float64) - expected).max()
    assert error >= 100 * TOLERANCE * expected.std(), error


def tokens_of(vocabulary, batch=2, time=17, seed=0):
    """Random tokens, excluding the first three, which may be special."""
    return np.random.default_rng(seed).integers(3, vocabulary, (batch, time))


def left_padded(real, time):
    """bool `[batch, time]` for sequences of these lengths."""
    return np.arange(time)[None] >= time - np.asarray(real)[:, None]
