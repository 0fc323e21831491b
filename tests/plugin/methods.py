"""What a package outside lorax offers: importing it registers its three methods.

config.run.plugins = ("tests.plugin.methods",)
"""

from experiments.trainer import optimizers
from tests.plugin.cosines import cosines
from tests.plugin.signum import signum
from tests.plugin.walsh import Walsh

optimizers.register("signum", signum)

__all__ = ["Walsh", "cosines", "signum"]
