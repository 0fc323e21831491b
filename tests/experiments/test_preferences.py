"""Preference and distillation tasks: rows, batches, losses, whole runs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from configs import common, gpt2_e2e_lora
from experiments.data import compared, examples, preferences, tokenization
from experiments.data.chat import templates
from experiments.generation import loading
from experiments.machine import placement
from experiments.reading import checking
from experiments.recipes import finetune
from experiments.tasks import distillation
from tests.data_paths import needs_data
from tests.experiments import chat_templates

USER = {"role": "user", "content": "hi"}


def said(text):
    return [{"role": "assistant", "content": text}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": said("a"), "rejected": said("b")},
        {"chosen": [USER, *said("a")], "rejected": [USER, *said("b")]},
        {"prompt": "hi", "chosen": [USER, *said("a")], "rejected": [USER, *said("b")]},
    ],
)
def test_a_prompt_of_chats_may_be_what_they_open_with(row, tmp_path):
    (found,) = preferences.read_pairs(write(tmp_path / "x.jsonl", [row])).rows
    assert found == preferences.Row([USER], (said("a"), said("b")))


def test_an_answer_that_both_chats_begin_with_is_not_the_prompt(tmp_path):
    more = [USER, *said("a"), USER]
    row = {"chosen": [*more, *said("b")], "rejected": [*more, *said("c")]}
    short = {"chosen": [USER, *said("a")], "rejected": [USER, *said("a"), *said("d")]}
    path = write(tmp_path / "x.jsonl", [row, short])
    one, two = preferences.read_pairs(path).rows
    assert one.prompt == more and one.completions == (said("b"), said("c"))
    assert two.prompt == [USER] and two.completions[1] == [*said("a"), *said("d")]


TEXTS = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.filterwarnings("ignore:.*malformed")
@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({**TEXTS, "rejected": "a"}, "'chosen' and 'rejected' are the same"),
        ({**TEXTS, "rejected": " "}, "'rejected' is empty"),
        ({**TEXTS, "chosen": said("a")}, "'prompt' is str and 'chosen' list"),
        ({"chosen": "a", "rejected": "b"}, "'prompt' is NoneType and 'chosen' str"),
        ({"chosen": "a"}, "no 'rejected'"),
        (
            {"prompt": [USER, *said("x")], "chosen": said("a"), "rejected": said("b")},
            "'prompt' ends with an assistant message",
        ),
        (
            {"prompt": [USER], "chosen": [USER], "rejected": said("b")},
            "'chosen' does not begin with an assistant message",
        ),
        (
            {"prompt": "ho", "chosen": [USER, *said("a")], "rejected": [USER]},
            "do not begin with the same prompt",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_told(row, told, tmp_path):
    path = write(tmp_path / "x.jsonl", [TEXTS, row])
    found = preferences.read_pairs(path)
    assert len(found.rows) == 1
    assert told in found.malformed[0] and "x.jsonl:2" in found.malformed[0]


@pytest.mark.filterwarnings("ignore:.*malformed")
def test_labels_are_true_or_false(tmp_path):
    good = {"prompt": "p", "completion": "a", "label": False}
    path = write(tmp_path / "x.jsonl", [good, {**good, "label": 1}])
    found = preferences.read_judged(path)
    assert found.rows == (preferences.Row("p", ("a",), False),)
    assert "'label' is 1; expected true or false" in found.malformed[0]


def never():
    raise AssertionError("no chat asked for a template")


def encoder(template="{prompt}: "):
    return compared.Encoder(tokenization.ByteTokenizer(), template, never)


def test_a_pair_is_one_row_of_a_batch_with_its_prompt_unseen():
    rows = [preferences.Row("p", ("abc", "x"))]
    (example,) = compared.pairs(encoder(), rows, 8, "train").examples
    row = compared.collate(example, 8, 0)
    assert row["inputs"].shape == (2, 8)
    targets = row["targets"] * row["weights"].astype(int)
    end = tokenization.ByteTokenizer.eos_id
    assert targets.tolist() == [
        [0, 0, 0, *b"abc", end, 0],
        [0, 0, 0, *b"x", end, 0, 0, 0],
    ]


def test_what_is_cut_short_is_counted_and_what_is_lost_is_told():
    rows = [
        preferences.Row(*row) for row in (("p", ("abcdef", "x")), ("p", ("a", "x")))
    ]
    found = compared.pairs(encoder(), rows, 6, "train")
    assert found.truncated == 1 and len(found.examples) == 2
    assert found.examples[0]["loss_mask"].sum(1).tolist() == [3, 2]
    assert found.examples[0]["bytes"].tolist() == [3, 1]
    with pytest.warns(UserWarning, match="dropped 1 of 2"):
        lost = [preferences.Row("p" * 8, ("a", "b")), rows[1]]
        assert len(compared.pairs(encoder(), lost, 6, "train").examples) == 1


def test_completions_judged_alone_have_that_of_another_row_beside_them():
    rows = [preferences.Row(c, (c * 2,), c < "d") for c in "abcdef"]
    found = compared.judged(encoder("{prompt}"), rows, 9, "train", seed=0).examples
    text = tokenization.ByteTokenizer().decode
    own, other = ([text(e["tokens"][i]) for e in found] for i in (0, 1))
    strip = lambda texts: [t.replace("\0", "") for t in texts]
    assert strip(own) == [c * 3 for c in "abcdef"]
    others = strip(other)
    assert [t[0] for t in others] == [*"abcdef"]
    assert sorted(t[1] for t in others) == [*"abcdef"]
    assert all(t[0] != t[1] for t in others)
    assert [bool(e["desirable"]) for e in found] == [True] * 3 + [False] * 3
    with pytest.raises(ValueError, match="a single row has no other"):
        compared.judged(encoder("{prompt}"), rows[:1], 9, "train", seed=0)


def test_of_a_chat_only_what_comes_after_the_prompt_is_trained_on():
    tokenizer = tokenization.ByteTokenizer()
    template = templates.ChatTemplate(chat_templates.CHATML, "chatml", {})
    encode = compared.Encoder(tokenizer, "{prompt}", lambda: template)
    prompt = [USER, *said("first"), USER]
    example = encode(prompt, said("last"))
    (text,) = examples.trained_text(tokenizer, example)
    assert text == "last<|im_end|>" and int(example["bytes"]) == 4
    whole = templates.encode_chat(tokenizer, template, [*prompt, *said("last")])
    assert example["tokens"].tolist() == whole["tokens"].tolist()
    assert [*examples.trained_text(tokenizer, whole)][0].startswith("first")
    with pytest.raises(ValueError, match="these are chats"):
        compared.Encoder(tokenizer, "{prompt}\n", lambda: template)(prompt, said("x"))
    with pytest.raises(ValueError, match="expected it to hold '{prompt}' once"):
        compared.Encoder(tokenizer, "Q: ", never)


DRAWN = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def config_of(loss, folder, rows):
    """A config that runs a random model on rows of a file."""
    config = common.checkpoint_run()
    config.run.name, config.run.loss, config.run.steps = "toy", loss, 16
    config.run.log_every = 8
    config.model.random = DRAWN
    config.optimizer.learning_rate.lora = 3e-2
    config.optimizer.warmup_steps = 1
    config.data.task, config.data.template = "preferences", "{prompt}"
    path = write(folder / "rows.jsonl", rows)
    config.data.train = config.data.valid = str(path)
    config.data.lengths, config.data.batch_size = (16,), 4
    config.eval.every, config.eval.batch_size = 0, 5
    return config.lock()


PAIRS = [{"prompt": c, "chosen": "aa" + c, "rejected": "bbb" + c} for c in "pqrstuvw"]


SLOW = pytest.mark.slow


@pytest.mark.once
@pytest.mark.parametrize(
    "loss",
    [
        "dpo",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("ipo", "orpo", "simpo")),
    ],
)
def test_a_run_on_pairs_learns_what_is_chosen(loss, tmp_path):
    config = config_of(loss, tmp_path, PAIRS)
    checking.check(config)
    results = finetune.run(config, str(tmp_path))
    assert results["valid_loss"] < results["base_valid_loss"]
    assert results["valid_rewards/accuracies"] == 1
    assert results["valid_rewards/margins"] > 0
    assert results["train_cut_short"] == results["valid_cut_short"] == 0
    if loss in ("dpo", "ipo"):
        assert results["base_valid_rewards/margins"] == pytest.approx(0, abs=1e-5)
    if loss == "dpo":
        assert results["base_valid_loss"] == pytest.approx(np.log(2), abs=1e-6)
        # read again, scored again
        again = finetune.score(config, str(tmp_path / "adapter"), tmp_path)
        name = "valid_rewards/margins"
        assert again[name] == pytest.approx(results[name], abs=1e-5)


@pytest.mark.once
@SLOW
def test_a_run_on_judged_rows_parts_them(tmp_path):
    rows = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for name in ("chosen", "rejected")
        for row in PAIRS
    ]
    config = config_of("kto", tmp_path, rows)
    checking.check(config)
    results = finetune.run(config, str(tmp_path))
    assert results["base_valid_loss"] == pytest.approx(0.5, abs=1e-6)
    assert results["valid_loss"] < 0.49 and results["valid_rewards/margins"] > 0.1
    assert results["valid_kl"] >= 0


def test_losses_and_options_that_a_task_has_not_are_named(tmp_path):
    config = config_of("dpo", tmp_path, PAIRS).unlock()
    for fields, told in (
        ({"run.loss": "ppo"}, "run.loss='ppo': give '' for .* 'preferences'"),
        ({"run.loss_options": (("gamma", 1.0),)}, "run.loss_options: .*gamma"),
        ({"run.loss_options": (("beta", 0.0),)}, "beta=0.0; it must be above 0"),
        ({"run.label_smoothing": 0.1}, "run.label_smoothing=0.1: it applies only"),
        ({"model.teacher": "gpt2"}, "'distillation' needs a teacher"),
        ({"data.packed": True}, "task 'preferences' does not pack examples"),
        ({"data.task": "e2e", "data.form": "official", "run.loss": "dpo"}, "'e2e', or"),
        (
            {
                "data.task": "classification",
                "data.name": "x",
                "run.loss": "",
                "run.loss_options": (("beta", 1.0),),
            },
            "default loss of the task 'classification' has no options",
        ),
    ):
        other = config.copy_and_resolve_references().unlock()
        for name, value in fields.items():
            section, _, field = name.partition(".")
            other[section][field] = value
        with pytest.raises(ValueError, match=told):
            checking.check(other)


def taught(tmp_path, monkeypatch, **teacher):
    """The config of a student with a random teacher, read from `model.teacher`."""
    rows = [{"prompt": r["prompt"], "response": r["chosen"]} for r in PAIRS]
    config = config_of("distillation", tmp_path, rows).unlock()
    config.data.task = "instructions"
    config.run.loss_options, config.run.log_every = (("beta", 0.5),), 1
    config.model.teacher = str(tmp_path)
    load = loading.load_base

    def either(own, key, *args, **kwargs):
        if own.source:
            own = own.copy_and_resolve_references()
            own.random, own.source = {**DRAWN, **teacher}, ""
        return load(own, key, *args, **kwargs)

    monkeypatch.setattr(loading, "load_base", either)
    return config.lock()


@pytest.mark.once
@SLOW
def test_a_student_comes_nearer_to_a_wider_teacher(tmp_path, monkeypatch):
    config = taught(tmp_path, monkeypatch, hidden_size=32, vocab_size=272)
    checking.check(config)
    finetune.run(config, str(tmp_path))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    told = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert 0 < told[-1] < 0.9 * told[0]


def test_a_teacher_with_fewer_tokens_is_refused(tmp_path, monkeypatch):
    config = taught(tmp_path, monkeypatch, vocab_size=200)
    model = SimpleNamespace(config=SimpleNamespace(vocabulary=259))
    with pytest.raises(ValueError, match="has 200 tokens and the student 259"):
        distillation.make(config, model, tokenization.ByteTokenizer())


@needs_data
def test_a_teacher_with_another_tokenizer_is_refused():
    config = gpt2_e2e_lora.get_config("runlocal").model.copy_and_resolve_references()
    config.unlock().teacher = "stories260k"
    with pytest.raises(ValueError, match="'stories260k' has another tokenizer than"):
        distillation.load(config, tokenization.ByteTokenizer(), placement.ALONE)
