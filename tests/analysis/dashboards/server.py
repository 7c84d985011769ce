"""A W&B server of the size of a test: GraphQL, file stream and uploads over HTTP, on 127.0.0.1.

It keeps what a real server keeps (runs with configuration, rows and summary, files, artifacts, views) by the rules that
matter here: rows go where the client says (an offset), and a resumed run is told how many rows it has. What it is asked
and does not know is an error and stays in ``unknown``; whatever it received, headers included, stays in ``received``.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.analysis.dashboards.answers import ANSWERS
from tests.analysis.dashboards.stored import Artifact, StoredRun

_OPERATION = re.compile(r"\b(?:query|mutation)\s+(\w+)")
_STREAM = re.compile(r"^/files/([^/]+)/([^/]+)/([^/]+)/file_stream$")


class Server:
    """Serves until `close`; a context manager."""

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.projects: set[str] = set()
        self.received: list[bytes] = []
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self.refuse: set[str] = set()
        """Operations that are answered with an error."""
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering."""
        self._http.shutdown()
        self._http.server_close()

    def answer(self, method: str, path: str, body: bytes) -> Any:
        """What a request is answered with: JSON, or bytes."""
        with self._lock:
            self.received.append(body)
            if path == "/graphql":
                return self._graphql(json.loads(body))
            if stream := _STREAM.match(path):
                return self._stream(self.run_of(stream[3], stream[2]), json.loads(body))
            kind, _, rest = path.removeprefix("/storage/").partition("/")
            owner, _, name = rest.partition("/")
            if kind == "run" and method == "PUT":
                self.runs[owner].files[name] = body
            elif kind == "blob" and method == "PUT":
                self.artifacts[owner].blobs[name] = body
            elif kind == "manifest" and method == "PUT":
                self.artifacts[owner].manifest = json.loads(body)
            elif path not in ("/", "/healthz"):
                self.unknown.append(f"{method} {path}")
            return {}

    def run_of(self, name: str, project: str) -> StoredRun:
        self.projects.add(project)
        return self.runs.setdefault(name, StoredRun(name, project))

    def _graphql(self, request: dict[str, Any]) -> Any:
        found = _OPERATION.search(request["query"])
        name = found[1] if found else ""
        self.operations.append(name)
        if name in self.refuse:
            return {"errors": [{"message": f"{name} is refused by the test"}], "data": None}
        answer = ANSWERS.get(name)
        if answer is None:
            self.unknown.append(name)
            return {"errors": [{"message": f"unknown operation {name}"}], "data": None}
        return {"data": answer(self, request.get("variables") or {})}

    @staticmethod
    def _stream(run: StoredRun, body: dict[str, Any]) -> Any:
        for name, chunk in (body.get("files") or {}).items():
            lines = run.lines.setdefault(name, {})
            for number, line in enumerate(chunk["content"], chunk["offset"]):
                lines[number] = line
        if body.get("complete"):
            run.exit_code = body.get("exitcode") or 0
        return {}


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is killed, or ends, resets its connections: that is what is tested, and no error."""


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            kept = {key: value for key, value in self.headers.items() if key.lower() != "authorization"}
            server.received.append(json.dumps(kept).encode())
            data = json.dumps(server.answer(self.command, self.path.partition("?")[0], body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _handle

        def log_message(self, format: str, *args: object) -> None:
            """Silence."""

    return Handler
