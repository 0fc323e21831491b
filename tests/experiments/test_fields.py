"""Every config field has a rule, and a value that breaks it is refused by name."""

import importlib
import math

import pytest

from configs import quickstart
from experiments.reading import checking, fields
from experiments.search import combinations, grid
from lorax import sharding
from tests.experiments.test_configs import FILES

CHECKPOINT = "gpt2_e2e_lora"  # runs experiments.recipes.finetune
BYTES = "quickstart"


def get(name, arg="runlocal", **changed):
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    for field, value in changed.items():
        holder, _, last = field.rpartition(".")
        held = grid.at(config, holder)
        with held.ignore_type():
            held[last] = value
    return config


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("arg", ["", "runlocal"])
def test_every_field_has_a_rule_and_follows_it(name, arg):
    config = get(name, arg)
    config.model.unlock().source = ""  # a data set's folder, which may be missing
    for field, value in fields.leaves(config):
        if not field.startswith(("model.random.", "model.published.")):
            rule = fields.rule_of(field)
            assert rule is not None, f"{field} has no rule in reading/fields.py"
            assert rule.fits(value), (field, value, rule.says)


BAD_NUMBERS = [math.nan, math.inf, -1, True, "8", None, (), {}]


def test_every_numeric_field_refuses_what_is_no_number():
    config = get(CHECKPOINT)
    numeric = {
        field: value
        for field, value in fields.leaves(config)
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert len(numeric) > 35
    allowed = [(f"sharding.{axis}", -1) for axis in sharding.AXES]
    allowed += [("eval.length_penalty", -1), ("optimizer.clip_norm", None)]
    allowed += [("run.loss_chunk", -1), ("run.router_loss", -1)]
    for field in numeric:
        for bad in BAD_NUMBERS:
            if (field, bad) not in allowed:
                assert not fields.rule_of(field).fits(bad), (field, bad)


REFUSED = [
    # values that the command line once crashed on, or accepted
    (
        BYTES,
        "optimizer.learning_rate.lora",
        math.nan,
        "lora=nan; it must be a number",
    ),
    (
        BYTES,
        "optimizer.learning_rate.lora",
        1e30,
        "a number > 0 and <= 1000",
    ),
    (BYTES, "optimizer.learning_rate.full", -1.0, r"learning_rate\.full=-1\.0"),
    (BYTES, "optimizer.b1", 1.5, r"b1=1\.5; it must be a number >= 0 and < 1"),
    (BYTES, "optimizer.warmup_steps", -5, "warmup_steps=-5; it must be an int >= 0"),
    (BYTES, "run.log_every", 0, "log_every=0; it must be an int >= 1"),
    (BYTES, "run.steps", 0, "steps=0; it must be an int >= 1"),
    (
        BYTES,
        "run.methods",
        (),
        "a list of 1 or more, each one of 'lora', 'full'",
    ),
    (BYTES, "run.methods", ("prefix",), "one of 'lora', 'full'"),
    (BYTES, "model.heads", 3, "a multiple of twice the heads"),
    (BYTES, "model.vocabulary", 255, "the model reads bytes"),
    (BYTES, "data.batch_size", 0, "batch_size=0; it must be an int >= 1"),
    (BYTES, "adapter.rank", 0, "rank=0; it must be an int >= 1"),
    (BYTES, "adapter.patterns", (), "give at least one pattern"),
    (BYTES, "adapter.patterns", ("(",), r"config\.adapter: '\(' is no"),
    (BYTES, "adapter.adapter", "lroa", "'lroa'; choose one of adalora, "),
    (BYTES, "adapter.init", "pisa", "init='pisa'; choose one of standard"),
    (BYTES, "adapter.options", (("gama", 1.0),), "has no option gama"),
    (BYTES, "optimizer.name", "adamx", "name='adamx' is not one of adamw"),
    (
        BYTES,
        "optimizer.options",
        ("ratio",),
        "pairs .* a dict is written as",
    ),
    (BYTES, "optimizer.options", (("ratoi", 1),), "argument 'ratoi'"),
    (BYTES, "optimizer.chain", (("adam", {}),), "does not read it; set optimizer.name"),
    (BYTES, "optimizer.wrap", (("adalora", 96),), "give its arguments as a dict"),
    (BYTES, "optimizer.wrap", (("accumulate", {"n": 1}),), "has no option 'n'"),
    (BYTES, "model.pretrain.steps", 0, r"model\.pretrain\.steps=0"),
    (BYTES, "model.pretrain.name", "adamx", "model.pretrain: .*'adamx' is not one of"),
    (
        BYTES,
        "population.rank",
        (4, 0),
        r"rank=\(4, 0\); .* list, each an int >= 1",
    ),
    (CHECKPOINT, "run.save_every", -1, "save_every=-1; it must be an int >= 0"),
    (CHECKPOINT, "run.methods", ("lora", "full"), "trains by one method"),
    (CHECKPOINT, "data.lengths", (), "a list of 1 or more, each an int >= 1"),
    (CHECKPOINT, "data.task", "e3e", "data.task='e3e': give one of e2e, instr"),
    (CHECKPOINT, "data.form", "csv", "form='csv': give one of lora_format, official"),
    (
        CHECKPOINT,
        "model.remat",
        "all",
        "model.remat='all': give one of none, full",
    ),
    (CHECKPOINT, "model.dtype", "int8", "dtype='int8'; it must be one of"),
    (CHECKPOINT, "model.attention", "fast", "must be one of 'plain', 'flash', 'lean'"),
    (CHECKPOINT, "model.dispatch", "sparse", "must be one of '', 'ragged', 'dense'"),
    (CHECKPOINT, "model.source", "", "give a directory or a hub id"),
    (
        CHECKPOINT,
        "model.quantize",
        "int3",
        "the format 'int3' is not one of int8, ",
    ),
    (CHECKPOINT, "model.quantize", "a=nf4,b=c", "the format 'c' is not one of int8, "),
    (CHECKPOINT, "model.quantize", "file", "keeps the codes of a GGUF file"),
    (
        CHECKPOINT,
        "model.source",
        "./nowhere/x",
        "the directory ./nowhere/x does not exist",
    ),
    (CHECKPOINT, "adapter.redistribute", 2.5, "adapter.redistribute=2.5; it must be"),
    (CHECKPOINT, "adapter.redistribute", 2.0, "the init is 'standard'; give 1.0, or"),
    (CHECKPOINT, "sharding.data", 0, "or -1 for what the other axes leave"),
    (CHECKPOINT, "sharding.rules", ((1, 2),), "it must be pairs"),
    (CHECKPOINT, "sharding.context", 2, "attention='plain': .* a ring; give 'flash'"),
    ("roberta_glue_lora", "data.packed", True, "'classification' does not pack"),
]


@pytest.mark.parametrize(("name", "field", "value", "told"), REFUSED)
def test_a_config_that_cannot_be_run_is_refused_by_its_field(name, field, value, told):
    config = get(name, **{field: value})
    if field != "model.source" and "source" in config.model:
        config.model.unlock().source = "hf:some/model"  # not looked up
    with pytest.raises(ValueError, match=told):
        checking.check(config)


def test_rows_that_devices_cannot_share_are_refused():
    config = get(CHECKPOINT, **{"sharding.context": 8, "data.lengths": (128, 96)})
    config.model.attention, config.model.source = "flash", "hf:some/model"
    with pytest.raises(ValueError, match=r"96 tokens are not a multiple of .*=8 squar"):
        checking.check(config)


def test_a_chain_refuses_the_argument_that_a_link_lacks():
    config = get(BYTES, **{"optimizer.name": "chain"})
    config.optimizer.chain = (("adam", {"b3": 1}),)
    with pytest.raises(ValueError, match="'adam' has no option 'b3'; it has b1, b2"):
        checking.check(config)


def test_a_sweep_refuses_at_planning_and_names_the_run():
    config = quickstart.get_config("runlocal")
    runs = combinations.make_runs(config, {"adapter.init": ["standard", "pisa"]})
    with pytest.raises(ValueError, match=r"the run adapter\.init=pisa: .*'pisa'; choo"):
        checking.check_runs((run.told(), run.config) for run in runs)


def test_fields_of_a_config_of_ones_own_pass():
    config = get(BYTES)
    config.unlock()
    config.run.my_field = -1
    checking.check(config)
