"""Plans a run on machines you do not have: compiles its train step, runs nothing.

    lorax plan --config=llama3_70b_lora --topology=v5e:16x16

Reports what each chip would hold, whether it fits, and how long a step would take.
`--quantize=nf4` plans a quantised base; `--search` finds the best mesh, remat, batch
and base format; `--published` plans runs whose speed others have published. Needs
libtpu (`pip install -e '.[tpu]'`), but no TPU; `--topology=cpu:8` needs neither.
"""

import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from experiments.planning import topology as topologies
from experiments.reading import command

_CONFIG = config_flags.DEFINE_config_file("config", None, command.CONFIG)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "v5e:4x4, v5p-128, cpu:8, ...; else config.sharding.topology."
)
_SEARCH = flags.DEFINE_bool("search", False, "Find the best mesh, remat and batch.")
_PUBLISHED = flags.DEFINE_bool("published", False, "Plan published runs, and compare.")
_QUANTIZE = flags.DEFINE_string("quantize", None, "Sets config.model.quantize.")
_FORM = flags.DEFINE_enum(
    "form", "adapt", ["adapt", "merge"], "merge: a step that merges the adapters."
)


def main(argv: Sequence[str]) -> None:
    """Plans as the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are not flags: {argv[1:]}")
    if _PUBLISHED.value:
        topologies.prepare()  # before jax is loaded
        from experiments.planning import published

        print(published.render(published.compare(print)))
        return
    config = _CONFIG.value
    if config is None:
        raise app.UsageError("give --config, such as configs/llama3_8b_lora.py")
    try:
        topology = topologies.parse(_TOPOLOGY.value or config.sharding.topology)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    if topologies.needs_child(topology):
        again = [sys.executable, "-m", "lorax_cli", "plan", *sys.argv[1:]]
        sys.exit(topologies.run_with_devices(again, topology.chips))
    if _QUANTIZE.value is not None:
        config.model.quantize = _QUANTIZE.value
    topologies.prepare()  # before jax is loaded
    from experiments.planning import best, estimates, rendering
    from experiments.reading import checking

    with command.refusing():
        checking.check(config)
    try:
        if _SEARCH.value:
            print(best.render(best.run(config, topology, print)))
        else:
            plan = estimates.make_plan(config, topology, _FORM.value, evaluated=True)
            print(rendering.render(plan))
    except (ValueError, ModuleNotFoundError) as error:
        raise app.UsageError(str(error)) from error


if __name__ == "__main__":
    command.run(main)
