"""A local endpoint with OpenAI's chat completions, whose replies a test chooses."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JudgeServer:
    """requests: the bodies received. headers: those of each. reply: (body) -> (status, text).

    pause: seconds between two bytes of a reply.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], tuple[int, str]]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.reply = reply
        self.url = ""
        self.pause = 0.0


def says_what_matches(body: dict[str, Any]) -> tuple[int, str]:
    """Grades by whether the expected answer is in the answer."""
    lines = dict(line.split(": ", 1) for line in body["messages"][0]["content"].splitlines() if ": " in line)
    right = lines["Expected answer"] in lines["Answer"]
    return 200, json.dumps({"choices": [{"message": {"content": "CORRECT" if right else "INCORRECT"}}]})


@contextmanager
def judge_server(
    reply: Callable[[dict[str, Any]], tuple[int, str]] = says_what_matches,
) -> Iterator[JudgeServer]:
    """The server, listening on a free port of this machine."""
    server = JudgeServer(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(body)
            server.headers.append(dict(self.headers))
            status, text = server.reply(body) if self.path == "/v1/chat/completions" else (404, "")
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            for byte in text.encode() if server.pause else ():
                self.wfile.write(bytes([byte]))
                time.sleep(server.pause)
            self.wfile.write(b"" if server.pause else text.encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listening.server_port}/v1"
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
