"""Ask a model behind an OpenAI-compatible server (vLLM, SGLang, ``transformers serve``, any vendor's).

A question is asked again, with growing pauses, while that can help; what comes back is an answer, or a
:class:`NoAnswer` that says why there is none. Keys come from the environment alone, and stand in no text of ours::

    endpoint = Endpoint("http://localhost:8000/v1", "Qwen/Qwen2.5-VL-3B-Instruct")
    reply = chat(endpoint, [{"role": "user", "content": "Say A."}], max_tokens=8)
    reply.text, reply.finished, reply.prompt_tokens, reply.completion_tokens
"""

import contextlib
import email.utils
import hashlib
import http.client
import json
import math
import os
import queue
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from ..runtime import BadUse, StkitError, StkitWarning, generator

KEYS = ("STKIT_API_KEY", "OPENAI_API_KEY")
SHORTEST_SECRET = 8  # a shorter key ("EMPTY", "none") is a placeholder and also a word that texts may hold
ASKED_AGAIN = (408, 409, 429)  # and 500 to 599
FIRST_WAIT_S, LONGEST_WAIT_S, LONGEST_ASKED_FOR_S = 1.0, 60.0, 600.0
MOST_BYTES = 16 * 1024**2  # of an answer


class Reply(NamedTuple):
    """What a server answered.

    text: with the thinking in think tags, where the server hands it over apart. finished: it ended by itself, not at
    the limit of tokens. prompt_tokens, completion_tokens: as the server reports them, 0 where it does not.
    first_token: log-probabilities of the likeliest first tokens by their text, None where the server gives none.
    requests: how many it took.
    """

    text: str
    finished: bool
    prompt_tokens: int
    completion_tokens: int
    first_token: dict[str, float] | None = None
    requests: int = 1


class NoAnswer(StkitError):
    """A request that got no answer. ``kind``: "unreachable" (no connection), "key" (the server refuses it), "refused"
    (it won't take this request), "broken" (asking again may help). ``requests``: how many were sent in vain;
    ``before``: what else was answered on the way."""

    def __init__(self, message: str, kind: str, wait_s: float = 0.0):
        super().__init__(redacted(message))
        self.kind, self.wait_s, self.requests = kind, wait_s, 0
        self.before: tuple[Reply, ...] = ()


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served.

    Args:
        url: with the version at its end, as in "http://localhost:8000/v1"; without a key in it.
        model: as the server calls it.
        timeout_s: seconds that one request may take.
        retries: how often a request is sent again.
        seed: of the pauses' jitter.
    """

    url: str
    model: str
    timeout_s: float = 120.0
    retries: int = 5
    seed: int = 0

    def __post_init__(self):
        parts = _split(self.url)
        if type(self.timeout_s) not in (int, float) or not 0 < self.timeout_s < math.inf:
            raise BadUse(f"timeout_s={self.timeout_s!r}: give seconds above 0")
        if type(self.retries) is not int or self.retries < 0:
            raise BadUse(f"retries={self.retries!r}: give a whole number of at least 0")
        if not isinstance(self.model, str) or not self.model.strip():
            raise BadUse(f"model={self.model!r}: give the name by which the server calls the model")
        if redacted(self.model) != self.model:
            raise BadUse("the model's name holds the key: give the name alone, the key is in the environment already")
        object.__setattr__(self, "url", self.url.rstrip("/"))
        if api_key() and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            message = f"the key goes to {parts.hostname} unencrypted: use https where that is not your own network"
            warnings.warn(message, StkitWarning, stacklevel=3)


def _split(url: str) -> SplitResult:
    """The parts of an endpoint's URL. An error does not repeat a URL that may hold a secret."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (refuses a port that is no number)
        (parts.hostname or "").encode("idna")  # and a host that no name server can be asked for
    except ValueError:
        raise BadUse("the endpoint is not a URL: give one such as http://localhost:8000/v1") from None
    if "@" in url or "?" in url or redacted(url) != url:
        keys = " or ".join(KEYS)
        raise BadUse(f"the endpoint holds a user, a query or a key: a key goes into the environment ({keys})")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment or any(c <= " " for c in url):
        raise BadUse(f"endpoint {url!r} is not a URL: give one such as http://localhost:8000/v1")
    return parts


def api_key() -> str:
    """The key in the environment, "" where there is none.

    Raises:
        BadUse: it holds what no header can (the message does not repeat it).
    """
    name = next((name for name in KEYS if os.environ.get(name, "").strip()), None)
    if name is None:
        return ""
    key = os.environ[name].strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise BadUse(f"{name} holds blanks or other characters that no key has: set it anew")
    return key


def redacted(text: str) -> str:
    """The text without any key that is in the environment."""
    for name in KEYS:
        key = os.environ.get(name, "").strip()
        if len(key) >= SHORTEST_SECRET:
            text = text.replace(key, f"[{name}]")
    return text


def chat(
    endpoint: Endpoint, messages: Sequence[Mapping], max_tokens: int = 512, temperature: float = 0.0, **more
) -> Reply:
    """Have a conversation completed.

    Args:
        endpoint: see :class:`Endpoint`.
        messages: in OpenAI's form; a picture is a content part of type "image_url" with a data URI.
        max_tokens: of the answer.
        temperature: 0 for greedy decoding.
        more: other fields of the request ("seed", "top_p", "logprobs", …).

    Returns:
        :class:`Reply`.

    Raises:
        NoAnswer: there is none, after as many retries as help.
    """
    body = {"model": endpoint.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": temperature}
    data = json.dumps(body | more).encode()
    jitter = generator(endpoint.seed, "retry", hashlib.sha256(data).hexdigest())
    for sent in range(1, endpoint.retries + 2):
        try:
            return _reply(_post(endpoint, data))._replace(requests=sent)
        except NoAnswer as error:
            error.requests = sent
            if error.kind in ("key", "refused") or sent > endpoint.retries:
                raise
            pause_s = min(FIRST_WAIT_S * 2 ** (sent - 1), LONGEST_WAIT_S) * (0.5 + 0.5 * jitter.random())
            _wait(max(pause_s, min(error.wait_s, LONGEST_ASKED_FOR_S)))
    raise AssertionError("the last try either returns or raises")


def _wait(seconds: float) -> None:
    time.sleep(seconds)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error with its place named: followed, it would take the key to another host."""

    def redirect_request(self, *_):
        return None


def _post(endpoint: Endpoint, data: bytes) -> object:
    """Send one request and read the JSON value that comes back."""
    url = f"{endpoint.url}/chat/completions"
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "stkit"}
    if key := api_key():
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data, headers)
    until = time.monotonic() + endpoint.timeout_s
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=endpoint.timeout_s) as response:
            answer = _read(response, until)
    except urllib.error.HTTPError as error:
        with error:
            raise _from_status(url, error) from None
    except TimeoutError:
        raise NoAnswer(f"{url}: no answer within {endpoint.timeout_s:g} s", "broken") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, (ConnectionResetError, BrokenPipeError)):
            raise NoAnswer(f"{url}: the connection was cut while the request was sent", "broken") from None
        raise NoAnswer(f"{url}: no connection ({error.reason})", "unreachable") from None
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswer(f"{url}: the connection was cut ({type(error).__name__})", "broken") from None
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        raise NoAnswer(f"{url}: the answer is not JSON ({_short(answer)})", "broken") from None


def _read(response: http.client.HTTPResponse, until: float) -> bytes:
    """The whole answer, in the time that is left: a server that sends a byte now and then holds nobody up."""
    answer = b""
    while part := response.read1(65_536):
        answer += part
        if time.monotonic() > until:
            raise TimeoutError
        if len(answer) > MOST_BYTES:
            raise http.client.HTTPException("an answer without end")
    if response.length:
        raise http.client.IncompleteRead(answer, response.length)
    return answer


def _from_status(url: str, error: urllib.error.HTTPError) -> NoAnswer:
    """What a status other than 200 means, with what the server says to it."""
    answer = b""
    with contextlib.suppress(OSError, http.client.HTTPException):
        answer = error.read(4096) or b""
    said = f"{url}: {error.code} {error.reason}: {_complaint(answer)}".rstrip(": ")
    if error.code in (401, 403):
        has = " or ".join(name for name in KEYS if os.environ.get(name, "").strip()) or "none"
        return NoAnswer(f"{said}: set the key in {' or '.join(KEYS)} (set now: {has})", "key")
    if 300 <= error.code < 400:
        place = urlsplit(error.headers.get("Location") or "")
        where = f"{place.scheme}://{place.hostname}{place.path}" if place.hostname else place.path
        return NoAnswer(f"{said}: it points to {where or 'nowhere'}: if that is right, make it the endpoint", "refused")
    if error.code in ASKED_AGAIN or error.code >= 500:
        return NoAnswer(said, "broken", _asked_pause_s(error.headers.get("Retry-After")))
    return NoAnswer(said, "refused")


def _asked_pause_s(value: str | None) -> float:
    """Retry-After, in seconds or as a date; 0 where it is neither."""
    if value is None:
        return 0.0
    with contextlib.suppress(ValueError):
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else 0.0
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _complaint(answer: bytes) -> str:
    """The message in a server's error, in whichever of the usual places it stands; else its first words."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(answer)
        for name in ("error", "detail", "message"):
            if isinstance(value, dict) and name in value:
                value = value[name]
        if isinstance(value, str):
            return _short(value.encode())
    return _short(answer)


def _short(answer: bytes) -> str:
    text = " ".join(answer.decode("utf-8", "replace").split())
    return text if len(text) <= 300 else text[:297] + "..."


def _reply(value) -> Reply:
    """The answer in a response.

    Raises:
        NoAnswer: it has another shape, or the server held the answer back.
    """
    try:
        choice = value["choices"][0]
        message, why = choice["message"], choice.get("finish_reason")
        content, thought = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
        usage = value.get("usage") or {}
        counts = [usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
        known = all(part is None or isinstance(part, str) for part in (content, thought))
        if not known or not all(type(n) is int and n >= 0 for n in counts):
            raise TypeError
        first = _first_token(choice.get("logprobs"))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        shown = _short(json.dumps(value).encode())
        raise NoAnswer(f"the answer has another shape than a chat completion ({shown})", "broken") from None
    if why == "content_filter":
        raise NoAnswer("the server held its answer back (finish_reason content_filter)", "refused")
    if content is None and not thought and why != "length":
        said = message.get("refusal") or f"finish_reason {why}"
        raise NoAnswer(f"the server sent no text ({_short(str(said).encode())})", "refused")
    text = content or ""
    if thought:
        text = f"<think>{thought}" + (f"</think>{text}" if text or why != "length" else "")
    return Reply(redacted(text), why != "length", *counts, first)


def _first_token(log_probs) -> dict[str, float] | None:
    """Log-probabilities of the likeliest first tokens by their text."""
    content = (log_probs or {}).get("content") or ()
    if not content:
        return None
    rows = content[0].get("top_logprobs") or ()
    return {str(row["token"]): float(row["logprob"]) for row in rows} or None


def in_threads(function: Callable, items: Iterable, workers: int) -> Iterator:
    """Results of a function as they come, at most ``workers`` calls at a time (1: in order, in this thread).

    Items are taken from their iterator in this thread, and only as workers are free. After an exception in a call
    nothing new is begun; it is raised here when the calls under way have ended, so that none of their results is lost.
    The threads end with the process: Ctrl-C waits for no server.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    done: queue.Queue = queue.Queue()
    running, failed = 0, None

    def work(item):
        try:
            done.put((function(item), None))
        except BaseException as error:
            done.put((None, error))

    for item in items:
        threading.Thread(target=work, args=(item,), daemon=True).start()
        running += 1
        if running == workers:
            result, failed = done.get()
            running -= 1
            if failed is not None:
                break
            yield result
    for _ in range(running):
        result, error = done.get()
        if error is None:
            yield result
        failed = failed or error
    if failed is not None:
        raise failed
