"""Labelled images: sets by hand, preprocessor configs, and a run on the digits."""

import json

import ml_collections
import numpy as np
import pytest

from configs import vit_digits_lora
from experiments.data.vision import image_sets, look
from experiments.recipes import finetune
from experiments.studies import vit_digits as study

SETTINGS = {"name": "", "classes": (), "held_out": 0.25, "split_seed": 0}


def data(name, **fields):
    return ml_collections.ConfigDict({**SETTINGS, "name": str(name), **fields})


def write(path, pixels, labels):
    np.savez(path, images=np.asarray(pixels), labels=np.asarray(labels))
    return path


def test_arrays_are_split_by_class(tmp_path):
    pixels = np.arange(16, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    path = write(tmp_path / "set.npz", pixels, np.repeat([0, 1], 8))
    parts = image_sets.load(data(path))
    assert {name: len(part.labels) for name, part in parts.items()} == {
        "train": 12,
        "valid": 4,
    }
    for part in parts.values():
        assert sorted(np.bincount(part.labels)) == [len(part.labels) // 2] * 2
    seen = [p[0, 0, 0] for part in parts.values() for p in part.pixels]
    np.testing.assert_allclose(sorted(seen), np.arange(16) / 255, rtol=1e-6)
    other = image_sets.load(data(path, split_seed=1))["valid"]
    assert [p[0, 0, 0] for p in other.pixels] != seen[12:]


def test_files_that_are_split_and_classes_that_are_chosen(tmp_path):
    pixels = np.linspace(0, 1, 3)[:, None, None, None] * np.ones((1, 2, 2, 3))
    for split in ("train", "valid"):
        write(tmp_path / f"{split}.npz", pixels, [0, 2, 1])
    found = image_sets.load(data(tmp_path, classes=(2, 0)))["train"]
    assert found.names == ("2", "0") and found.labels.tolist() == [1, 0]
    assert [float(p[0, 0, 0]) for p in found.pixels] == [0, 0.5]
    with pytest.raises(ValueError, match="there is no class 7; the set has"):
        image_sets.load(data(tmp_path, classes=(7,)))


def test_a_folder_for_every_class(tmp_path):
    library = pytest.importorskip("PIL.Image", reason="needs the experiments extra")
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i, mode in enumerate(("L", "RGB")):
            image = library.new(mode, (3, 2), 51 * (1 + label) * (1, (1, 1, 1))[0])
            image.save(tmp_path / name / f"{i}.png")
        (tmp_path / name / "notes.txt").write_text("no image")
    found = image_sets.folders(tmp_path)
    assert found.names == ("cat", "dog") and found.labels.tolist() == [0, 0, 1, 1]
    assert [p.shape for p in found.pixels[:2]] == [(2, 3, 1), (2, 3, 3)]
    assert [float(p.flat[0]) for p in found.pixels[::2]] == pytest.approx([0.2, 0.4])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: a class without images"):
        image_sets.folders(tmp_path)


REFUSED = {
    r"\['labels'\] are missing": {"images": np.zeros((2, 2, 2))},
    r"images \(2, 2\)": {"images": np.zeros((2, 2)), "labels": np.zeros(2, int)},
    "labels float64": {"images": np.zeros((2, 2, 2)), "labels": np.zeros(2)},
    "from 0.0 to 255.0; give bytes": {
        "images": np.array([0.0, 255.0])[:, None, None],
        "labels": np.zeros(2, int),
    },
    "label -1; number classes from 0": {
        "images": np.zeros((2, 2, 2)),
        "labels": np.array([0, -1]),
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_arrays_that_are_no_labelled_images(message, tmp_path):
    np.savez(tmp_path / "set.npz", **REFUSED[message])
    with pytest.raises(ValueError, match=message):
        image_sets.load(data(tmp_path / "set.npz"))


def preprocessor(folder, **fields):
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return folder


def test_pixels_are_those_of_transformers(tmp_path):
    library = pytest.importorskip("transformers", reason="needs the golden extra")
    pytest.importorskip("torch", reason="needs the golden extra")
    fields = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.5]}
    fields |= {"size": {"height": 6, "width": 6}, "resample": 2}
    theirs = library.ViTImageProcessor(**fields)
    theirs.save_pretrained(tmp_path)
    seen = look.look_of(tmp_path, 6, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    want = theirs(pixels, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(seen(pixels / np.float32(255)), want, atol=1e-6)
    big = np.random.default_rng(1).integers(0, 256, (12, 9, 3), np.uint8)
    want = theirs(big, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    # theirs rounds to bytes after resizing
    np.testing.assert_allclose(seen(big / np.float32(255)), want, atol=0.02)


def test_what_a_preprocessor_says(tmp_path):
    assert look.look_of(None, 8, 1) == look.Look(8, 1, (0.5,), (0.5,), "linear")
    plain = look.look_of(preprocessor(tmp_path, do_normalize=False), 8, 3)
    assert (plain.mean, plain.std) == ((0.0,), (1.0,))
    grey = np.full((8, 8, 1), 0.25, np.float32)
    np.testing.assert_array_equal(plain(grey), np.full((8, 8, 3), 0.25))
    with pytest.raises(ValueError, match="an image has 3 channels, but the model"):
        look.Look(8, 1)(np.zeros((8, 8, 3)))
    wrong = {
        "do_center_crop=true is not implemented": {"do_center_crop": True},
        "rescale_factor=0.5 are not implemented": {"rescale_factor": 0.5},
        "image_mean and image_std have 2 and 1": {"image_mean": [0.1, 0.2]},
        "image_std=.0.0.; it must be": {"image_std": [0.0]},
        "resample=9; it must be one of": {"resample": 9},
    }
    for message, fields in wrong.items():
        with pytest.raises(ValueError, match=message):
            look.look_of(preprocessor(tmp_path, **fields), 8, 3)


@pytest.mark.once
def test_the_digits_run(tmp_path):
    pytest.importorskip("sklearn", reason="needs the experiments extra: scikit-learn")
    found = image_sets.digits()
    assert len(found.labels) == 1797 and found.pixels[0].shape == (8, 8, 1)
    assert max(p.max() for p in found.pixels) == 1
    config = vit_digits_lora.get_config("runlocal").unlock()
    config.run.steps, config.eval.every = 40, 40
    config.optimizer.learning_rate.lora = 2e-2
    config.data.classes, config.model.labels = (0, 1), 2
    results = finetune.run(config, str(tmp_path))
    assert results["valid_accuracy"] > 0.9 > results["base_valid_accuracy"]
    config.model.labels = 3
    with pytest.raises(ValueError, match="3 labels, but digits has 2: set config"):
        finetune.run(config, str(tmp_path / "other"))


def test_the_study_s_table_by_hand():
    curves = {"full fine-tuning": [0.1, 0.2], "LoRA": [0.2, 0.3]}
    results = {
        name: {"rate": 0.001, "trained": 1000, "curves": [[1.0, x] for x in ends]}
        for name, ends in curves.items()
    }
    full, lora = study.table(results).splitlines()[2:]
    assert full == "| full fine-tuning | 1,000 | 0.001 | 15.00 +- 5.00 | - |"
    assert "| 25.00 +- 5.00 | +10.00" in lora
    assert study.configured().data.held_out == 0.5
