"""Rollouts that an OpenAI-compatible server draws: what is sent, what is learned from, what a failure leaves."""

import pytest
from benchmaker import lines, write_bench
from servermaker import completion, serving
from trainmaker import metrics

from stkit import grpo
from stkit.runtime import BadUse, StkitError

OWN = {
    "data.split": None, "data.tasks": ["direction"], "data.limit": 2, "grpo.group": 3, "grpo.max_new_tokens": 24, "train.batch": 1,
    "train.steps": 2, "grpo.served": "walker", "rewards.format": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_bench(tmp_path_factory.mktemp("served") / "bench")


def letters(request):
    request.send(body=completion(f"<think>hm</think> <answer>{'ABCD'[request.number % 4]}</answer>"))


def test_a_servers_rollouts_are_rewarded_and_learned_from(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("STKIT_API_KEY", "sk-a-secret-of-some-length")
    with serving(letters) as server:
        run = grpo(
            bench, "tiny-untrained", out=tmp_path / "run", overrides=OWN | {"grpo.endpoint": server.url}, progress=False
        )
    assert len(server.requests) == 2 * 2 * 3 and all(len(r.images) == 4 for r in server.requests)
    body = server.requests[0].body
    assert (
        body["model"] == "walker" and body["temperature"] == 1.0 and body["max_tokens"] == 24 and body["top_p"] == 1.0
    )
    assert len({r.body["seed"] for r in server.requests}) == 12
    rows = lines(run.out / "rollouts.jsonl")
    assert len(rows) == 12 and all(row["text"].startswith("<think>hm</think> <answer>") for row in rows)
    first = metrics(run.out)[0]
    assert first["ratio"] == pytest.approx(1, abs=1e-6) and first["reward"] == sum(r["reward"] for r in rows[:6]) / 6
    assert first["learned_tokens"] > 0 and first["grad_norm"] > 0
    for path in run.out.rglob("*"):
        assert not path.is_file() or b"sk-a-secret" not in path.read_bytes(), path


def test_a_server_that_fails_stops_the_run_and_a_re_run_goes_on(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("stkit.vlm.endpoint._wait", lambda seconds: None)

    def failing(request):
        letters(request) if request.number < 6 else request.send(500)

    own = OWN | {"train.save_every": 1}
    with serving(failing) as server:
        own["grpo.endpoint"] = server.url
        with pytest.raises(StkitError, match=r"step 2 of 2: rollouts of clip 'a'.*last checkpoint is"):
            grpo(bench, "tiny-untrained", out=tmp_path / "run", overrides=own, progress=False)
    assert len(metrics(tmp_path / "run")) == 1 and len(lines(tmp_path / "run" / "rollouts.jsonl")) == 6


def test_an_endpoint_that_holds_a_key_or_beside_recorded_rollouts_is_refused(bench, tmp_path):
    with pytest.raises(BadUse, match="holds a user, a query or a key"):
        grpo(
            bench, "tiny-untrained", out=tmp_path / "run", progress=False,
            overrides=OWN | {"grpo.endpoint": "http://me:secret@host/v1"},
        )  # fmt: skip
    with pytest.raises(BadUse, match="both give rollouts"):
        grpo(
            bench,
            "tiny-untrained",
            out=tmp_path / "run",
            overrides=OWN | {"grpo.endpoint": "http://host/v1", "grpo.recorded": "r.jsonl"},
            progress=False,
        )
    assert not (tmp_path / "run").exists()
