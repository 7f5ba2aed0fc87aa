"""Seeds, devices, dtypes and sampling."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stkit import runtime
from stkit.runtime import BadUse, StkitError
from stkit.sampling import sample_indices


def test_a_child_seed_is_the_same_in_every_process():
    by_hand = int.from_bytes(hashlib.sha256(b"7/clip/3").digest()[:8], "big") // 2
    code = "from stkit.runtime import child_seed; print(child_seed(7, 'clip', 3))"
    other = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert runtime.child_seed(7, "clip", 3) == by_hand == other
    assert runtime.child_seed(7, "clip", 4) != by_hand


def test_a_device_that_is_not_there_is_an_error_not_another_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert runtime.pick_device("auto")[0] == "cpu"
    with pytest.raises(StkitError, match="cuda"):
        runtime.pick_device("cuda:0")
    with pytest.raises(BadUse, match="tpu"):
        runtime.pick_device("tpu")


def test_auto_knows_apple_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runtime.pick_device("auto")[0] == "mps"


@pytest.mark.parametrize("capability, expected", [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_a_t4_computes_in_float16_and_newer_gpus_in_bfloat16(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert runtime.pick_dtype("auto", "cuda")[0] == expected


def test_setup_prints_and_returns_what_is_computed_with(capsys):
    record = runtime.setup(seed=3)
    printed = capsys.readouterr().out
    assert record["seed"] == "3" and record["device"] in printed and record["dtype"] in printed
    first = torch.rand(1)
    runtime.setup(seed=3)
    assert torch.equal(first, torch.rand(1))


def test_published_sampling_is_fps_1_then_8_truncated():
    # 300 frames at 30 fps: 10 s, 10 frames by rounded linspace, then 8 of these by truncated linspace
    ten = [round(x * 299 / 9) for x in range(10)]
    eight = [ten[int(i * 9 / 7)] for i in range(8)]
    assert sample_indices(300, 30.0, "published").tolist() == eight


def test_uniform_sampling_holds_both_ends():
    assert sample_indices(9, 3.0, "uniform", n=4).tolist() == [0, 3, 5, 8]


def test_fps_sampling_takes_an_even_number():
    assert len(sample_indices(250, 25.0, "fps", fps=0.7)) == 6  # 10 s x 0.7 = 7 frames, made even
    assert len(sample_indices(25, 25.0, "fps", fps=1.0)) == 4  # never under 4


@given(st.integers(1, 2000), st.floats(1, 60), st.sampled_from(["published", "uniform", "fps"]), st.integers(1, 20))
def test_indices_are_in_range_in_order_and_even_in_number(total, video_fps, sampling, half):
    indices = sample_indices(total, video_fps, sampling, n=2 * half)
    assert len(indices) % 2 == 0 and indices.min() >= 0 and indices.max() < total
    assert np.all(np.diff(indices) >= 0)


@pytest.mark.parametrize("call", [dict(sampling="uniform", n=7), dict(sampling="fps", fps=0.0), dict(sampling="random")])
def test_senseless_sampling_is_refused(call):
    with pytest.raises(BadUse):
        sample_indices(100, 25.0, **call)


def test_a_video_of_no_frames_cannot_be_sampled():
    with pytest.raises(StkitError, match="0 frames"):
        sample_indices(0, 25.0)
