"""A judge on 127.0.0.1 that misbehaves as told, then answers."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(content: str | None, **message: Any) -> bytes:
    body = {
        "choices": [{"message": {"role": "assistant", "content": content, **message}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20},
    }
    return json.dumps(body).encode()


class StandIn:
    """`script` is how the first requests are met; later ones get `answer(messages)`.

    A word of the script: an HTTP status, "hang", "drop", "garble", "empty", "refuse", a text, or a
    whole body in bytes. `retry_after` is the header of a 429.
    """

    retry_after = "7"

    def __init__(self, answer: Callable[[list[dict]], str], script: Sequence[Any] = ()) -> None:
        self.answer = answer
        self.script = list(script)
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self.url = ""
        self.over = threading.Event()

    def met(self, body: dict, key: str | None) -> Any:
        with self.lock:
            self.requests.append(body)
            self.keys.append(key)
            return self.script.pop(0) if self.script else self.answer(body["messages"])


class _Handler(BaseHTTPRequestHandler):
    judge: StandIn

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        assert self.path == "/v1/chat/completions"
        word = self.judge.met(body, self.headers.get("Authorization"))
        if word == "hang":
            self.judge.over.wait()
            return
        if word == "drop":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhalf")
            return
        status, content = 200, b""
        if isinstance(word, int):
            status, content = word, b"{}"
        elif isinstance(word, bytes):
            content = word
        elif word == "garble":
            content = b'{"choices": [{"message"'
        elif word == "empty":
            content = completion("")
        elif word == "refuse":
            content = completion(None, refusal="I would rather not.")
        else:
            content = completion(word)
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", self.judge.retry_after)
        if 300 <= status < 400:
            self.send_header("Location", f"{self.judge.url}/elsewhere")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def stand_in(
    answer: Callable[[list[dict]], str] = lambda _: "Because.\n1", script: Sequence[Any] = ()
) -> Iterator[StandIn]:
    judge = StandIn(answer, script)
    handler = type("Handler", (_Handler,), {"judge": judge})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield judge
    finally:
        judge.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
