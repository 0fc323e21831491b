"""Damaged steps: flipped bits, missing files, no space. Never a silent difference."""

from __future__ import annotations

import json
import os
import resource
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from lorax import checkpoint
from lorax.adapters import Full
from lorax.checkpoint import CheckpointWarning, DamagedError, RunCheckpoints
from tests.checkpoint.states import base, filled, fresh, same

POSITIONS = {5: {"position": 500}, 9: {"position": 900}}


def empty():
    """A template with a leaf that orbax keeps in its own, unverified file."""
    return fresh().replace(model_state={"noise": jnp.zeros(4_000)})


def big(step):
    """Random bits, drawn anew for every step."""
    return filled(step, step, empty())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with two good steps."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    with RunCheckpoints(folder, base(), config={"seed": 1}) as run:
        for step, data in POSITIONS.items():
            run.save(big(step), data)
    return folder


def files_of(folder):
    """The newest step's files, with their sizes."""
    found = sorted(p for p in (folder / "9").rglob("*") if p.is_file())
    return [(path.relative_to(folder), path.stat().st_size) for path in found]


def outcome(saved, tmp_path, damage):
    """Damages a copy, restores, and returns the step that came back, or "error"."""
    copy = tmp_path / "run"
    shutil.copytree(saved, copy)
    damage(copy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run = RunCheckpoints(copy, base())
            restored = run.restore(empty())
        except (ValueError, OSError):
            return "error"
        finally:
            shutil.rmtree(copy)
    assert same(restored.state, big(restored.step))
    assert restored.data == POSITIONS[restored.step]
    assert restored.config == {"seed": 1}
    told = [w for w in caught if issubclass(w.category, CheckpointWarning)]
    assert len(told) == (restored.step != 9), "falls back if and only if it says so"
    return restored.step


def flips(saved, seed, count):
    """(file, bit) drawn in proportion to file sizes."""
    files = files_of(saved)
    ends = np.cumsum([size for _, size in files])
    for bit in np.random.default_rng(seed).integers(0, 8 * ends[-1], count):
        which = int(np.searchsorted(ends, bit // 8, side="right"))
        yield files[which][0], int(bit - 8 * (ends[which] - files[which][1]))


def flip(folder, path, bit):
    content = bytearray((folder / path).read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    (folder / path).write_bytes(content)


def flip_many(saved, tmp_path, seed, count):
    found = [
        outcome(saved, tmp_path, lambda folder: flip(folder, path, bit))
        for path, bit in flips(saved, seed, count)
    ]
    return {what: found.count(what) for what in (9, 5, "error")}


def test_a_folder_that_no_directory_can_become_is_named(tmp_path):
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "file").write_text("")
    told = "link is a symbolic link to gone, which does not exist: create that dir"
    for path in ("link", "link/run/checkpoints"):
        with pytest.raises(ValueError, match=told):
            RunCheckpoints(tmp_path / path)
        with pytest.raises(ValueError, match=told):
            checkpoint.save_adapters(tmp_path / path, fresh().adapters)
    with pytest.raises(ValueError, match="file/run is inside .*/file: .*file is a fil"):
        RunCheckpoints(tmp_path / "file" / "run")
    (tmp_path / "gone").mkdir()  # as the message says
    checkpoint.save_adapters(tmp_path / "link" / "adapter", fresh().adapters)
    assert (tmp_path / "gone" / "adapter" / "adapters.json").exists()


def test_a_flipped_bit_is_never_silent(saved, tmp_path):
    counts = flip_many(saved, tmp_path, 0, 15)
    assert sum(counts.values()) == 15 and counts[5] > 0, counts


@pytest.mark.slow
def test_two_hundred_flipped_bits(saved, tmp_path, record_property):
    counts = flip_many(saved, tmp_path, 1, 200)
    record_property("outcomes", counts)
    print(counts)
    assert sum(counts.values()) == 200 and counts["error"] == 0, counts


@pytest.mark.parametrize("how", ["deleted", "empty", "halved"])
def test_a_file_cut_or_gone_is_never_silent(saved, tmp_path, how):
    found = []
    for path, size in files_of(saved):

        def damage(folder, path=path, size=size):
            if how == "deleted":
                (folder / path).unlink()
            else:
                os.truncate(folder / path, size // 2 if how == "halved" else 0)

        found.append(outcome(saved, tmp_path, damage))
    assert set(found) == {5, 9}, found


def spoil(folder, step):
    """Changes the number in the data position."""
    path = folder / str(step) / "run" / "metadata"
    text = path.read_text()
    changed = text.replace(f'"position": {step}00', '"position": 123')
    assert changed != text
    path.write_text(changed)


def test_a_changed_data_position_falls_back(saved, tmp_path):
    assert outcome(saved, tmp_path, lambda folder: spoil(folder, 9)) == 5


def wrong_array(folder, step):
    """Puts another step's arrays there: intact for orbax, but not what was saved."""
    with RunCheckpoints(folder.parent / "other") as other:
        other.save(filled(77, step, empty()))
    shutil.rmtree(folder / str(step) / "state")
    shutil.copytree(
        folder.parent / "other" / str(step) / "state", folder / str(step) / "state"
    )


def test_the_warning_names_step_and_leaf_and_the_run_goes_on(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    wrong_array(folder, 9)
    with RunCheckpoints(folder, base()) as run:
        told = r"step 9: adapters/dense/kernel/a is damaged.*resuming from step 5"
        with pytest.warns(CheckpointWarning, match=told):
            assert run.restore(empty()).step == 5
        assert run.save(big(7)) and run.save(big(9))
    assert run.steps() == [5, 7, 9] and (folder / "damaged-9").is_dir()
    with RunCheckpoints(folder, base()) as run:
        assert same(run.restore(empty()).state, big(9))


def test_the_step_that_is_asked_for_and_no_other(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    wrong_array(folder, 9)
    with pytest.raises(
        DamagedError, match="step 9: adapters/dense/kernel/a is damaged"
    ):
        RunCheckpoints(folder).restore(empty(), step=9)


def test_no_step_that_is_whole_is_an_error(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    spoil(folder, 5)
    (folder / "9" / "run" / "metadata").unlink()
    with pytest.raises(
        DamagedError, match=r"no step .* is intact: step 9: .*; step 5: "
    ):
        RunCheckpoints(folder).restore(empty())


def test_a_step_under_another_number(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    (folder / "9").rename(folder / "11")
    with pytest.warns(CheckpointWarning, match="step 11: .* belongs to step 9"):
        assert RunCheckpoints(folder).restore(empty()).step == 5


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "\x00", "[" * 100_000, '{"format": 1}', '{"format": true}'],
)
def test_a_damaged_record_falls_back(saved, tmp_path, text):
    write = lambda folder: (folder / "9/run/metadata").write_text(text)
    assert outcome(saved, tmp_path, write) == 5


def test_an_interrupted_first_save_is_a_fresh_start(saved, tmp_path):
    shutil.copytree(saved / "9", tmp_path / "run" / "9.orbax-checkpoint-tmp")
    with RunCheckpoints(tmp_path / "run") as run:
        assert run.restore(empty()) is None
        assert run.save(big(9))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["9"]


def test_a_step_half_deleted_is_no_obstacle(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "5" / "state")
    shutil.rmtree(tmp_path / "run" / "5" / "run")
    with RunCheckpoints(tmp_path / "run") as run:
        assert run.restore(empty()).step == 9


@pytest.fixture
def no_space():
    """Limits files to 3 kB, as on a full disk; writing more raises an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    limit(soft)


def test_no_space_left_for_adapters_leaves_those_before(tmp_path, no_space):
    path, small = tmp_path / "adapter", fresh().adapters
    checkpoint.save_adapters(path, small)
    large = {"head": Full(jnp.asarray(np.random.default_rng(0).normal(size=9_000)))}
    no_space(3_000)
    told = r"adapter could not be written: .*File too large.*are intact"
    with pytest.raises(OSError, match=told):
        checkpoint.save_adapters(path, large, overwrite=True)
    assert checkpoint.load_adapters(path).keys() == small.keys()


@pytest.mark.parametrize("when", ["wait", "save", "close"])
def test_no_space_left_is_an_error_and_older_steps_stay(tmp_path, no_space, when):
    run = RunCheckpoints(tmp_path, keep=1)
    run.save(big(1))
    run.wait()
    no_space(3_000)
    with pytest.raises(OSError, match=r"step 2 could not be written .*\[1\], are int"):
        run.save(big(2))
        {"wait": run.wait, "save": lambda: run.save(big(3)), "close": run.close}[when]()
    no_space(resource.RLIM_INFINITY)
    assert run.steps() == [1]
    with RunCheckpoints(tmp_path) as again:
        assert same(again.restore(empty()).state, big(1))
    assert run.save(big(2))  # and there is room again
    run.close()
    assert run.steps() == [2]
    assert json.loads((tmp_path / "2/run/metadata").read_text())["payload"]["step"] == 2


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "commit_success.txt"])
@pytest.mark.parametrize("step", [5, 9])
def test_a_run_goes_on_beside_a_step_without_orbax_files(saved, tmp_path, name, step):
    shutil.copytree(saved, tmp_path / "run")
    path = tmp_path / "run" / str(step) / name
    path.unlink(missing_ok=True)
    path.touch()
    with RunCheckpoints(tmp_path / "run") as run:
        restored = run.restore(empty())
        assert restored.step == 9 and same(restored.state, big(9))
        path.unlink()
        assert run.restore(empty()).step == 9
        assert run.save(big(11))
    assert {9, 11} <= set(run.steps())
