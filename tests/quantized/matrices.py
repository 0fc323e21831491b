"""Matrices for the tests of formats, and the codes of their leaves."""

import numpy as np


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def codes_of(leaf):
    """The codes of a matrix; at four bits, halves of a block of inputs share bytes."""
    codes = np.asarray(leaf.codes)
    if not leaf.block:
        return codes
    pairs = codes.reshape(-1, 1, leaf.block // 2, codes.shape[-1])
    return np.concatenate([pairs >> 4, pairs & 15], 1).reshape(leaf.shape)
