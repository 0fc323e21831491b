"""Eight CPU devices for the sharding tests, set before jax starts; shared fixtures."""

import os
import resource

import pytest

from tests import children

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {children.flags(8)}"


@pytest.fixture(scope="module")
def quick_compilation():
    """Half of the time of toys would go into optimising their programs."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def size_limit():
    """Files end at so many bytes, as on a disk that is full; more is an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    limit(soft)
