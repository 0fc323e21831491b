"""Every checkpoint config runs end to end: real data, tiny or random models."""

import importlib
import json

import pytest

from experiments.data.sources import glue
from experiments.recipes import finetune
from lorax import checkpoint
from tests.data_paths import needs_data

pytestmark = pytest.mark.once

DRAWN = (
    "roberta_glue_lora",
    "roberta_glue_lora_plus",
    "deberta_v3_glue_lora",
    "deberta_v3_glue_adalora",
    "t5_glue_lora_ga",
    "t5_glue_lora_pro",
)


def config_of(name, steps, **fields):
    config = importlib.import_module(f"configs.{name}").get_config("runlocal").unlock()
    config.run.steps = config.run.log_every = config.eval.every = steps
    config.update_from_flattened_dict(fields)
    return config


@needs_data
@pytest.mark.filterwarnings("ignore:.*cut .* examples")
@pytest.mark.parametrize(
    "name",
    ("roberta_glue_lora", pytest.param("t5_glue_lora_ga", marks=pytest.mark.slow)),
)
def test_a_drawn_model_runs_and_says_that_it_is_no_result(name, tmp_path, capsys):
    config = config_of(
        name, 2, **{"data.train_rows": 64, "data.valid_rows": 16, "eval.rows": 16}
    )
    results = finetune.run(config, str(tmp_path))
    assert results["note"] == finetune.RANDOM
    assert finetune.RANDOM in capsys.readouterr().out
    assert 0 <= results["valid_accuracy"] <= 1
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert checkpoint.load_adapters(tmp_path / "adapter")


@needs_data
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*cut .* examples")
@pytest.mark.parametrize("name", DRAWN)
def test_every_drawn_config_runs_its_twenty_steps(name, tmp_path):
    config = importlib.import_module(f"configs.{name}").get_config("runlocal")
    assert finetune.run(config, str(tmp_path))["note"] == finetune.RANDOM


@needs_data
def test_a_real_checkpoint_learns_and_writes(tmp_path):
    config = config_of(
        "gpt2_e2e_lora",
        6,
        **{
            "data.train_rows": 200,
            "data.valid_rows": 12,
            "data.lengths": (344,),
            "data.batch_size": 8,
            "eval.rows": 8,
            "eval.final_rows": 10,
            "eval.batch_size": 8,
            "eval.test": 2,
            "eval.beams": 2,
            "eval.max_tokens": 8,
        },
    )
    results = finetune.run(config, str(tmp_path))
    assert results["valid_bpb_8"] < results["base_valid_bpb_8"]
    assert results["valid_bpb_10"] > 0 and "valid_bpb_12" not in results
    assert results["test_prompts"] == 2 and "tok:none" in results["bleu_signature"]
    rows = (tmp_path / "test.jsonl").read_text().splitlines()
    assert len(rows) == 2 and json.loads(rows[0])["references"]


@needs_data
@pytest.mark.slow
def test_scores_do_not_depend_on_the_batch_size(tmp_path):
    fields = {"data.train_rows": 8, "data.valid_rows": 33, "data.lengths": (344,)}
    scores = []
    for size in (1, 7, 32):
        config = config_of("gpt2_e2e_lora", 1, **fields, **{"eval.batch_size": size})
        config.eval.test = 0
        scores.append(finetune.score(config, None, tmp_path)["valid_bpb_33"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    assert scores[0] == pytest.approx(scores[2], rel=1e-6)


@needs_data
@pytest.mark.parametrize("name", ["sentence_polarity", "subjectivity", "banking77"])
def test_the_first_rows_are_a_fair_sample(name):
    config = config_of("roberta_glue_lora", 1, **{"data.name": name})
    found = glue.load_split(config.data, "valid")
    first = [row.label for row in found.rows[:400]]
    share = len(set(first)) / len(found.labels)
    assert share > 0.95 and found == glue.load_split(config.data, "valid")
    if len(found.labels) == 2:
        assert 0.4 < sum(first) / 400 < 0.6


@needs_data
def test_a_head_of_another_size_is_refused(tmp_path):
    config = config_of("roberta_glue_lora", 2, **{"model.labels": 5})
    with pytest.raises(ValueError, match="head has 5 labels, but .* has 2"):
        finetune.run(config, str(tmp_path))
