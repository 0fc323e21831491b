"""The presets of patterns select the same parts of every family."""

import pytest

from lorax import models, tree
from lorax.interop import hf
from lorax.models import bert, deberta, gpt2, llama, roberta, t5

CONFIGS = {
    "gpt2": gpt2.Config(31, 16, 8, 2, 2, 32),
    "llama": llama.Config(31, 64, 16, 2, 4, 2, 4, 24),
    "roberta": roberta.Config.from_hf({"model_type": "roberta"}),
    "bert": bert.Config.from_hf({"model_type": "bert"}),
    "deberta-v2": deberta.Config(31, width=16, heads=2, layers=2, shared=False),
    "t5": t5.Config.from_hf({"model_type": "t5", "feed_forward_proj": "gated-gelu"}),
}
ATTENTION = {
    "gpt2": {"qkv", "o"},
    "deberta-v2": {"q", "k", "v", "o", "pos_q", "pos_k"},
    "t5": {"q", "k", "v", "o", "cross_q", "cross_k", "cross_v", "cross_o"},
}
MLP = {"llama": {"up", "gate", "down"}, "t5": {"up", "gate", "down"}}


@pytest.mark.parametrize("name", CONFIGS)
def test_presets(name):
    family = models.FAMILIES[name]
    leaves = tree.flatten(hf.abstract(family.Model(CONFIGS[name])))
    select = lambda pattern: {
        path.split("/")[-2] for path in leaves if tree.match(pattern, path)
    }
    attention = ATTENTION.get(name, {"q", "k", "v", "o"})
    assert select(models.ATTENTION) == attention
    assert select(models.MLP) == MLP.get(name, {"up", "down"})
    content = {part for part in attention if not part.startswith("pos_")}
    query_value = {part for part in content if part.split("_")[-1] in ("q", "v")}
    assert select(models.QUERY_VALUE) == query_value
