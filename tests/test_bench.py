"""The benchmark's own path, on a toy: rows as promised, both ways equal, formulas against counts by hand."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "kernels" / "benchmarks"
KEYS = {"name", "unit", "peer", "ours", "ratio", "goal", "met", "reason", "max_abs_diff"}


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    """A run on the toy. It runs in this process, which has Transformers; it starts bench.py for what is measured alone."""
    out = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [str(FOLDER / "bench.py"), "--small", "--out", str(out)])
        import bench

        bench.main()
    assert all(
        (out / name).stat().st_size for name in ("bench.json", "bench.md", "ratios.png", "sweep.png", "report.html")
    )
    return json.loads((out / "bench.json").read_text())


def committed() -> dict:
    return json.loads((FOLDER / "results" / "bench.json").read_text())


def judged(row: dict) -> bool:
    if row["ratio"] is None:
        return False
    sign, bound = row["goal"].split()
    return row["ratio"] >= float(bound) if sign == ">=" else row["ratio"] <= float(bound)


@pytest.mark.parametrize("which", ["a fresh run", "the committed run"])
def test_rows_are_complete_and_goals_are_judged_by_their_ratio(request, which):
    found = request.getfixturevalue("result") if which == "a fresh run" else committed()
    assert len(found["rows"]) >= 15 and {"machine", "versions", "command"} <= set(found)
    for row in found["rows"]:
        assert KEYS <= set(row), row["name"]
        assert row["met"] == judged(row) and bool(row["reason"]) != row["met"]
        if row["peer"] is None:
            assert row["ours"] is None and row["reason"].startswith("not installed: pip install")
        elif not row["name"].startswith("forward FLOPs"):
            assert row["ratio"] == pytest.approx(row["peer"] / row["ours"])


def test_both_ways_say_the_same(result):
    for row in result["rows"]:
        assert row["max_abs_diff"] is None or row["max_abs_diff"] < 2e-5, row["name"]
        assert row.get("max_abs_diff_gradients", 0) < 1e-5 and row.get("equal_letters", True)


def test_every_measure_of_the_table_has_its_goal(result):
    goals = {row["name"]: row["goal"] for row in result["rows"]}
    wanted = {
        r"^update, G=\d+, as published": ">= 9", r"^update, peak memory \(live": ">= 5", r"^update, peak memory \(res": ">= 5",
        r"^reference log-probs, as published": ">= 10", r"^rollouts, G=": ">= 2.5", r"^evaluation, .* as published": ">= 12",
        r"^forward FLOPs": "<= 1.05", r"^cascade .* forward pass": ">= 2", r"^cascade .* both passes": ">= 2",
        r"^cascade .* worst of": ">= 1", r"^log-prob memory": ">= 10", r"^patchify": ">= 2",
        r"^whole step, G=.* one question, as published": ">= 6", r"^whole step, .* questions of a clip, as": ">= 6",
        r"^whole step, peak memory \(live.*as published": ">= 4", r"^whole step, peak memory \(res.*as published": ">= 4",
        r"^whole step, G=.* one question, TRL[^a-z]*$": ">= 10", r"^whole step, G=.*, TRL.* without check": ">= 10",
        r"^whole step, peak memory \(live.* TRL[^a-z]*$": ">= 4", r"^whole step, peak memory \(res.* TRL[^a-z]*$": ">= 4",
        r"^whole step, peak memory \(live.* TRL.* without": ">= 4", r"^whole step, peak memory \(res.* TRL.* without": ">= 4",
    }  # fmt: skip
    for pattern, goal in wanted.items():
        assert [g for name, g in goals.items() if re.search(pattern, name)] == [goal], pattern
    lean = [row for row in result["rows"] if row["name"].endswith("lean")]
    assert len(lean) == 2 and all(row["goal"] == f">= {0.9 * row['flops_ratio']:.2f}" for row in lean)


def test_every_side_of_the_whole_step_does_the_same_work(result):
    """Or else their times would mean nothing: the same rollouts give the same update, and TRL sees every frame."""
    rows = {row["name"]: row for row in result["rows"] if row["name"].startswith("whole step, G=3, 4 new tokens")}
    assert len(rows) == 4
    for name, row in rows.items():
        if row["peer"] is None:
            continue
        for side in ("peer", "ours"):
            assert set(row[f"{side}_parts"]) == {"rollouts", "reference", "update"} and min(row[f"{side}_parts"].values()) > 0
        if "TRL" in name:  # a toy's 4 frames of 56 x 84: 6 tokens an image; 9 of text and one that opens the turn
            assert row["peer_prompt_tokens"] == 4 * (6 + 2) + 9 + 1
        else:
            assert row["max_abs_diff"] < 1e-6 and row["max_abs_diff_gradients"] < 1e-5


def test_without_trl_its_rows_say_how_to_install_it(benchmarks, monkeypatch):
    _, _, setting = benchmarks
    import page
    import whole

    monkeypatch.setattr(whole.trl_side, "installed", lambda: False)
    rows = whole.trl_rows("trl", Path("nowhere"), setting.SMALL, {}, None)
    assert [row["unit"] for row in rows] == ["s", "MB", "MB"] and not any(row["met"] for row in rows)
    lines = page.table(rows).splitlines()[2:]
    assert len(lines) == 3 and all("not installed: pip install -e '.[bench]'" in line for line in lines)


def test_the_committed_run_was_no_toy_and_every_goal_missed_is_explained():
    found = committed()
    assert found["small"] is False and found["machine"]["cpu"] and found["command"].startswith("python ")
    assert all(len(row["reason"]) > 30 and row["reason"] != "not explained" for row in found["rows"] if not row["met"])


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench
    import measure
    import setting

    return bench, measure, setting


def test_flops_of_attention_are_counted_by_the_pairs_that_were_computed(benchmarks):
    _, measure, _ = benchmarks
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert measure.flops(lambda: attend(q, k, k)) == 4 * 8 * 2 * 3 * 5 * 7
    assert measure.flops(lambda: attend(q, k, k, is_causal=True)) == 4 * 8 * 2 * 3 * (1 + 2 + 3 + 4 + 5)
    assert measure.flops(lambda: attend(k, q, q, is_causal=True)) == 4 * 8 * 2 * 3 * (1 + 2 + 3 + 4 + 5 + 5 + 5)
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert measure.flops(lambda: a @ b) == measure.flops(lambda: torch.zeros(3, 5).addmm_(a, b)) == 2 * 3 * 4 * 5


def test_the_tree_does_the_flops_of_its_distinct_tokens_and_copies_do_more(benchmarks):
    bench, measure, setting = benchmarks
    import peers

    s = setting.make_setting(setting.SMALL)
    needed = bench.distinct_flops(s)
    done, copies = (
        measure.flops(lambda c=c: peers.reference(s, c)) for c in (peers.tree_log_probs, peers.lean_log_probs)
    )
    assert needed == done < copies


def test_the_readmes_figures_are_those_of_the_committed_run():
    rows = committed()["rows"]

    def ratio(start: str, part: str = "") -> str:
        return f"{next(r['ratio'] for r in rows if r['name'].startswith(start) and part in r['name']):.1f}"

    text = (ROOT / "README.md").read_text()
    assert f"rotations {ratio('evaluation')}x as fast, a GRPO update {ratio('update', 'as published')}x as fast" in text
    assert f"in 1/{ratio('update', 'live')} of the memory" in text
    words = " ".join(text.split())
    one, four = (ratio("whole step", f"{part}, as published") for part in ("one question", "4 questions of a clip"))
    assert f"{one}x as fast with one question of a clip and {four}x with four" in words
    assert f"{ratio('whole step', 'one question, TRL')}x as fast in 1/{ratio('whole step', '(live tensors), TRL')} of" in words
