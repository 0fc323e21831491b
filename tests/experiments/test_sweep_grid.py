"""Sweeps: the grid as text, its runs, and which of them run together."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from ml_collections import config_flags

import lorax
from configs import gpt2_e2e_lora
from experiments.recipes import members
from experiments.search import combinations, grid
from lorax import inits
from tests.experiments.sweep_cases import RATE, config_of, runs_of

ROOT = pathlib.Path(__file__).parents[2]


# The grid


def test_values_are_read_as_the_types_of_their_fields():
    read = grid.parse_grid(
        "adapter.rank=2, 8; adapter.alpha=4,0x10,5e-1 ;adapter.init=pissa,'lora_ga';"
        "run.name=7,a=b; adapter.patterns=('a,b;c',),(\"all-linear\", '.*/q')",
        config_of(),
    )
    assert read == {
        "adapter.rank": [2, 8],
        "adapter.alpha": [4.0, 16.0, 0.5],
        "adapter.init": ["pissa", "lora_ga"],
        "run.name": ["7", "a=b"],
        "adapter.patterns": [("a,b;c",), ("all-linear", ".*/q")],
    }
    assert all(type(value) is float for value in read["adapter.alpha"])
    other = gpt2_e2e_lora.get_config("runlocal")
    text = "data.packed=true,False; distributed.processes=2"  # the latter is unset
    assert list(grid.parse_grid(text, other).values()) == [[True, False], [2]]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("adapter.rnak=2", r"no field adapter.rnak; try adapter.rank"),
        ("rank=2", r"no field rank; try adapter.rank"),
        ("xyz.w=2", r"no field xyz.w; try sections adapter, data"),
        ("adapter=2", r"adapter is a section; it has adapter.*, adapter.rank"),
        ("adapter.rank=2,four", r"adapter.rank=four: the field holds int; this is str"),
        ("adapter.rank=8.0", r"rank=8.0: the field holds int; this is float"),
        ("adapter.rank=True", r"rank=True: the field holds int; this is bool"),
        ("adapter.rank=2,", r"adapter.rank=: the field holds int"),
        ("adapter.alpha=big", r"alpha=big: the field holds float; this is str"),
        ("adapter.patterns=all", r"holds tuple, such as \('a', 'b'\) or \(1,\); this"),
        ("adapter.rank=2;adapter.rank=4", "rank is given here and by --grid; keep one"),
        ("run.steps=2", "run.steps is given here and by --config.run.steps; keep one"),
        (f"{RATE}=1,1.0", "has the value 1.0 twice"),
        ("population.rank=(1, 2)", "makes its populations itself; give a field of"),
        ("adapter.rank", "'adapter.rank' has no values; write field=value,value"),
        (" ; ", "--grid is empty; write field=value"),
        ("adapter.patterns=('a',", r"lacks a closing \)"),
        ("run.name='a", "lacks a closing '"),
    ],
)
def test_a_bad_grid_says_what_to_do(text, told):
    with pytest.raises(ValueError, match=told):
        grid.parse_grid(text, config_of(), overridden=["run.steps"])


def test_a_field_that_no_flag_can_set_is_refused():
    config = config_of()
    with config.unlocked():
        config.run.extra = [1, 2]
    with pytest.raises(ValueError, match="run.extra is of type list, which no flag"):
        grid.parse_grid("run.extra=[1]", config)


def test_a_population_of_the_configs_own_is_refused():
    config = config_of(population__rank=(1, 2))
    with pytest.raises(ValueError, match="config.population is set, but a sweep"):
        runs_of(f"{RATE}=1e-3,1e-2", config)


# Runs and jobs


def test_every_combination_is_a_run_with_a_hash_of_all_its_values():
    made = runs_of("adapter.rank=2,4; run.steps=1,3")
    assert [tuple(run.fields.values()) for run in made] == [
        (2, 1),
        (2, 3),
        (4, 1),
        (4, 3),
    ]
    assert len({run.hash for run in made}) == 4
    assert made[1].hash == combinations.digest(config_of(adapter__rank=2, run__steps=3))
    assert made[1].hash != combinations.digest(
        config_of(adapter__rank=2, run__steps=3, data__batch_size=5)
    )


@pytest.fixture
def parsed(monkeypatch):
    """The config that a job's flags give, by the parser of experiments.main."""

    def parse(job, name):
        path = ROOT / "configs" / f"{name}.py"
        argv = ["main", f"--config={path}:runlocal", *job.flags]
        monkeypatch.setattr("sys.argv", argv)  # where the parser looks for overrides
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        values(argv)
        return values.config

    return parse


def test_the_flags_of_a_job_make_its_config_again(parsed):
    given = {"run.name": "it's", "adapter.options": (("gamma", 64.0),)}
    config = config_of(run__name="it's", adapter__options=(("gamma", 64.0),))
    text = f"adapter.init=pissa,standard; {RATE}=5e-3,1e-7; adapter.train_whole=(),"
    made = runs_of(text + "('a','.*/[bc]{1,2}')", config)
    single = combinations.make_jobs(made, given, populations=False)
    assert len(single) == 8
    for job, run in zip(single, made):
        config = parsed(job, "quickstart")
        assert (job.runs, job.name) == ((run,), run.hash)
        assert combinations.digest(config) == run.hash
    together = [j for j in combinations.make_jobs(made, given) if len(j.runs) > 1]
    assert len(together) == 2
    for job in together:
        found = members.members(parsed(job, "quickstart"))
        assert [m.learning_rate for m in found] == [5e-3, 1e-7]
        assert [run.config.optimizer.learning_rate.lora for run in job.runs] == [
            5e-3,
            1e-7,
        ]


def sizes(text, config=None, **options):
    return [
        len(job.runs)
        for job in combinations.make_jobs(runs_of(text, config), {}, **options)
    ]


def test_runs_that_differ_in_members_values_alone_are_a_population():
    text = f"adapter.rank=2,8; {RATE}=5e-3,1e-2; adapter.init=standard,pissa"
    made = combinations.make_jobs(runs_of(text), {})
    assert [len(job.runs) for job in made] == [4, 1, 1, 1, 1]
    assert [bool(job.why) for job in made] == [False, True, True, True, True]
    assert made[0].flags == (
        "--config.population.rank=(2, 2, 8, 8)",
        "--config.population.learning_rate=(0.005, 0.01, 0.005, 0.01)",
        "--config.adapter.init=standard",
    )
    assert sizes(text, populations=False) == [1] * 8
    assert sizes(text, metric="lora.test_bpb") == [4, 1, 1, 1, 1]
    assert sizes(text, metric="full.test_bpb") == [1] * 8
    assert sizes("adapter.rank=1,2,3,4,5", most=2) == [2, 2, 1]
    # run.seed also seeds the base and the batches
    assert sizes("run.seed=0,1; adapter.alpha=1,2") == [2, 2]
    assert sizes(f"{RATE}=0,1e-3,1e-2") == [1, 2]
    assert sizes("adapter.rank=1,2", config_of(run__methods=("full", "lora"))) == [1, 1]
    assert sizes("adapter.rank=1,2", config_of(run__methods=("lora",))) == [2]
    padded = f"adapter.rank=2,4; {RATE}=1e-3,1e-2"
    assert sizes(padded, config_of(adapter__adapter="dora")) == [4]
    assert sizes(padded, config_of(adapter__adapter="adalora")) == [2, 2]
    assert sizes(padded, config_of(optimizer__name="muon")) == [2, 2]


def test_runs_from_a_checkpoint_go_alone(parsed):
    text = f"adapter.rank=2,4; {RATE}=1e-3,1e-2"
    made = runs_of(text, gpt2_e2e_lora.get_config("runlocal"))
    given = {"data.packed": True}
    whole = combinations.make_jobs(made, given)
    assert [len(job.runs) for job in whole] == [1] * 4
    assert whole[0].flags[0] == "--config.data.packed=true"
    config = parsed(whole[3], "gpt2_e2e_lora")
    assert (config.adapter.rank, config.data.packed) == (4, True)


@pytest.mark.parametrize("init", inits.REGISTRY)
def test_which_inits_share_the_base(init):
    params = {"w": jnp.eye(4, 3)}
    target = lorax.Target("w", rank=2, init=init)
    if inits.REGISTRY[init].stats is None:
        shares = lorax.init(jax.random.key(0), params, [target])[1] is params
        assert inits.REGISTRY[init].keeps_base == shares


def test_the_list_says_how_runs_are_grouped():
    made = runs_of("adapter.rank=2,8; adapter.init=standard,pissa")
    told = combinations.describe(made, combinations.make_jobs(made[:3], {}), 2)
    assert "4 runs: 1 finished before, 3 to do in 2 processes, 2 at once" in told
    assert "population of 2\n    adapter.rank=2, adapter.init=standard\n" in told
    assert "alone (adapter.init=pissa does not leave the base as it is)" in told
    assert "alpha is as given" in told and "only lora, not full" in told
    made = runs_of(
        "adapter.rank=2,8; adapter.alpha=2,8", config_of(run__methods=("lora",))
    )
    told = combinations.describe(made, combinations.make_jobs(made, {}), 1)
    assert "alpha is as given" not in told and "alone" not in told
