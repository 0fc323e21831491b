"""The real model on the text it was trained on, against transformers."""

import jax
import numpy as np
import optax
import pytest

from experiments.data import batches
from experiments.data.sources import paths, plain_text
from experiments.generation import loading
from tests.data_paths import needs_data


@needs_data
def test_the_loss_on_its_own_text_is_that_of_transformers():
    torch = pytest.importorskip("torch", reason="the reference is torch's")
    transformers = pytest.importorskip("transformers")
    model, params, tokenizer = loading.load_model("stories260k")
    found = plain_text.read(paths.find("tinystories_1000/tinystories_1000.json"))
    texts = [
        plain_text.repair_mojibake(text).replace("\n\n", "\n")
        for text in found.texts[:32]
    ]
    examples = plain_text.windows(tokenizer, texts, 256, "stories")
    rows = batches.evaluation_batches(examples, 16, (256,), 0)
    apply = jax.jit(lambda batch: model.apply({"params": params}, batch["inputs"]))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        paths.find("stories260k")
    ).eval()
    nats, expected, count = 0.0, 0.0, 0.0
    for batch in rows:
        with torch.no_grad():
            logits = theirs(torch.tensor(batch["inputs"])).logits.double()
        logp = torch.log_softmax(logits, -1).numpy()
        chosen = np.take_along_axis(logp, batch["targets"][..., None], -1)[..., 0]
        expected -= (chosen * batch["weights"]).sum()
        own = optax.softmax_cross_entropy_with_integer_labels(
            apply(batch), batch["targets"]
        )
        nats += float((np.asarray(own, np.float64) * batch["weights"]).sum())
        count += batch["weights"].sum()
    assert count > 5_000
    assert abs(nats - expected) / count < 1e-4
    assert 1.2 < nats / count < 1.6  # measured once elsewhere: 1.41 on 100 stories
