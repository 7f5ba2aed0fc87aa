"""A server that fails: what is asked again, how long is waited, and that no failure passes for an answer."""

import email.utils
import socket
import threading
import time

import pytest
from servermaker import completion, log_probs, serving
from teammaker import free_port

from stkit.runtime import BadUse, StkitError, StkitWarning
from stkit.vlm import endpoint as module
from stkit.vlm.endpoint import Endpoint, NoAnswer, api_key, chat, in_threads, redacted

SECRET = "sk-secret-0123456789"
ASK = [{"role": "user", "content": "Say A."}]


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in module.KEYS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that would have been made."""
    found = []
    monkeypatch.setattr(module, "_wait", found.append)
    return found


def failing(*statuses, **headers):
    """A server that gives these in turn, and then answers."""

    def answer(request):
        if request.number < len(statuses):
            return request.send(statuses[request.number], {"error": {"message": "out of order"}}, **headers)
        request.send(200, completion("A"))

    return serving(answer)


def refused(server, **settings) -> NoAnswer:
    with pytest.raises(NoAnswer) as caught:
        chat(Endpoint(server.url, "m", **settings), ASK)
    return caught.value


def test_an_answer_has_text_end_tokens_and_the_request_is_what_was_asked():
    with failing() as server:
        reply = chat(Endpoint(server.url + "/", "walker"), ASK, max_tokens=7, seed=3)
        assert reply == ("A", True, 10, 2, None, 1)
        (request,) = server.requests
        assert request.body == {"model": "walker", "messages": ASK, "max_tokens": 7, "temperature": 0.0, "seed": 3}
        assert request.handler.path == "/v1/chat/completions" and "authorization" not in request.headers


@pytest.mark.parametrize("statuses", [(500,), (503, 502), (429, 408, 409)])
def test_what_may_pass_is_asked_again_after_growing_pauses(pauses, statuses):
    with failing(*statuses) as server:
        assert chat(Endpoint(server.url, "m"), ASK).requests == len(statuses) + 1 == len(server.requests)
    assert all(2**k / 2 <= pause <= 2**k for k, pause in enumerate(pauses)) and len(pauses) == len(statuses)


def test_a_server_that_always_fails_is_given_up_after_the_retries(pauses):
    with failing(*[500] * 20) as server:
        error = refused(server, retries=9)
        assert error.kind == "broken" and error.requests == 10 == len(server.requests)
        assert "500" in str(error) and "out of order" in str(error)
        assert pauses[-1] <= 60 and len(set(pauses)) == 9
        again = list(pauses)
        pauses.clear()
    with failing(*[500] * 20) as server:
        refused(server, retries=9)
        assert pauses == again, "the jitter is seeded"
        pauses.clear()
        refused(server, retries=9, seed=1)
        assert pauses != again


def test_the_pause_is_as_long_as_the_server_asks_for(pauses):
    with failing(429, Retry_After="37") as server:
        chat(Endpoint(server.url, "m"), ASK)
    with failing(503, Retry_After=email.utils.formatdate(time.time() + 90, usegmt=True)) as server:
        chat(Endpoint(server.url, "m"), ASK)
    with failing(429, Retry_After="soon") as server:
        chat(Endpoint(server.url, "m"), ASK)
    with failing(429, Retry_After="1e9") as server:
        chat(Endpoint(server.url, "m"), ASK)
    assert pauses[0] == 37 and 85 < pauses[1] <= 90 and pauses[2] <= 1 and pauses[3] == 600


@pytest.mark.parametrize(
    "status, kind", [(400, "refused"), (404, "refused"), (422, "refused"), (401, "key"), (403, "key")]
)
def test_what_asking_again_cannot_help_is_asked_once(pauses, status, kind):
    with failing(*[status] * 3) as server:
        error = refused(server)
        assert error.kind == kind and len(server.requests) == 1 == error.requests and not pauses
        assert f"{status}" in str(error) and "out of order" in str(error)
        assert ("set the key in STKIT_API_KEY or OPENAI_API_KEY (set now: none)" in str(error)) == (kind == "key")


def hang(request):
    time.sleep(30)


def drip(request):
    """A byte now and then, each within the limit of one read."""
    request.handler.send_response(200)
    request.handler.end_headers()
    for _ in range(600):
        request.handler.wfile.write(b" ")
        time.sleep(0.05)


@pytest.mark.parametrize("slow", [hang, drip])
def test_a_slow_answer_is_given_up_in_time(pauses, slow):
    with serving(slow) as server:
        begin = time.monotonic()
        error = refused(server, timeout_s=0.2, retries=1)
        assert time.monotonic() - begin < 15 and len(server.requests) == 2
        assert error.kind == "broken" and "no answer within 0.2 s" in str(error)


def cut(request):
    request.send(200, b'{"choices": [', length=1000)


def cut_chunk(request):
    request.handler.protocol_version = "HTTP/1.1"
    request.handler.send_response(200)
    request.handler.send_header("Transfer-Encoding", "chunked")
    request.handler.end_headers()
    request.handler.wfile.write(b"64\r\n{")
    request.handler.close_connection = True


def hang_up(request):
    request.handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("harm", [cut, cut_chunk, hang_up])
def test_a_cut_connection_is_asked_again(pauses, harm):
    with serving(lambda r: harm(r) if r.number < 2 else r.send(200, completion("B"))) as server:
        assert chat(Endpoint(server.url, "m"), ASK).text == "B" and len(server.requests) == 3 and len(pauses) == 2
    with serving(harm) as server:
        assert "the connection was cut" in str(refused(server, retries=0))


NONSENSE = [
    b"", b"<html>welcome</html>", b"\xff\xfe\x00", b"[" * 5000, b"null", b"[]", b"3", {}, {"choices": []},
    {"choices": [3]}, {"choices": [{"message": None}]}, {"choices": {"message": 1}}, completion(5), completion(["A"]),
    {**completion("A"), "usage": {"prompt_tokens": "many"}}, {**completion("A"), "usage": [1]}, {"error": "busy"},
    completion("A", prompt_tokens=-1), completion("A", logprobs={"content": [{"top_logprobs": [{"token": "A"}]}]}),
]  # fmt: skip


@pytest.mark.parametrize("nonsense", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_is_asked_again_and_never_an_answer(pauses, nonsense):
    with serving(lambda r: r.send(200, nonsense)) as server:
        error = refused(server, retries=2)
        assert error.kind == "broken" and len(server.requests) == 3 and len(str(error)) < 600
        assert "not JSON" in str(error) or "another shape" in str(error)


def test_an_answer_without_end_is_not_read_to_its_end(pauses, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 100_000)
    with serving(lambda r: r.send(200, b" " * 10_000_000)) as server:
        assert refused(server, retries=0).kind == "broken"


@pytest.mark.parametrize(
    "answer", [completion("", "content_filter"), completion(None), completion(None, message={"refusal": "I may not"})]
)
def test_an_answer_that_is_held_back_is_a_failure_not_a_wrong_answer(pauses, answer):
    with serving(lambda r: r.send(200, answer)) as server:
        assert refused(server).kind == "refused" and len(server.requests) == 1


def test_thoughts_that_come_apart_stand_in_think_tags():
    thinking = {"reasoning_content": "left, then"}
    answers = [completion("A", message=thinking), completion(None, "length", message=thinking)]
    answers += [completion("", "length")]
    with serving(lambda r: r.send(200, answers[r.number])) as server:
        replies = [chat(Endpoint(server.url, "m"), ASK) for _ in answers]
    assert [r.text for r in replies] == ["<think>left, then</think>A", "<think>left, then", ""]
    assert [r.finished for r in replies] == [True, False, False]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_named_and_takes_the_key_nowhere(monkeypatch, pauses, status):
    monkeypatch.setenv("STKIT_API_KEY", SECRET)
    with failing() as elsewhere, serving(lambda r: r.send(status, Location=elsewhere.url + "/chat?x=1")) as server:
        error = refused(server)
        assert server.requests[0].headers["authorization"] == f"Bearer {SECRET}"
        assert not elsewhere.requests and error.kind == "refused"
        assert "it points to http://127.0.0.1/v1/chat" in str(error) and SECRET not in str(error)


def test_nobody_there_is_told_apart_and_asked_again(pauses):
    with pytest.raises(NoAnswer, match="no connection") as caught:
        chat(Endpoint(f"http://127.0.0.1:{free_port()}/v1", "m", retries=2), ASK)
    assert caught.value.kind == "unreachable" and caught.value.requests == 3 and len(pauses) == 2


def test_the_key_comes_from_the_environment_the_kits_own_first(monkeypatch):
    with failing() as server:
        for name in ("OPENAI_API_KEY", "STKIT_API_KEY"):
            monkeypatch.setenv(name, f" {SECRET}{name} \n")
            chat(Endpoint(server.url, "m"), ASK)
            assert server.requests[-1].headers["authorization"] == f"Bearer {SECRET}{name}"
    assert redacted(f"a {SECRET}OPENAI_API_KEY b") == "a [OPENAI_API_KEY] b"


def test_a_key_that_the_server_echoes_is_redacted_in_errors_and_answers(monkeypatch, pauses):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serving(lambda r: r.send(401, {"detail": f"bad key {SECRET}"})) as server:
        error = refused(server)
        assert SECRET not in str(error) and "bad key [OPENAI_API_KEY]" in str(error)
        assert "(set now: OPENAI_API_KEY)" in str(error)
    with serving(lambda r: r.send(200, completion(f"I know {SECRET}"))) as server:
        assert chat(Endpoint(server.url, "m"), ASK).text == "I know [OPENAI_API_KEY]"


@pytest.mark.parametrize("key", ["two words of it", "line\nbreak-it", "schlüssel-123"])
def test_a_key_that_no_header_can_hold_is_refused_unrepeated(monkeypatch, key):
    monkeypatch.setenv("STKIT_API_KEY", key)
    with pytest.raises(BadUse, match="STKIT_API_KEY holds") as caught:
        api_key()
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [f"http://user:{SECRET}@h/v1", f"http://{SECRET}@h/v1", f"http://h/v1?api_key={SECRET}", f"http://h:{SECRET}/v1",
     f"//user:{SECRET}@h", f"http://h/{SECRET}/v1", f"http://[{SECRET}/v1"],
)  # fmt: skip
def test_a_url_with_a_secret_in_it_is_refused_unrepeated(monkeypatch, url):
    monkeypatch.setenv("STKIT_API_KEY", SECRET)
    with pytest.raises(BadUse) as caught:
        Endpoint(url, "m")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url, settings",
    [("localhost:8000/v1", {}), ("ftp://h/v1", {}), ("http://", {}), ("", {}), ("http://h/v 1", {}),
     ("http://h/v1#a", {}), ("http://a..b/v1", {}), ("http://h/v1", {"timeout_s": 0}),
     ("http://h/v1", {"timeout_s": float("nan")}), ("http://h/v1", {"timeout_s": None}),
     ("http://h/v1", {"retries": -1}), ("http://h/v1", {"retries": 1.5}),
     ("http://h/v1", {"model": " "})],
)  # fmt: skip
def test_an_endpoint_that_makes_no_sense_is_bad_use(url, settings):
    with pytest.raises(BadUse, match="give"):
        Endpoint(url, **{"model": "m"} | settings)


def test_a_key_that_would_go_unencrypted_to_another_machine_is_warned_about(monkeypatch, recwarn):
    monkeypatch.setenv("STKIT_API_KEY", SECRET)
    for url in ("https://h/v1", "http://localhost:1/v1", "http://127.0.0.1/v1"):
        Endpoint(url, "m")
    assert not recwarn.list
    with pytest.warns(StkitWarning, match="the key goes to h unencrypted"):
        Endpoint("http://h/v1", "m")


def test_first_tokens_come_with_their_log_probabilities():
    with serving(lambda r: r.send(200, completion("A", logprobs=log_probs(A=-0.5, B=-1.5)))) as server:
        assert chat(Endpoint(server.url, "m"), ASK, 1, logprobs=True).first_token == {"A": -0.5, "B": -1.5}


def test_threads_are_as_many_as_allowed_and_what_is_under_way_is_not_lost():
    lock, now, most = threading.Lock(), [0], [0]

    def work(item):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01 if item == 3 else 0.05)
        with lock:
            now[0] -= 1
        if item == 3:
            raise StkitError("three")
        return item

    taken, found = [], []
    with pytest.raises(StkitError, match="three"):
        for result in in_threads(work, (taken.append(k) or k for k in range(100)), 3):
            found.append(result)
    assert most[0] == 3 and sorted(found) == [k for k in taken if k != 3] and len(taken) < 10
    assert sorted(in_threads(lambda k: k * k, range(5), 9)) == [0, 1, 4, 9, 16]
    assert list(in_threads(abs, [-2, 1], 1)) == [2, 1]
