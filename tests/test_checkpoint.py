"""Checkpoints: whole or not at all, and everything random goes on where it was."""

import random
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from teammaker import run_team

from stkit.runtime import StkitError
from stkit.train import checkpoint


def weights(value):
    return lambda folder: save_file({"w": torch.full((3,), float(value))}, folder / "model.safetensors")


def written(folder, step, keep=2):
    tensors = {"optimizer": {"moment": torch.arange(3.0) * step}}
    return checkpoint.save(folder, step, weights(step), tensors, {"cursor": 7 * step}, keep)


def test_what_was_saved_is_read_back(tmp_path):
    found = written(tmp_path, 4)
    assert found.name == "step-000004" and checkpoint.latest(tmp_path) == found
    assert checkpoint.read_state(found) == {"step": 4, "cursor": 28}
    assert checkpoint.load_tensors(found / "optimizer.pt")["moment"].tolist() == [0.0, 4.0, 8.0]
    assert load_file(found / "weights" / "model.safetensors")["w"].tolist() == [4.0, 4.0, 4.0]


def test_the_last_few_are_kept(tmp_path):
    for step in (2, 4, 6, 8):
        written(tmp_path, step)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-000006", "step-000008"]


def test_latest_passes_over_what_is_not_whole(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    whole = written(tmp_path, 2)
    (tmp_path / "step-000009" / "weights").mkdir(parents=True)
    (tmp_path / ".step-000010.1.tmp" / "weights").mkdir(parents=True)
    assert checkpoint.latest(tmp_path) == whole


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path):
    (tmp_path / ".step-000010.1.tmp" / "weights").mkdir(parents=True)
    written(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_a_step_that_is_there_is_not_written_again(tmp_path):
    before = written(tmp_path, 2)
    checkpoint.save(tmp_path, 2, weights(99), {}, {}, 2)
    assert load_file(before / "weights" / "model.safetensors")["w"][0] == 2.0


def save_on_a_full_disk(folder, large):
    written(folder, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    big = torch.zeros(100_000)
    write = (lambda f: save_file({"w": big}, f / "w.safetensors")) if large == "weights" else (lambda f: None)
    with pytest.raises(StkitError, match="checkpoint of step 4 was not written, earlier ones are whole"):
        checkpoint.save(folder, 4, write, {"optimizer": big}, {}, 1)


@pytest.mark.parametrize("large", ["weights", "tensors"])
def test_a_full_disk_leaves_the_old_one_whole(tmp_path_factory, tmp_path, large):
    """The system refuses a process files over 64 kB, as it refuses them on a full disk."""
    [(code, told)] = run_team(tmp_path_factory.mktemp("told"), save_on_a_full_disk, tmp_path, large, count=1)
    assert code == 0, told
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    assert checkpoint.load_tensors(tmp_path / "step-000002" / "optimizer.pt")["moment"].tolist() == [0.0, 2.0, 4.0]


def test_a_damaged_file_is_told(tmp_path):
    found = written(tmp_path, 2) / "optimizer.pt"
    found.write_bytes(found.read_bytes()[:100])
    with pytest.raises(StkitError, match="optimizer.pt: damaged"):
        checkpoint.load_tensors(found)


def test_every_generator_goes_on_where_it_was(tmp_path):
    def drawn():
        return random.random(), float(np.random.rand()), float(np.random.randn()), torch.rand(3).tolist()

    before = checkpoint.generators()
    try:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        drawn()
        np.random.randn()  # numpy keeps a second normal number back
        torch.save(checkpoint.generators(), tmp_path / "generators.pt")
        wanted = drawn()
        drawn()
        checkpoint.restore_generators(checkpoint.load_tensors(tmp_path / "generators.pt"))
        assert drawn() == wanted
    finally:
        checkpoint.restore_generators(before)
