"""Small `tokenizer.json` directories, made on the fly."""

import json

TEXT = [
    "the cat sat on the mat and the user said hello to the assistant",
    "What is two plus two? It is four. Tell me a story about the old house.",
]
MARKS = ["<|im_start|>", "<|im_end|>", "<|eot|>", "<|head|>", "<|/head|>", "</s>"]


def write_unigram(folder):
    """What transformers saves for DeBERTa-v3: the pieces of a unigram model."""
    import transformers

    marks = [(mark, 0.0) for mark in ("[PAD]", "[CLS]", "[SEP]", "[UNK]")]
    words = sorted({f"▁{word}" for line in TEXT for word in line.split()})
    letters = sorted({letter for line in TEXT for letter in f"▁{line}"} - {" "})
    pieces = [(word, -float(len(word))) for word in words]
    pieces += [(letter, -9.0) for letter in letters if letter not in words]
    made = transformers.DebertaV2Tokenizer(
        vocab=[*marks, *pieces, ("[MASK]", 0.0)], unk_id=3
    )
    made.save_pretrained(folder)
    return folder


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
