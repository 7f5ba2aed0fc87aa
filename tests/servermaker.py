"""A small server on this machine that answers, or fails, as a test says."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Request(NamedTuple):
    """What came in: the headers and the JSON body, with the handler to answer by and the request's number from 0."""

    headers: dict
    body: dict
    handler: BaseHTTPRequestHandler
    number: int

    def send(self, status: int = 200, body: object = b"", length: int | None = None, **headers: str) -> None:
        """Answer; ``length`` lies about the body's, header names have _ for -."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.send_header("Content-Length", str(len(data) if length is None else length))
        self.handler.end_headers()
        self.handler.wfile.write(data)

    @property
    def text(self) -> str:
        """The user's text."""
        content = self.body["messages"][0]["content"]
        return content if isinstance(content, str) else content[-1]["text"]

    @property
    def images(self) -> list[str]:
        """The pictures' URIs."""
        content = self.body["messages"][0]["content"]
        return [part["image_url"]["url"] for part in content if part["type"] == "image_url"]


def completion(text, finish: str = "stop", prompt_tokens: int = 10, completion_tokens: int = 2, **more) -> dict:
    """An answer in OpenAI's form."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish, **more}], "usage": usage}


def log_probs(**values: float) -> dict:
    """Log-probabilities of first tokens, in OpenAI's form."""
    rows = [{"token": token, "logprob": value} for token, value in values.items()]
    return {"content": [{"token": rows[0]["token"], "logprob": rows[0]["logprob"], "top_logprobs": rows}]}


class Server(NamedTuple):
    """Where it is, and what came in so far."""

    url: str
    requests: list[Request]


@contextlib.contextmanager
def serving(answer: Callable[[Request], None]) -> Iterator[Server]:
    """A server in a thread, whose every POST ``answer`` answers."""
    requests, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                request = Request({k.lower(): v for k, v in self.headers.items()}, body, self, len(requests))
                requests.append(request)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                answer(request)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield Server(f"http://127.0.0.1:{server.server_address[1]}/v1", requests)
    finally:
        server.shutdown()
        server.server_close()
