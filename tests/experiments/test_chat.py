"""Chats: tokens as in transformers, and what is trained on, decoded."""

import json

import numpy as np
import pytest

from experiments.data import tokenization
from experiments.data.chat import templates
from tests.experiments import chat_templates, toy_tokenizers

pytest.importorskip("tokenizers", reason="needs the interop extra: tokenizers, jinja2")
pytest.importorskip("jinja2", reason="needs the interop extra: tokenizers, jinja2")

ONE_TURN = [
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "It is four."},
]
CHATS = {
    "one turn": ONE_TURN,
    "system": [{"role": "system", "content": "Be brief é."}, *ONE_TURN],
    "two turns": [
        *ONE_TURN,
        {"role": "user", "content": " And\n\nthree? 😀 "},
        {"role": "assistant", "content": "Six <b> & 'so'."},
    ],
}


CALL = [{"type": "function", "function": {"name": "add", "arguments": {}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_tokenizers.write(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokenization.load(folder)


def template(name, tokenizer):
    return templates.ChatTemplate(
        chat_templates.ALL[name], name, tokenizer.special_tokens
    )


each_template = pytest.mark.parametrize("name", sorted(chat_templates.ALL))
each_chat = pytest.mark.parametrize("messages", CHATS.values(), ids=list(CHATS))


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = pytest.importorskip("transformers", reason="needs the golden extra")
    return transformers.AutoTokenizer.from_pretrained(folder)


@each_template
@each_chat
def test_tokens_equal_those_of_transformers(tokenizer, theirs, name, messages):
    expected = lambda chat, more: theirs.apply_chat_template(
        chat,
        chat_template=chat_templates.ALL[name],
        add_generation_prompt=more,
        return_dict=False,
    )
    ours = template(name, tokenizer)
    example = templates.encode_chat(tokenizer, ours, messages)
    assert example["tokens"].tolist() == expected(messages, False)
    prompt = messages[:-1]
    assert templates.prompt_ids(tokenizer, ours, prompt) == expected(prompt, True)


def test_generation_blocks_mark_what_they_mark_in_transformers(tokenizer, theirs):
    for messages in CHATS.values():
        expected = theirs.apply_chat_template(
            messages,
            chat_template=chat_templates.GENERATION,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )["assistant_masks"]
        example = templates.encode_chat(
            tokenizer, template("generation", tokenizer), messages
        )
        assert example["loss_mask"].tolist() == expected


@each_template
@each_chat
def test_what_is_trained_on_decoded(tokenizer, name, messages):
    example = templates.encode_chat(tokenizer, template(name, tokenizer), messages)
    # the tokens as they are, special ones too
    text = lambda keep: tokenizer._tokenizer.decode(
        example["tokens"][example["loss_mask"] == keep].tolist(),
        skip_special_tokens=False,
    )
    end = chat_templates.END[name]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    gap = " " if name == "inst" else ""  # it puts spaces around the answer
    assert text(1) == "".join(f"{gap}{answer}{gap}{end}" for answer in answers)
    for message in messages:
        told = message["content"].strip()
        assert (told in text(0)) == (message["role"] != "assistant")
    assert example["bytes"] == len("".join(answers).encode())


@each_template
def test_bos_is_never_doubled(tokenizer, name):
    example = templates.encode_chat(tokenizer, template(name, tokenizer), ONE_TURN)
    assert (example["tokens"] == tokenizer.bos_id).sum() == (
        1 if "bos_token" in chat_templates.ALL[name] else 0
    )


# What ends a turn

TOOLS = [
    *ONE_TURN,
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "So four."},
]
SIX = "Six <b> & 'so'."


@pytest.fixture(scope="module")
def roles(tmp_path_factory):
    """A tokenizer with role marks as tokens."""
    marks = ["<|user|>", "<|assistant|>", "<|tool|>", "<|eom|>"]
    folder = toy_tokenizers.write(tmp_path_factory.mktemp("roles"), marks=marks)
    return tokenization.load(folder)


def trained(tokenizer, example):
    """The stretches of tokens in the loss, special ones included."""
    mask = np.concatenate([[0], example["loss_mask"], [0]])
    edges = np.flatnonzero(np.diff(mask)).reshape(-1, 2)
    runs = [example["tokens"][begin:end].tolist() for begin, end in edges]
    show = lambda run: tokenizer._tokenizer.decode(run, skip_special_tokens=False)
    return runs, [show(run) for run in runs]


@pytest.mark.parametrize(
    "source, messages, expected",
    [
        ("ROLES", ONE_TURN, ["It is four.\n<|user|>"]),
        (
            "ROLES",
            CHATS["two turns"],
            ["It is four.\n<|user|>", f"{SIX}\n<|user|>"],
        ),
        ("ROLES", TOOLS, ["It is four.\n<|tool|>", "So four.\n<|user|>"]),
        ("ROLES", TOOLS[:3], ["It is four.\n<|tool|>"]),
        ("SHORT", CHATS["two turns"], ["It is four.<|im_end|>", f"{SIX}<|im_end|>"]),
        (
            "CALLS",
            [{**m, "tool_calls": CALL} if i == 1 else m for i, m in enumerate(TOOLS)],
            ["It is four.add<|eom|>", "So four.<|eot|>"],
        ),
    ],
)
def test_the_mark_that_ends_a_turn_is_trained_on(roles, source, messages, expected):
    """And generation stops at it: the turn's own mark, or the next role's."""
    ours = templates.ChatTemplate(
        getattr(chat_templates, source), source, roles.special_tokens
    )
    assert chat_templates.SHORT != chat_templates.GENERATION
    runs, texts = trained(roles, templates.encode_chat(roles, ours, messages))
    assert texts == expected
    ends = templates.turn_ends(roles, ours)
    assert all(run[-1] in ends.ids for run in runs) and not ends.texts
    # Only the last token trained on ends the turn.
    assert not any(set(run[:-1]) & set(ends.ids) for run in runs)


@each_template
def test_generation_stops_where_training_ends(tokenizer, name):
    ends = templates.turn_ends(tokenizer, template(name, tokenizer))
    token = tokenizer._tokenizer.token_to_id(chat_templates.END[name])
    assert (ends.ids, ends.texts, ends.closing) == ((token,), (), "")


@pytest.mark.parametrize("source", ["ROLES", "QUOTES"])
def test_a_turn_that_nothing_ends_is_refused(tokenizer, source):
    """Role marks are not tokens here, and any answer may contain a quote."""
    text = chat_templates.ROLES
    if source == "QUOTES":
        text = text.replace("+ message.content +", "+ '\"' + message.content + '\"' +")
    endless = templates.ChatTemplate(text, "m/endless.jinja", tokenizer.special_tokens)
    told = (
        r"m/endless.jinja: nothing ends a turn.*Write \{\{ eos_token \}\}, here '</s>'"
    )
    with pytest.raises(templates.ChatTemplateError, match=told):
        templates.encode_chats(tokenizer, endless, [ONE_TURN], 64, "a.jsonl")
    # As the message says:
    fixed = text.replace(" + '\\n' -}}", " + eos_token + '\\n' -}}")
    ours = templates.ChatTemplate(fixed, "fixed", tokenizer.special_tokens)
    (run,), _ = trained(tokenizer, templates.encode_chat(tokenizer, ours, ONE_TURN))
    assert run[-1] == tokenizer.eos_id


def test_a_turn_that_ends_like_no_other_is_named(tokenizer):
    """Here only the second one has its mark."""
    source = chat_templates.GENERATION.replace(
        "content + '<|im_end|>'", "content + ('<|im_end|>' if loop.last else '.')"
    )
    odd = templates.ChatTemplate(source, "odd.jinja", tokenizer.special_tokens)
    with pytest.raises(
        templates.ChatTemplateError, match=r"odd.jinja: nothing ends turn 1 "
    ):
        templates.encode_chat(tokenizer, odd, CHATS["two turns"])


def test_bytes_give_the_same_spans():
    tokenizer = tokenization.ByteTokenizer()
    example = templates.encode_chat(
        tokenizer, template("chatml", tokenizer), CHATS["system"]
    )
    trained = example["tokens"][example["loss_mask"] == 1].tolist()
    assert tokenizer.decode(trained) == "It is four.<|im_end|>"
    ends = templates.turn_ends(tokenizer, template("chatml", tokenizer))
    assert (ends.ids, ends.texts) == ((), ("<|im_end|>",))


def test_long_chats_are_cut_and_dropped(tokenizer):
    ours = template("headers", tokenizer)
    whole = templates.encode_chat(tokenizer, ours, ONE_TURN)
    begin = int(np.argmax(whole["loss_mask"]))
    long = [{"role": "user", "content": "old house " * 50}, ONE_TURN[1]]
    with pytest.warns(UserWarning, match="a.jsonl: dropped 1 of 2 .*; 1 more lost"):
        encoded = templates.encode_chats(
            tokenizer, ours, [ONE_TURN, long], begin + 1, "a.jsonl"
        )
    (example,) = encoded.examples
    assert example["loss_mask"].tolist() == [0] * begin + [1, 1]


def test_a_template_that_looks_ahead_must_mark_what_is_generated(tokenizer):
    source = chat_templates.GENERATION
    source = source.replace("{%- generation -%}", "").replace(
        "{%- endgeneration -%}", ""
    )
    messages = [dict(m) for m in CHATS["two turns"]]
    messages[1]["content"] = "<think>hm</think>It is four."
    ahead = templates.ChatTemplate(source, "ahead.jinja", tokenizer.special_tokens)
    with pytest.raises(
        templates.ChatTemplateError,
        match=r"ahead.jinja: .*message 1 changes.*% generation %",
    ):
        templates.encode_chat(tokenizer, ahead, messages)
    marked = templates.encode_chat(
        tokenizer, template("generation", tokenizer), messages
    )
    trained = marked["tokens"][marked["loss_mask"] == 1].tolist()
    assert tokenizer.decode(trained) == "It is four.Six <b> & 'so'."


def test_messages_are_not_changed_and_none_is_left_out(tokenizer):
    messages = [{"role": "user", "content": "a", "tool_calls": None}]
    source = "{{ 'tool_calls' in messages[0] }}"
    assert templates.ChatTemplate(source, "x", {}).render(messages).text == "False"
    assert messages[0]["tool_calls"] is None


def test_where_a_directory_keeps_its_template(tmp_path, tokenizer):
    config = tmp_path / "tokenizer_config.json"
    with pytest.raises(
        templates.ChatTemplateError, match="neither chat_template.jinja, nor"
    ):
        templates.load(tmp_path, tokenizer)
    render = lambda: templates.load(tmp_path, tokenizer).render(ONE_TURN).text
    config.write_text(json.dumps({"chat_template": "one{{ eos_token }}"}))
    assert render() == "one</s>"
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert render() == "d"
    for odd, message in (
        ('["x"]', "holds list, not an object"),
        ('{"chat_template": [3]}', r"chat_template\[0\]=3; it must be an object"),
        ('{"chat_template": [{"name": {}}]}', r"\[0\].name={}; it must be text"),
        ('{"chat_template": [{"name": "x"}]}', r"\[0\]: there is no 'template'"),
    ):
        config.write_text(odd)
        with pytest.raises(ValueError, match=f"tokenizer_config.json: .*{message}"):
            templates.load(tmp_path, tokenizer)
    (tmp_path / "chat_template.jinja").write_text("file")
    assert render() == "file"


def test_errors_name_the_template(tokenizer):
    with pytest.raises(
        templates.ChatTemplateError, match=r"m/x.jinja:2: not a chat template"
    ):
        templates.ChatTemplate("\n{% for %}", "m/x.jinja", {})
    with pytest.raises(
        templates.ChatTemplateError, match="inst: .*roles must alternate"
    ):
        template("inst", tokenizer).render(ONE_TURN[::-1])
    with pytest.raises(
        templates.ChatTemplateError, match=r"x: .*UndefinedError.*'content'"
    ):
        templates.ChatTemplate("{{ messages[0].content + 'a' }}", "x", {}).render(
            [{"role": "user"}]
        )
