"""One run on one device, on a mesh and in two processes gives the same numbers."""

import functools
import json
import sys
import time

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from experiments.machine import distributed, launching, placement
from experiments.trainer import metric_log
from lorax import checkpoint
from lorax.interop import hf
from lorax.models import llama
from tests.data_paths import needs_data

MESHES = {
    "one device": (1, 1, {}),
    "1 x 8": (1, 8, {"data": 2, "fsdp": 2, "tensor": 2}),
    "2 x 4": (2, 4, {"data": 2, "fsdp": 2, "tensor": 2}),
}
SMALL = {
    "run.steps": 3,
    "run.log_every": 1,
    "data.train_rows": 96,
    "data.valid_rows": 21,
    "data.batch_size": 8,
    "data.packed": True,
    "data.lengths": "(344,)",
    "eval.rows": 13,
    "eval.batch_size": 8,
    "eval.test": 3,
    "eval.max_tokens": 6,
    "eval.every": 2,
    "eval.beams": 2,
    "adapter.rank": 2,
}


def command(workdir, sizes):
    fields = SMALL | {f"sharding.{axis}": n for axis, n in sizes.items()}
    return [
        *(sys.executable, "-m", "experiments.main"),
        "--config=configs/gpt2_e2e_lora.py:runlocal",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def losses(folder):
    return [line["loss"] for line in metric_log.read(folder) if "loss" in line]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Returns a run's folder by the name of its mesh; each runs once."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(name):
        processes, devices, sizes = MESHES[name]
        code = launching.launch(command(folder / name, sizes), processes, devices)
        assert code == 0, name
        return folder / name

    return run


@needs_data
@pytest.mark.once
@pytest.mark.parametrize(
    "name", ["2 x 4", pytest.param("1 x 8", marks=pytest.mark.slow)]
)
def test_meshes_and_processes_change_no_number(done, name):
    read = lambda name, file: (done(name) / file).read_text()
    one, other = (json.loads(read(n, "results.json")) for n in ("one device", name))
    assert one.keys() == other.keys()
    for key, value in one.items():
        if key != "step_ms" and not isinstance(value, str):
            assert other[key] == pytest.approx(value, rel=1e-6), key
    assert losses(done(name)) == pytest.approx(losses(done("one device")), rel=1e-6)
    assert read(name, "test.jsonl") == read("one device", "test.jsonl")


@needs_data
@pytest.mark.once
def test_adapters_of_two_processes_are_those_of_one(done):
    one, two = (
        checkpoint.load_adapters(done(name) / "adapter")
        for name in ("one device", "2 x 4")
    )
    # compared as whole factors: where a gradient is zero up to rounding, Adam's first
    # steps turn the rounding of a sum into a sizeable step of that entry
    for path, adapter in one.items():
        for own, other in ((adapter.a, two[path].a), (adapter.b, two[path].b)):
            assert np.linalg.norm(other - own) < 2e-4 * np.linalg.norm(own)


UNSET = {"coordinator": "", "processes": None, "process": None, "heartbeat": 30}


@pytest.mark.parametrize(
    "config, environ, several",
    [
        ({}, {}, False),
        ({"coordinator": "host:1"}, {}, True),
        ({}, {"JAX_COORDINATOR_ADDRESS": "host:1"}, True),
        ({}, {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, False),
        ({}, {"SLURM_NTASKS": "16"}, False),
        ({}, {"SLURM_NTASKS": "16", "SLURM_STEP_NODELIST": "a,b"}, True),
        ({}, {"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({}, {"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, True),
    ],
)
def test_config_or_environment_ask_for_several_processes(config, environ, several):
    assert distributed.wanted(UNSET | config, environ) is several


def test_config_goes_before_the_environment(monkeypatch):
    told = []
    monkeypatch.setattr(
        "jax.distributed.initialize",
        lambda *args, **kwargs: told.append((args, kwargs)),
    )
    environ = {
        "JAX_COORDINATOR_ADDRESS": "env:1",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "0",
    }
    distributed.initialize(UNSET, {})  # one process: nothing to join
    distributed.initialize(UNSET | {"heartbeat": 5}, environ)
    distributed.initialize(UNSET | {"processes": 2, "process": 0}, environ)
    srun = {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "a,b"}
    distributed.initialize(UNSET, srun)  # JAX finds the rest
    assert told == [
        (("env:1", 4, 0), {"heartbeat_timeout_seconds": 5}),
        (("env:1", 2, 0), {"heartbeat_timeout_seconds": 30}),
        ((None, None, None), {"heartbeat_timeout_seconds": 30}),
    ]


def test_a_batch_that_the_mesh_does_not_divide():
    place = placement.make_place({"data": 4, "tensor": -1})
    assert place.part(8) == slice(0, 8)
    with pytest.raises(ValueError, match="6 rows cannot be split over .* = 4"):
        place.part(6)
    with pytest.raises(ValueError, match="3 devices do not fit the 8"):
        placement.make_place({"data": 3})


def test_several_processes_need_a_mesh(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(
        ValueError, match="2 processes, but config.sharding asks for one"
    ):
        placement.make_place({"data": 1, "fsdp": 1, "tensor": 1})


def test_when_one_process_ends_badly_the_others_are_ended(capfd):
    script = (
        "import os, sys, time; i = int(os.environ['JAX_PROCESS_ID']); "
        "print('here', flush=True); sys.exit(3) if i else time.sleep(60)"
    )
    began = time.monotonic()
    assert launching.launch([sys.executable, "-c", script], 2, 1) == 3
    assert time.monotonic() - began < 30
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] here", "[1] here"]


def test_rules_of_the_config_go_before_the_axes_of_the_family():
    model = llama.Model(llama.Config(16, 8, 8, 2, 2, 2, 4, 8))
    shapes = hf.abstract(model)
    rules = ((".*/up/kernel", (None, "fsdp", None)), ("embed/.*", ()))
    place = placement.make_place({"fsdp": -1, "rules": rules})
    specs = place.params(model, shapes).specs
    assert specs["layers/up/kernel"] == PartitionSpec(None, "fsdp", None)
    assert specs["embed/embedding"] == PartitionSpec(None, None)
    assert specs["layers/down/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    wrong = placement.make_place({"fsdp": -1, "rules": (("embd/.*", ()),)})
    with pytest.raises(ValueError, match="matches no leaf"):
        wrong.params(model, shapes)
