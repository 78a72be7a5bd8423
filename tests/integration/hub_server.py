"""A server that takes a repository's files as the hub does, one commit a request, and keeps what it
was sent."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Hub:
    """What it has. answers: the status of every request, where it is not 200."""

    address: str = ""
    answers: int = 200
    made: list[dict[str, Any]] = field(default_factory=list)
    commits: list[dict[str, bytes]] = field(default_factory=list)

    def post(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/repos/create":
            self.made.append(json.loads(body))
            return {"url": f"{self.address}/me/it"}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---"), "a card that the hub can read"
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": path, **how} for path in paths]}
        assert "/commit/" in path, path
        lines = [json.loads(line) for line in body.splitlines()]
        sent = [line["value"] for line in lines if line["key"] == "file"]
        self.commits.append({f["path"]: base64.b64decode(f["content"]) for f in sent})
        return {"commitUrl": f"{self.address}/me/it/commit/0", "commitOid": "0" * 40}


@contextmanager
def serving() -> Iterator[Hub]:
    """On the loopback."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            found = hub.post(self.path, body) if hub.answers == 200 else {}
            answer = json.dumps(found).encode()
            self.send_response(hub.answers)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
