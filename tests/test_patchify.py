"""Patches against Transformers' own, and against the definition written out by hand."""

import numpy as np
import pytest
import torch
from stkit_kernels.memory import peak_bytes
from stkit_kernels.patchify import choose_backend, patchify
from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def noise(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("processor", [Qwen2VLVideoProcessor, Qwen3VLVideoProcessor])
def test_patches_equal_those_of_transformers(processor, count):
    theirs = processor()
    factor = theirs.patch_size * theirs.merge_size
    frames = noise(count, 3 * factor, 5 * factor)
    out = theirs([frames.permute(0, 3, 1, 2)], do_resize=False, do_sample_frames=False, return_tensors="pt")
    sizes = theirs.patch_size, theirs.merge_size, theirs.temporal_patch_size
    ours = patchify(frames, *sizes, theirs.image_mean, theirs.image_std)
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    assert ours.shape == out["pixel_values_videos"].shape
    assert torch.allclose(ours, out["pixel_values_videos"], atol=1e-6)


def test_each_row_is_the_patch_that_its_place_says():
    patch, merge, temporal = 2, 2, 2
    frames = noise(4, 8, 12, seed=1)
    rows = patchify(frames, patch, merge, temporal, MEAN, STD).numpy()
    pixels, row = frames.numpy().astype(np.float64), 0
    for t in range(2):
        for token_y in range(2):
            for token_x in range(3):
                for y in range(token_y * merge, token_y * merge + merge):
                    for x in range(token_x * merge, token_x * merge + merge):
                        for c in range(3):
                            cut = pixels[t * 2 : t * 2 + 2, y * 2 : y * 2 + 2, x * 2 : x * 2 + 2, c]
                            expected = (cut / 255 - MEAN[c]) / STD[c]
                            assert np.allclose(rows[row].reshape(3, 2, 2, 2)[c], expected, atol=1e-5)
                        row += 1
    assert row == len(rows)


def test_an_odd_number_of_frames_is_filled_up_with_the_last():
    frames = noise(3, 28, 28)
    filled = torch.cat([frames, frames[-1:]])
    assert torch.equal(patchify(frames, 14, 2, 2, MEAN, STD), patchify(filled, 14, 2, 2, MEAN, STD))


def test_frames_that_are_not_contiguous_give_the_same_patches():
    planes = noise(2, 28, 56).permute(0, 3, 1, 2).contiguous()
    frames = planes.permute(0, 2, 3, 1)
    assert not frames.is_contiguous()
    assert torch.equal(patchify(frames, 14, 2, 2, MEAN, STD), patchify(frames.contiguous(), 14, 2, 2, MEAN, STD))


def test_the_frames_are_left_as_they_were():
    frames = noise(2, 28, 28)
    before = frames.clone()
    patchify(frames, 14, 2, 2, MEAN, STD)
    assert torch.equal(frames, before)


@pytest.mark.parametrize("patch", [3, 14, 16])  # lines of 9, 42 and 48 bytes move as integers of 1, 2 and 8
def test_bytes_that_begin_anywhere_in_memory_give_the_same_patches(patch):
    frames = noise(2, 2 * patch, 4 * patch)
    expected = patchify(frames, patch, 2, 2, MEAN, STD)
    for offset in range(1, 9):
        flat = torch.cat([torch.zeros(offset, dtype=torch.uint8), frames.flatten()])
        assert torch.equal(patchify(flat[offset:].view(frames.shape), patch, 2, 2, MEAN, STD), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_several_blocks_are_normalised_alike(dtype, monkeypatch):
    frames = noise(4, 84, 84)
    whole = patchify(frames, 14, 2, 2, MEAN, STD, dtype)
    monkeypatch.setattr("stkit_kernels.patchify.BLOCK", 10)
    assert len(whole) % 10
    assert torch.equal(patchify(frames, 14, 2, 2, MEAN, STD, dtype), whole)


def test_floats_are_made_once_and_nowhere_but_in_the_result():
    frames = noise(8, 224, 280)
    output = patchify(frames, 14, 2, 2, MEAN, STD).nbytes
    peak = peak_bytes(lambda: patchify(frames, 14, 2, 2, MEAN, STD))
    assert output <= peak <= output + frames.nbytes + 1000  # the bytes in their new order are the one copy
    theirs = Qwen2VLVideoProcessor()
    arguments = {"do_resize": False, "do_sample_frames": False, "return_tensors": "pt"}
    # so that the counter is known to see such copies
    assert peak_bytes(lambda: theirs([frames.permute(0, 3, 1, 2)], **arguments)) > 1.9 * output


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_once(dtype):
    frames = noise(2, 4 * 28, 40 * 28)
    exact = patchify(frames, 14, 2, 2, MEAN, STD)
    assert torch.equal(patchify(frames, 14, 2, 2, MEAN, STD, dtype=dtype), exact.to(dtype))


def test_a_cpu_cuts_in_torch():
    assert choose_backend(torch.device("cpu")) == "torch"


@pytest.mark.parametrize(
    ("asked", "told"), [({"dtype": torch.float64}, "float64"), ({"backend": "cuda"}, "'cuda' is unknown")]
)
def test_what_it_cannot_make_is_refused(asked, told):
    with pytest.raises(ValueError, match=told):
        patchify(noise(2, 28, 28), 14, 2, 2, MEAN, STD, **asked)


@pytest.mark.parametrize(
    ("frames", "told"),
    [
        (torch.zeros(2, 28, 28, 3), "float32"),
        (torch.zeros(28, 28, 3, dtype=torch.uint8), "(28, 28, 3)"),
        (torch.zeros(0, 28, 28, 3, dtype=torch.uint8), "at least 1"),
        (torch.zeros(2, 0, 28, 3, dtype=torch.uint8), "(2, 0, 28, 3)"),
        (torch.zeros(2, 28, 30, 3, dtype=torch.uint8), "30x28"),
        (torch.zeros(2, 28, 28, 4, dtype=torch.uint8), "4 channels"),
    ],
)
def test_frames_of_another_kind_are_refused(frames, told):
    with pytest.raises(ValueError) as error:
        patchify(frames, 14, 2, 2, MEAN, STD)
    assert told in str(error.value)
