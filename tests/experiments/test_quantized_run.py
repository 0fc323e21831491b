"""A run from a checkpoint on a quantised base: train, evaluate, generate, export."""

import pytest

import lorax
from experiments.generation import (
    continuations,
    exporting,
    loading,
    quantizing,
    unmerged,
)
from experiments.reading import checking
from experiments.recipes import finetune
from experiments.trainer import metrics
from lorax import checkpoint
from tests.data_paths import needs_data
from tests.experiments.test_finetune import config_of

pytestmark = [pytest.mark.once, needs_data]
SIZES = {
    "data.train_rows": 64,
    "data.valid_rows": 12,
    "data.lengths": (344,),
    "data.batch_size": 8,
    "eval.rows": 8,
    "eval.final_rows": 8,
    "eval.test": 0,
    "model.quantize": "all-linear=int8",
}


@pytest.mark.parametrize(
    "init", ["standard", pytest.param("pissa", marks=pytest.mark.slow)]
)
def test_a_run_keeps_its_base_packed(init, tmp_path):
    config = config_of("gpt2_e2e_lora", 3, **SIZES, **{"adapter.init": init})
    checking.check(config)
    results = finetune.run(config, str(tmp_path))
    assert results["valid_bpb_8"] < results["base_valid_bpb_8"]
    adapters = checkpoint.load_adapters(tmp_path / "adapter")
    assert (tmp_path / "initial").exists() == (init == "pissa")
    model, dense, tokenizer = loading.load_model(config.model.source)
    if init == "standard":  # the packed base is the source, quantised
        again = finetune.score(config, str(tmp_path / "adapter"), tmp_path)
        assert again["valid_bpb_8"] == pytest.approx(results["valid_bpb_8"], rel=1e-5)
        _, base, _ = loading.load_model(config.model.source, "int8")
        other = "adapters were made for another base"
        with pytest.raises(ValueError, match=other):
            loading.load_adapters(str(tmp_path / "adapter"), model, dense)
        adapters, base = loading.load_adapters(str(tmp_path / "adapter"), model, base)
        write = continuations.make_writer(model, tokenizer, ["name"], 8, batch=1)
        merged = lorax.merge(adapters, base)
        assert write(unmerged.Unmerged(adapters, base)) == write(merged)
    source, trained = config.model.source, str(tmp_path / "adapter")
    exporting.export(source, trained, str(tmp_path / "out"), "merged", quantize="int8")
    _, params, _ = loading.load_model(str(tmp_path / "out"))
    assert not quantizing.packed(params)
    share = results["trainable"] / metrics.size(params)
    assert results["trainable_share"] == pytest.approx(share)
    config.model.update(source=str(tmp_path / "out"), quantize="")
    exported = finetune.score(config, None, tmp_path)["valid_bpb_8"]
    assert exported == pytest.approx(results["valid_bpb_8"], rel=1e-4)


def test_what_a_quantised_base_cannot_do_is_refused_first():
    config = config_of("gpt2_e2e_lora", 1, **SIZES)
    config.run.methods = ("full",)
    with pytest.raises(ValueError, match=r"a quantised base does not train; give"):
        checking.check(config)
