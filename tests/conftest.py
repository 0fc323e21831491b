"""Eight CPU devices for the sharding tests; must be set before jax starts."""

import os

from tests import children

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {children.flags(8)}"
os.environ["NPROC"] = children.threads(8)
