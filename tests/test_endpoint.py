"""An evaluation through an OpenAI-compatible server: what is sent, what comes of the answers, what it cost."""

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmaker import CLIPS, lines, make_questions, write_bench
from PIL import Image
from servermaker import completion, log_probs, serving
from teammaker import free_port

from stkit import cli, report
from stkit.evaluation import evaluate
from stkit.runs import read_json
from stkit.runtime import BadUse, StkitError
from stkit.vlm import endpoint as module
from stkit.vlm.cache import load_frames
from stkit.vlm.load import load_model
from stkit.vlm.prompts import user_text

SECRET = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def quick_and_without_keys(monkeypatch):
    monkeypatch.setattr(module, "_wait", lambda seconds: None)
    for name in module.KEYS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_bench(tmp_path_factory.mktemp("bench") / "walks")


def ask(server, bench, out, **settings):
    """Evaluate through a server, in generate mode if nothing else is said."""
    settings = {"mode": "generate", "model": "walker", "retries": 1, "timeout_s": 5.0, "progress": False} | settings
    return evaluate(bench, out=out, endpoint=server.url, **settings)


def says(text: str, **more):
    return serving(lambda request: request.send(200, completion(text, **more)))


def rows(out: Path, name: str = "predictions") -> dict[str, dict]:
    return {row["id"]: row for row in lines(out / f"{name}.jsonl")}


def test_the_frames_go_as_pictures_in_their_order_and_the_text_after_them(bench, tmp_path):
    with says("<think>hm</think><answer>A</answer>") as server:
        ask(server, bench, tmp_path / "r", concurrency=1)
    (question,) = [q for q in make_questions() if q.id == "a-direction-forward"]
    sent = server.requests[0]
    assert sent.text == "".join(user_text(question, "stkit", think=True)) and "left, right" in sent.text
    kinds = [part["type"] for part in sent.body["messages"][0]["content"]]
    assert kinds == ["image_url"] * 4 + ["text"] and sent.body["max_tokens"] == 512 and sent.body["temperature"] == 0
    frames = load_frames(bench / "videos" / "a.mp4", 28, 128 * 28 * 28, 360 * 420, sampling="uniform", n=4)
    for uri, pixels in zip(sent.images, frames.pixels, strict=True):
        head, data = uri.split(",")
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), dtype=int)
        assert head == "data:image/jpeg;base64" and picture.shape == pixels.shape
        assert np.abs(picture - pixels).mean() < 2 < np.abs(picture - frames.pixels[::-1]).mean()
    settings = read_json(tmp_path / "r" / "config.json")["settings"]
    assert settings["endpoint"] == server.url and settings["model"] == "walker" and "quality 95" in settings["images"]
    row = rows(tmp_path / "r")["a-direction-forward"]
    assert row["timestamps_s"] == [0.0, 1.0, 1.75, 2.75] and row["extra"]["images"] == [4, *frames.pixels.shape[2:0:-1]]


def test_answers_are_scored_as_a_local_models_and_the_blind_control_sends_no_picture(bench, tmp_path):
    with says("<answer>A</answer>") as server:
        result = ask(server, bench, tmp_path / "r")
    assert [len(r.images) for r in server.requests].count(4) == 18 and len(server.requests) == 36
    assert [len(r.images) for r in server.requests].count(0) == 18
    known = {q.id: q for q in make_questions()}
    assert all(row["correct"] == (known[i].answer == 0) for i, row in rows(tmp_path / "r").items() if known[i].options)
    assert result.scores["accuracy"] == result.scores["blind"] == pytest.approx(1 / 3)
    assert {row["control"] for row in rows(tmp_path / "r", "blind").values()} == {"blind"}
    assert result.scores["endpoint"] == {
        "failed": 0, "requests": 36, "retries": 0, "prompt_tokens": 360, "completion_tokens": 72
    }  # fmt: skip
    assert read_json(tmp_path / "r" / "scores.json") == result.scores
    assert Path(report([tmp_path / "r"], out=tmp_path / "r.html")["report"]).stat().st_size > 1000


def test_a_question_without_an_answer_is_failed_not_wrong_and_is_asked_again_alone(bench, tmp_path):
    def moody(request):
        if "landmark" in request.text and request.images:
            return request.send(500, b"no")
        request.send(200, completion("<answer>A</answer>"))

    with serving(moody) as server:
        result = ask(server, bench, tmp_path / "r", concurrency=1)
        failed = [row for row in rows(tmp_path / "r").values() if row["failed"]]
        assert len(failed) == 6 == result.scores["failed"] and result.scores["n"] == 6
        assert all(row["correct"] is None and row["text"] == "" and "500" in row["failed"] for row in failed)
        assert result.scores["accuracy"] == pytest.approx(1 / 3) and result.scores["endpoint"]["failed"] == 6
        assert result.scores["endpoint"]["requests"] == 30 + 6 * 2 and result.scores["endpoint"]["retries"] == 6
        again = ask(server, bench, tmp_path / "r")
    assert len(server.requests) == 42 + 6 * 2 and again.scores["failed"] == 6, "it still fails"
    assert again.scores["endpoint"]["requests"] == 54


def test_a_re_run_when_the_server_is_well_mends_what_failed_and_costs_add_up(bench, tmp_path):
    ill = [True]

    def answer(request):
        if ill[0] and request.images and "landmark" in request.text:
            return request.send(400, {"error": {"message": "too many pictures"}})
        request.send(200, completion("<answer>B</answer>"))

    with serving(answer) as server:
        first = ask(server, bench, tmp_path / "r")
        ill[0] = False
        result = ask(server, bench, tmp_path / "r", concurrency=2, retries=0, timeout_s=9.0)
    assert first.scores["failed"] == 6 and result.scores["failed"] == 0 and result.scores["n"] == 12
    assert len(server.requests) == 36 + 6 and all("landmark" in r.text for r in server.requests[36:])
    costs = result.scores["endpoint"]
    assert costs == {"failed": 0, "requests": 42, "retries": 0, "prompt_tokens": 360, "completion_tokens": 72}
    assert not result.predictions["failed"].any() and len(result.predictions) == 18


@pytest.mark.parametrize(
    "status, message, most",
    [(401, "set the key in STKIT_API_KEY or OPENAI_API_KEY", 2), (404, "nothing was answered, 5 questions failed", 6)],
)
def test_a_server_that_answers_nothing_stops_the_run_early(bench, tmp_path, status, message, most):
    with serving(lambda r: r.send(status, {"error": "no such model"})) as server:
        with pytest.raises(StkitError, match=message) as caught:
            ask(server, bench, tmp_path / "r", concurrency=2)
    assert len(server.requests) <= most and "no such model" in str(caught.value)
    assert not any(row["correct"] for row in rows(tmp_path / "r").values())


def test_a_server_that_goes_away_stops_the_run_and_what_was_answered_stays(bench, tmp_path):
    with says("<answer>A</answer>") as server:
        ask(server, bench, tmp_path / "first", limit=6, blind=False)
    port = server.url.split(":")[-1].split("/")[0]
    with pytest.raises(StkitError, match="nothing was answered, 5 questions failed.*no connection"):
        ask(server._replace(url=f"http://127.0.0.1:{port}/v1"), bench, tmp_path / "r", retries=0)

    stopped = threading.Event()

    def stop(server):
        server.shutdown()
        server.server_close()
        stopped.set()

    def leaves(request):
        if request.number == 5:
            threading.Thread(target=stop, args=(request.handler.server,)).start()
        if request.number > 5:
            stopped.wait(5)
        request.send(200, completion("<answer>A</answer>"))

    with serving(leaves) as server:
        with pytest.raises(StkitError, match="the server is gone .*run the same command again"):
            ask(server, bench, tmp_path / "gone", retries=0, concurrency=1, blind=False)
    answered = [row for row in rows(tmp_path / "gone").values() if not row["failed"]]
    assert 6 <= len(answered) <= 7


def letters_of(request) -> dict:
    """A model that likes the third option's letter where it sees pictures, and the first where it doesn't."""
    order = "CAB" if request.images else "ABC"
    likely = {letter: -1.0 - k for k, letter in enumerate(order)}
    return completion(order[0], "length", logprobs=log_probs(**likely, D=-9.0, x=-9.5))


@pytest.mark.parametrize("control", ["none", "circular"])
def test_letters_are_compared_where_the_server_gives_log_probabilities(bench, tmp_path, control):
    with serving(lambda r: r.send(200, letters_of(r))) as server:
        result = ask(server, bench, tmp_path / "r", mode="letter", control=control, limit=4)
    said, unseen = rows(tmp_path / "r"), rows(tmp_path / "r", "blind")
    sent = server.requests[0].body
    assert sent["max_tokens"] == 1 and sent["logprobs"] is True and sent["top_logprobs"] == 20
    assert all(row["parsed"] == 2 and row["text"] == "C" for row in said.values()) and len(said) == 4
    assert all(row["parsed"] == 0 for row in unseen.values())
    row = said["a-direction-forward"]
    assert row["log_probs"] == [-2.0, -3.0, -1.0, -9.0] and row["mode"] == "letter"
    turned = {"none": 1, "circular": 4}[control]
    assert row["extra"]["requests"] == turned and result.scores["endpoint"]["requests"] == len(server.requests)
    if control == "circular":
        assert [r["parsed"] for r in row["extra"]["rotations"]] == [2, 3, 0, 1] and not row["correct"]


def test_without_log_probabilities_letter_mode_says_what_to_use(bench, tmp_path):
    with says("A") as server, pytest.raises(StkitError, match="gives no log-probabilities: .*--mode generate"):
        ask(server, bench, tmp_path / "r", mode="letter", concurrency=1)
    assert len(server.requests) == 1


def test_a_letter_that_is_not_among_the_likeliest_is_a_failure_and_its_cost_is_kept(bench, tmp_path):
    def answer(request):
        known = {"A": -1.0, "B": -2.0, "C": -3.0} | ({} if "direction" in request.text else {"D": -4.0})
        request.send(200, completion("A", logprobs=log_probs(**known)))

    with serving(answer) as server:
        result = ask(server, bench, tmp_path / "r", mode="letter", blind=False, split="train", concurrency=1, limit=6)
    failed = [row for row in rows(tmp_path / "r").values() if row["failed"]]
    assert len(failed) == 2 and all(row["failed"].startswith("D not among the 3 likeliest") for row in failed)
    assert result.scores["endpoint"]["requests"] == 4 == len(server.requests)
    assert result.scores["endpoint"]["prompt_tokens"] == 40 and result.scores["endpoint"]["failed"] == 2


def test_a_text_with_a_control_token_is_not_sent(tmp_path):
    questions = make_questions()
    questions[0] = replace(questions[0], question="Which way? <|im_end|>")
    bench = write_bench(tmp_path / "walks", questions)
    with says("<answer>A</answer>") as server:
        result = ask(server, bench, tmp_path / "r", blind=False)
    assert len(server.requests) == 17 and result.scores["failed"] == 1 and result.scores["endpoint"]["failed"] == 0
    assert "<|im_end|>" in rows(tmp_path / "r")["a-direction-forward"]["failed"]


def test_no_more_requests_run_at_a_time_than_allowed(bench, tmp_path):
    lock, now, most = threading.Lock(), [0], [0]

    def slow(request):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.03)
        with lock:
            now[0] -= 1
        request.send(200, completion("<answer>A</answer>"))

    with serving(slow) as server:
        ask(server, bench, tmp_path / "r", concurrency=3)
    assert most[0] == 3 and len(rows(tmp_path / "r")) == 18


@pytest.mark.parametrize(
    "wrong, word",
    [({"device": "cpu"}, "device='cpu' has no meaning"), ({"four_bit": False}, "four_bit=False has no"),
     ({"adapter": "x"}, "adapter='x' has no"), ({"concurrency": 0}, "concurrency=0"), ({"retries": -1}, "retries=-1"),
     ({"timeout_s": 0}, "timeout_s=0"), ({"endpoint": "localhost"}, "not a URL"),
     ({"model": ("a", "b", {})}, "both given"), ({"model": f"m-{SECRET}"}, "the key is in the environment already"),
     ({"endpoint": f"http://user:{SECRET}@h/v1"}, "goes into the environment")],
)  # fmt: skip
def test_what_has_no_meaning_with_an_endpoint_is_refused_and_unwritten(bench, tmp_path, wrong, word, monkeypatch):
    monkeypatch.setenv("STKIT_API_KEY", SECRET)
    with pytest.raises(BadUse, match=word) as caught:
        evaluate(bench, **{"model": "m", "out": tmp_path / "r", "endpoint": "http://localhost:1/v1"} | wrong)
    assert not (tmp_path / "r").exists() and SECRET not in str(caught.value)


def test_another_endpoint_is_another_run(bench, tmp_path):
    with says("<answer>A</answer>") as server:
        ask(server, bench, tmp_path / "r", limit=1)
    with pytest.raises(StkitError, match="settings.endpoint: 'http://127.0.0.1:.*' -> 'http://localhost:1/v1'"):
        ask(server._replace(url="http://localhost:1/v1"), bench, tmp_path / "r", limit=1)


def test_the_key_stands_nowhere_in_a_run_nor_in_what_is_told(bench, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("STKIT_API_KEY", SECRET)

    def indiscreet(request):
        told = request.headers["authorization"]
        fails = request.number % 3 == 0
        request.send(400 if fails else 200, {"error": told} if fails else completion(f"<answer>A</answer> {told}"))

    command = ["eval", str(bench), "--mode", "generate", "--retries", "0", "--concurrency", "1", "--model", "m"]
    monkeypatch.setattr(sys, "argv", ["stkit", *command, SECRET])
    with serving(indiscreet) as server:
        assert cli.run(["--debug", *command, "--endpoint", server.url, "--out", str(tmp_path / "r")]) == 0
        assert server.requests[0].headers["authorization"] == f"Bearer {SECRET}"
    for url in (f"http://u:{SECRET}@h/v1", f"http://h/v1?key={SECRET}"):
        assert cli.run(["--debug", *command, "--endpoint", url, "--out", str(tmp_path / "q")]) == 2
    told = capfd.readouterr()
    assert SECRET not in told.out + told.err and "[STKIT_API_KEY]" in (tmp_path / "r" / "config.json").read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5 and not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert "[STKIT_API_KEY]" in (tmp_path / "r" / "predictions.jsonl").read_text()


@contextmanager
def transformers_serve(model: Path):
    """The real server of Transformers, on the CPU."""
    port = free_port()
    command = [Path(sys.executable).parent / "transformers", "serve", str(model), "--port", str(port)]
    command += ["--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            for _ in range(6000):
                try:
                    urllib.request.urlopen(f"http://localhost:{port}/health", timeout=1).close()
                    break
                except OSError:
                    assert process.poll() is None, process.stderr.read()
                    time.sleep(0.1)
            yield f"http://localhost:{port}/v1"
        finally:
            process.kill()


def locally(loaded, uris: list[str], text: str, tokens: int) -> tuple[str, int]:
    """What Transformers generates in this process from the same pictures and text, and the prompt's tokens."""
    pictures = [Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) for uri in uris]
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": text}]
    prompt = loaded.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = loaded.processor(text=[prompt], images=pictures or None, return_tensors="pt")
    ids = loaded.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return loaded.processor.tokenizer.decode(ids, skip_special_tokens=True), inputs["input_ids"].shape[1]


def test_a_real_server_says_what_the_same_model_says_here(bench, tmp_path):
    loaded, folder = load_model("tiny-untrained", device="cpu"), tmp_path / "tiny"
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    settings = {"mode": "generate", "max_new_tokens": 6, "limit": 8, "progress": False}
    with says("<answer>A</answer>") as recorder:  # to see what is sent
        ask(recorder, bench, tmp_path / "seen", concurrency=1, limit=8)
    with transformers_serve(folder) as url:
        result = evaluate(bench, str(folder), tmp_path / "r", endpoint=url, **settings)
        with pytest.raises(StkitError, match="--mode generate"):
            evaluate(bench, str(folder), tmp_path / "letters", endpoint=url, limit=1, progress=False)
    said = rows(tmp_path / "r") | {f"blind {i}": row for i, row in rows(tmp_path / "r", "blind").items()}
    assert len(said) == 16 and result.scores["failed"] == 0 == result.scores["endpoint"]["retries"]
    sent = iter(recorder.requests)
    for clip in CLIPS:
        names = [i for i in rows(tmp_path / "seen") if i.startswith(clip)]
        for name in [*names, *(f"blind {i}" for i in names)]:
            request = next(sent)
            text, count = locally(loaded, request.images, request.text, 6)
            assert said[name]["text"] == text.strip() and said[name]["extra"]["prompt_tokens"] == count
    assert result.scores["endpoint"]["completion_tokens"] == sum(row["extra"]["tokens"] for row in said.values()) > 16
    assert json.loads((tmp_path / "r" / "scores.json").read_text())["endpoint"]["requests"] == 16
