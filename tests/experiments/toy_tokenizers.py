"""Small `tokenizer.json` directories, made on the spot."""

import json

TEXT = [
    "the cat sat on the mat and the user said hello to the assistant",
    "What is two plus two? It is four. Tell me a story about the old house.",
]
MARKS = ["<|im_start|>", "<|im_end|>", "<|eot|>", "<|head|>", "<|/head|>", "</s>"]


def write(folder, *, bos="<s>", eos="</s>", opens=True, marks=(), **config):
    """A byte-level BPE; `opens` puts BOS before every sequence."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[bos, *MARKS, *marks],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if opens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {eos} $B",
            special_tokens=[(t, tokenizer.token_to_id(t)) for t in (bos, eos)],
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder
