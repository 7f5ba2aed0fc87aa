"""A benchmark folder from nothing: the same whatever the workers, resumed after a kill, refused when it cannot be."""

import dataclasses
import errno
import json
import math
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import av
import numpy as np
import pytest

from stkit.bench import build, chunk, crew
from stkit.bench.build import build_benchmark
from stkit.bench.plans import make_plan
from stkit.bench.presets import OOD_DRESSINGS, PRESETS, preset
from stkit.bench.schema import benchmark_hash, load_benchmark
from stkit.bench.wad import Thing
from stkit.runtime import BadUse, StkitError

KNOBS = {"turns": (2, 2), "landmarks": (1, 2), "actions": (1, 1), "resolution": (84, 56)}
CLIPS = 7  # in four chunks of two
BUILD = f"""
import sys
from stkit.bench import build
build.CHUNK = 2
build.build_benchmark(sys.argv[1], clips={CLIPS}, seed=0, workers=1, progress=False, **{KNOBS})
"""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(build, "CHUNK", 2)


def make(out, clips=CLIPS, **settings):
    return build_benchmark(out, clips=clips, **{"seed": 0, "workers": 2, "progress": False} | KNOBS | settings)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "CHUNK", 2)
        out = tmp_path_factory.mktemp("built") / "walks"
        return out, make(out)


def job_of(out: Path, **others) -> dict:
    """A chunk of one clip, as the crew would hand it to a process."""
    job = {"out": str(out), "chunk": 0, "first": 0, "last": 1, "seed": 0, "split": None, "preset": "tiny", "ood": False}
    return job | {"knobs": KNOBS} | others


def same_benchmark(a: Path, b: Path) -> bool:
    names = ("clips.jsonl", "questions.jsonl")
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def leftovers(out: Path) -> list[str]:
    return [str(path) for path in out.rglob("*") if path.name.endswith(".tmp") or path.suffix == ".wad"]


def test_a_build_is_a_benchmark_folder_that_loads_without_a_warning(built):
    out, made = built
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bench = load_benchmark(out)
    info = bench.info
    assert len(bench.clips) == made["clips"] == CLIPS and len(bench.questions) == made["questions"]
    assert made["hash"] == info["hash"] == benchmark_hash(out)
    assert sum(made["by_task"].values()) + sum(made["dropped"].values()) == 8 * CLIPS
    counts = ("clips", "questions", "by_task", "by_split", "dropped", "rejected_walks")
    assert info["counts"] == {name: made[name] for name in counts}
    assert (info["seed"], info["sampling"], info["n_frames"]) == (0, "uniform", 32)
    assert info["settings"]["preset"]["turns"] == [2, 2] and info["versions"]["vizdoom"]
    assert made["rejected_walks"] == made["resumed_chunks"] == 0
    assert all(bench.video_path(question.video).exists() for question in bench.questions)
    assert not leftovers(out)


def test_neither_workers_nor_a_second_run_change_a_byte(built, tmp_path):
    out, made = built
    alone = make(tmp_path / "alone", workers=1)
    assert same_benchmark(out, tmp_path / "alone") and alone["hash"] == made["hash"]
    for name in ("walk-0-00000", "walk-0-00006"):
        truths = [(folder / "truth" / f"{name}.json").read_bytes() for folder in (out, tmp_path / "alone")]
        assert truths[0] == truths[1]
    again = make(out)
    assert again["resumed_chunks"] == 4 and again["hash"] == made["hash"]


def start_and_wait_for_a_chunk(out: Path, code: str = BUILD) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 600
    while not [*out.glob(".chunks/*.json")] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.stderr.read()
    return process


def wait_until_swept(out: Path) -> None:
    """The processes that render end on their own, engines and all, and remove their folders last.

    The folder of a chunk that was handed over is its parent's to remove: a killed one leaves it to the next build.
    """

    def unfinished() -> list[Path]:
        folders = out.glob(".chunks/*.tmp")
        return [f for f in folders if not (out / ".chunks" / f"{f.name.split('.')[0]}.json").exists()]

    deadline = time.monotonic() + 300
    while unfinished() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not unfinished()


def test_a_killed_build_goes_on_where_it_was(built, tmp_path):
    """Also one in the background, where Ctrl-C is ignored: its processes did not end, and left what they had."""
    out = tmp_path / "walks"
    process = start_and_wait_for_a_chunk(out, f"import signal\nsignal.signal({signal.SIGINT:d}, signal.SIG_IGN){BUILD}")
    process.kill()
    process.wait()
    process.stderr.close()
    wait_until_swept(out)
    assert not (out / "questions.jsonl").exists()
    (out / ".chunks" / "00003.1.tmp").mkdir()  # as a machine that lost its power leaves it
    (out / "videos" / ".walk-0-00006.mp4.1.tmp").write_bytes(b"half")
    made = make(out)
    assert 1 <= made["resumed_chunks"] <= 3
    assert same_benchmark(out, built[0]) and not leftovers(out)


def test_ctrl_c_ends_the_processes_and_keeps_what_is_finished(tmp_path):
    out = tmp_path / "walks"
    process = start_and_wait_for_a_chunk(out)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=300)
    assert b"KeyboardInterrupt" in words
    assert [*out.glob(".chunks/*.json")] and not [*out.glob(".chunks/*.tmp")]


def test_a_folder_of_other_settings_is_refused_and_the_difference_named(built):
    out = built[0]
    for other, named in (
        ({"clips": 8}, "clips: 7 -> 8"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"split": "test"}, "split: None -> 'test'"),
        ({"turns": (2, 3)}, r"preset.turns: \[2, 2\] -> \[2, 3\]"),
    ):
        with pytest.raises(StkitError, match=named):
            make(out, **other)
    before = (out / "questions.jsonl").read_bytes()
    make(out, workers=1, yes=True)  # these are not settings
    assert (out / "questions.jsonl").read_bytes() == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StkitError, match="not empty"):
        make(tmp_path)


def test_a_chunk_whose_video_is_gone_is_made_anew(tmp_path):
    first = make(tmp_path / "walks", clips=3)
    (tmp_path / "walks" / "videos" / "walk-0-00002.mp4").unlink()
    again = make(tmp_path / "walks", clips=3)
    assert again["resumed_chunks"] == 1 and again["hash"] == first["hash"]
    assert (tmp_path / "walks" / "videos" / "walk-0-00002.mp4").exists()


def test_every_clip_bears_the_split_of_its_map(built, tmp_path):
    for clip in load_benchmark(built[0]).clips:
        assert clip.split == {8: "dev", 9: "test"}.get(int(clip.map_hash, 16) % 10, "train")
    made = make(tmp_path / "walks", clips=2, split="test")
    bench = load_benchmark(tmp_path / "walks")
    assert made["by_split"] == {"test": 2} and {clip.split for clip in bench.clips} == {"test"}
    assert {question.split for question in bench.questions} == {"test"}
    assert all(int(clip.map_hash, 16) % 10 == 9 for clip in bench.clips)


def test_only_an_ood_build_is_out_of_distribution(built, tmp_path):
    make(tmp_path / "walks", clips=1, ood=True)
    (clip,) = load_benchmark(tmp_path / "walks").clips
    assert clip.ood and clip.id == "ood-0-00000" and clip.settings["dressing"] in OOD_DRESSINGS
    assert 120 <= clip.settings["light"] <= 155
    for usual in load_benchmark(built[0]).clips:
        assert not usual.ood and usual.settings["dressing"] not in OOD_DRESSINGS and usual.settings["light"] >= 160


def test_videos_have_the_frames_rate_and_size_that_their_rows_say_and_no_sound(built):
    bench = load_benchmark(built[0])
    for clip in bench.clips:
        with av.open(str(bench.video_path(clip.video))) as container:
            (stream,) = container.streams
            shapes = [frame.to_ndarray(format="rgb24").shape for frame in container.decode(stream)]
            assert stream.type == "video" and float(stream.average_rate) == clip.fps == 7.0
        assert shapes == [(clip.height, clip.width, 3)] * clip.frames and (clip.width, clip.height) == (84, 56)
        assert clip.duration_s == pytest.approx(clip.frames / 7)
    assert len({clip.frames_sha256 for clip in bench.clips}) == CLIPS


def test_the_truth_file_tells_every_tick_and_agrees_with_plan_and_frames(built):
    bench = load_benchmark(built[0])
    made = preset("tiny", **KNOBS)
    for index, clip in enumerate(bench.clips):
        truth = json.loads((built[0] / clip.truth).read_text())
        ticks, plan = truth["ticks"], make_plan(0, index, made)
        count = len(ticks["x"])
        assert {len(column) for column in ticks.values()} == {count}
        assert truth["frame_ticks"] == [*range(0, count, 5)] and len(truth["frame_ticks"]) == clip.frames
        assert truth["steps"] == [dataclasses.asdict(step) for step in plan.route().steps]
        assert truth["off_units"] < 1 and truth["ticks_per_second"] == 35
        for event, step in zip(ticks["event"], ticks["step"], strict=True):
            assert (event == "stand") if step < 0 else (truth["steps"][step]["value"] == event)
        angles = np.unwrap(np.radians(ticks["angle_deg"]))
        for k, step in enumerate(truth["steps"]):
            at = [t for t in range(count) if ticks["step"][t] == k]
            if step["kind"] != "landmark":
                turned = math.degrees(angles[at[-1] + 1] - angles[at[0]])
                assert turned == pytest.approx({"left": 90, "right": -90}.get(step["value"], 0), abs=0.1)
            else:
                assert step["value"] in ticks["landmark"]
        end = plan.cells()[-1]
        assert (ticks["x"][-1], ticks["y"][-1]) == pytest.approx([256 * (v + 0.5) for v in end], abs=1)
        assert ticks["cell"][0] == 0 and ticks["cell"][-1] == len(plan.cells()) - 1


def block(monkeypatch, is_blocked):
    """Put a pillar into the first cell ahead of the plans for which ``is_blocked`` holds."""
    free = chunk.scene

    def blocked(plan):
        made = free(plan)
        return dataclasses.replace(made, things=(*made.things, Thing(30, 128, 384))) if is_blocked(plan) else made

    monkeypatch.setattr(chunk, "scene", blocked)


def test_a_blocked_walk_is_counted_and_another_takes_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block(monkeypatch, lambda plan: plan.seed == 0 and plan.index == 1)
    manifest = chunk.render_chunk(job_of(tmp_path, last=2), tmp_path / "engine")
    assert manifest["attempts"] == (0, 1) and [row["id"] for row in manifest["clips"]] == [
        "walk-0-00000",
        "walk-0-00001",
    ]
    (rejected,) = manifest["rejected"]
    assert rejected["clip_id"] == "walk-0-00001" and rejected["off_units"] > 20
    made = preset("tiny", **KNOBS)
    assert manifest["clips"][1]["map_hash"] == chunk.clip_plan(0, 1, made, None, 1).map_hash()
    assert manifest["clips"][1]["map_hash"] != make_plan(0, 1, made).map_hash()


def test_maps_that_cannot_be_walked_are_an_error_not_an_endless_search(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block(monkeypatch, lambda plan: True)
    with pytest.raises(StkitError, match="walk-0-00000: 5 walks in a row were blocked"):
        chunk.render_chunk(job_of(tmp_path), tmp_path / "engine")


def run_instead(monkeypatch, code: str) -> None:
    """Let the crew's processes run this code; ``chunk.main()`` is the usual one."""
    head = "import errno, os, signal, sys, pathlib\nfrom stkit.bench import chunk\n"
    monkeypatch.setattr(crew, "COMMAND", (sys.executable, "-c", head + code))


def test_an_engine_that_dies_is_tried_once_more_and_after_the_handing_over_costs_nothing(tmp_path, monkeypatch, capfd):
    out, mark = tmp_path / "walks", tmp_path / "died"
    code = f"mark = pathlib.Path({str(mark)!r})\n"
    code += "if mark.exists(): chunk.main()\nmark.touch()\nos.kill(os.getpid(), signal.SIGSEGV)"
    run_instead(monkeypatch, code)
    made = make(out, clips=1)
    assert made["engine_deaths"] == 2 and made["clips"] == 1
    assert "chunk 0: the engine died (signal 11" in capfd.readouterr().err


def test_an_engine_that_dies_twice_is_an_error_of_one_line(tmp_path, monkeypatch, capfd):
    run_instead(monkeypatch, "print('no such luck', file=sys.stderr)\nsys.exit(7)")
    with pytest.raises(
        StkitError, match="chunk 0: the engine died twice .exit code 7; no such luck.: run the same"
    ) as error:
        make(tmp_path / "walks", clips=1)
    assert "\n" not in str(error.value) and "trying once more" in capfd.readouterr().err


def test_an_engine_that_hangs_is_ended(tmp_path, monkeypatch, capfd):
    run_instead(monkeypatch, "import time\ntime.sleep(600)")
    monkeypatch.setattr(crew, "LIMIT_S", 0.2)
    with pytest.raises(StkitError, match="chunk 0: the engine died twice .signal 9; no message."):
        make(tmp_path / "walks", clips=1)
    assert capfd.readouterr().err.count("trying once more") == 1


@pytest.mark.parametrize("part", ["write_text", "encode"])
def test_a_full_disk_while_rendering_is_one_line(tmp_path, monkeypatch, part):
    code = "def full(*_):\n    raise OSError(errno.ENOSPC, 'No space left on device', 'walk.mp4')\n"
    run_instead(monkeypatch, code + f"chunk.{part} = full\nsys.exit(chunk.main())")
    with pytest.raises(StkitError, match="^walk.mp4: the disk is full: free some space and run the same command again"):
        make(tmp_path / "walks", clips=1)


def test_a_full_disk_under_pyav_is_one_line(tmp_path, monkeypatch):
    code = "import av\ndef full(*_):\n    raise av.FFmpegError(errno.ENOSPC, 'No space left on device')\n"
    run_instead(monkeypatch, code + "chunk.encode = full\nsys.exit(chunk.main())")
    with pytest.raises(StkitError, match="^the disk is full"):
        make(tmp_path / "walks", clips=1)


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only")])
def test_a_folder_that_cannot_be_written_is_one_line(built, monkeypatch, tmp_path, number, words):
    def fail(*_):
        raise OSError(number, "no", str(tmp_path))

    monkeypatch.setattr(build, "claim", fail)
    with pytest.raises(StkitError, match=words):
        make(tmp_path / "walks")
    monkeypatch.undo()
    monkeypatch.setattr(build, "CHUNK", 2)
    monkeypatch.setattr(build, "write_jsonl", fail)
    with pytest.raises(StkitError, match=words):
        make(built[0])


def test_what_makes_no_sense_is_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "walks"
    for settings, words in (
        ({"clips": 0}, "clips=0: give a whole number of at least 1"),
        ({"clips": -3}, "clips=-3: give a whole number"),
        ({"clips": 1.5}, "clips=1.5: give a whole number"),
        ({"clips": True}, "clips=True"),
        ({"seed": -1}, "seed=-1"),
        ({"workers": 0}, "workers=0"),
        ({"preset": "huge"}, "preset 'huge' is unknown: use tiny, default"),
        ({"split": "validation"}, "split 'validation' is unknown: use train, dev, test"),
        ({"resolution": (85, 56)}, "even"),
        ({"resolution": (1930, 1090)}, "largest picture"),
        ({"weather": "rain"}, "knob 'weather' is unknown"),
        ({"turns": (12, 12)}, r"nothing can be asked .*\(event not covered by two sampled frames\): ask for fewer"),
    ):
        with pytest.raises(BadUse, match=words):
            make(out, **settings)
    assert not out.exists()


def test_walks_without_room_are_refused_before_any_is_filmed(tmp_path):
    with pytest.raises(StkitError, match="no walk of 2 turns has room for 6 landmarks"):
        make(tmp_path / "walks", clips=40, turns=(2, 4), landmarks=(3, 6), actions=(0, 5))
    assert not (tmp_path / "walks").exists()


def test_a_million_clips_ask_for_a_yes_with_time_and_size(tmp_path):
    with pytest.raises(
        BadUse, match=r"clips=1000000: about [\d,.]+ hours on 2 workers and [\d,]+ GB of disk; say --yes"
    ):
        make(tmp_path / "walks", clips=1_000_000)
    assert not (tmp_path / "walks").exists()
    # one clip of the tiny preset: at most 31 gaps of 55/2 ticks, a frame every 5 ticks, 5 ms and 2.3 kB each
    assert build.estimate(10**6, PRESETS["tiny"]) == "about 236.8 hours on 1 worker and 393 GB of disk"


def test_the_map_of_a_walk_can_be_drawn():
    import matplotlib

    matplotlib.use("agg")
    from stkit.bench.pictures import map_picture

    plan = make_plan(0, 0, PRESETS["tiny"])
    axes = map_picture(plan)
    words = {text.get_text() for text in axes.texts} - {""}
    assert words == {mark.kind for mark in plan.landmarks} | {action.kind for action in plan.actions}
    assert len(axes.patches) >= len(plan.cells()) + len(plan.landmarks)
    assert map_picture(plan, axes) is axes
