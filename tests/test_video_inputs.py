"""From frames to what a model takes: sizes, patches and times against Transformers' own classes."""

import numpy as np
import pytest
import torch
from clipmaker import camera_clip
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize as theirs

from stkit.runtime import BadUse, StkitError
from stkit.vlm.video import Frames, pixel_bounds, prepare, read_video, resize, smart_resize, video_spec


def noise(count: int, height: int, width: int) -> Frames:
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    times = np.arange(count) * 0.7
    return Frames(pixels, times, "none", "uniform", 10.0, 7 * count, np.arange(count) * 7)


sides = st.integers(1, 3000)
bounds = st.integers(1, 2_000_000)


@given(sides, sides, st.sampled_from([28, 32, 14]), bounds, bounds)
@example(42, 70, 28, 1, 10**6)  # 1.5 and 2.5 tokens: halves go to the even multiple
def test_sizes_equal_those_of_transformers(height, width, factor, one, other):
    least, most = sorted((one, other))
    try:
        expected = theirs(height, width, factor, least, most)
    except ValueError:
        with pytest.raises(StkitError, match="200"):
            smart_resize(height, width, factor, least, most)
    else:
        assert smart_resize(height, width, factor, least, most) == expected


def test_a_size_by_hand():
    assert smart_resize(480, 640, 28, 1, 360 * 420) == (336, 448)  # / 1.4255, floored to 12 and 16 tokens
    assert smart_resize(42, 70, 28, 1, 10**6) == (56, 56)


@pytest.mark.parametrize("wrong", [(0, 100), (200, 100), (-1, 5)])
def test_bounds_that_make_no_sense_are_refused(wrong):
    with pytest.raises(BadUse, match="min_pixels"):
        smart_resize(100, 100, 28, *wrong)


def test_the_total_is_shared_between_the_frames():
    # qwen-vl-utils: total / frames * 2, at least 1.05 times the minimum, at most the maximum of a frame
    assert pixel_bounds(10, 28, 100, 10_000, 20_000) == (100, 4_000)
    assert pixel_bounds(2, 28, 100, 10_000, 20_000) == (100, 10_000)
    assert pixel_bounds(1000, 28, 100, 10_000, 20_000) == (100, 105)
    assert pixel_bounds(8, 28, None, None, None) == (128 * 784, 768 * 784)
    assert resize(noise(8, 200, 200), 28, 784, 10**6, 4 * 112 * 112).pixels.shape == (8, 112, 112, 3)


def their_inputs(processor, frames: Frames, least: int, most: int):
    video = torch.from_numpy(frames.pixels).permute(0, 3, 1, 2)
    scale = len(frames.pixels) if isinstance(processor, Qwen3VLVideoProcessor) else 1  # it bounds all frames together
    size = {"shortest_edge": least * scale, "longest_edge": most * scale}
    return processor([video], size=size, do_sample_frames=False, cap_pixels_per_frame=False, return_tensors="pt")


@pytest.mark.parametrize("make", [Qwen2VLVideoProcessor, Qwen3VLVideoProcessor])
@pytest.mark.parametrize(
    ("count", "height", "width", "least", "most"),
    [(4, 97, 131, 784, 10**6), (5, 203, 155, 784, 20_000), (2, 33, 45, 60_000, 10**6), (3, 240, 320, 784, 360 * 420),
     (1, 65, 64, 784, 10**6)],
)
def test_inputs_equal_those_of_transformers(make, count, height, width, least, most):
    if count < 2 and make is Qwen3VLVideoProcessor:
        pytest.skip("it refuses a single frame")
    processor, frames = make(), noise(count, height, width)
    expected, spec = their_inputs(processor, frames, least, most), video_spec(processor)
    ours = prepare(frames, spec, least, most, total_pixels=10**9)
    assert ours.grid_thw.tolist() == expected["video_grid_thw"][0].tolist()
    assert ours.pixel_values.shape == expected["pixel_values_videos"].shape
    assert ours.pixel_values.shape[0] == ours.grid_thw.prod()
    one_step = 1 / 255 / max(spec.std)
    assert (ours.pixel_values - expected["pixel_values_videos"]).abs().max() < one_step


@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4"])
def test_inputs_of_real_clips_equal_those_of_transformers(name):
    frames, processor = read_video(camera_clip(name), n=4), Qwen2VLVideoProcessor()
    ours = prepare(frames, video_spec(processor), total_pixels=10**9)
    expected = their_inputs(processor, frames, 128 * 784, 360 * 420)
    assert torch.allclose(ours.pixel_values, expected["pixel_values_videos"], atol=1e-5)


def test_preparing_frames_of_the_right_size_changes_nothing():
    frames = resize(noise(4, 120, 160), 28, 784, 20_000)
    assert resize(frames, 28, 784, 20_000) is frames


@pytest.mark.parametrize("count", [4, 5])
def test_the_model_is_told_the_spacing_of_the_frames_really_sampled(count):
    """The published code keeps 8 frames of a clip and says 2 s a temporal patch, where 180 s make about 51 s."""
    spec = video_spec(Qwen2VLVideoProcessor())
    inputs = prepare(noise(count, 56, 56), spec, 784)
    assert inputs.second_per_grid_s == pytest.approx(1.4)
    assert np.allclose(inputs.timestamps_s, [0.35, 1.75, 2.8][: (count + 1) // 2])
    long = noise(8, 56, 56)
    long = Frames(long.pixels, np.linspace(0, 180, 8), "none", "published", 30.0, 5401, long.indices)
    assert prepare(long, spec, 784).second_per_grid_s == pytest.approx(2 * 180 / 7)


def test_a_single_frame_is_spaced_by_the_rate_of_the_video():
    assert prepare(noise(1, 56, 56), video_spec(Qwen2VLVideoProcessor()), 784).second_per_grid_s == pytest.approx(0.2)


@pytest.mark.parametrize("count", [6, 7])
def test_times_of_temporal_patches_equal_those_that_qwen3_writes(count):
    frames = read_video(camera_clip("bikes.mp4"), "fps", fps=0.8)
    frames = Frames(frames.pixels[:count], frames.timestamps_s[:count], "", "fps", 25.0, 250, frames.indices[:count])
    expected = Qwen3VLProcessor._calculate_timestamps(None, frames.indices, 25.0, 2)
    spec = video_spec(Qwen3VLVideoProcessor())
    assert np.allclose(prepare(frames, spec).timestamps_s, expected)


def test_the_spec_is_read_from_the_processor():
    spec = video_spec(Qwen2VLVideoProcessor())
    assert (spec.patch, spec.merge, spec.temporal_patch) == (14, 2, 2) and spec.mean[0] == pytest.approx(0.48145466)
    assert video_spec(Qwen3VLVideoProcessor()) == (16, 2, 2, (0.5,) * 3, (0.5,) * 3)
    whole = Qwen2_5_VLProcessor.__new__(Qwen2_5_VLProcessor)
    whole.video_processor = Qwen2VLVideoProcessor(patch_size=12)
    assert video_spec(whole).patch == 12


def test_a_processor_that_does_something_else_is_refused():
    with pytest.raises(StkitError, match="object is no Qwen-VL processor"):
        video_spec(object())
    with pytest.raises(StkitError, match="1/255"):
        video_spec(Qwen2VLVideoProcessor(do_normalize=False))
