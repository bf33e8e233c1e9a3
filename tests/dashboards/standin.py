"""A stand-in for Grafana: takes what its API description takes, and fails in its ways when told to."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "glsa_canary-51c2"
# Required and allowed fields of the bodies that we send, with their types, as in the API description of Grafana 13.
BODIES: dict[str, dict[str, tuple[type | tuple[type, ...], bool]]] = {
    "/api/folders": {"title": (str, True), "uid": (str, False)},
    "/api/dashboards/db": {
        "dashboard": (dict, True),
        "folderUid": (str, False),
        "overwrite": (bool, False),
        "message": (str, False),
    },
    "/api/annotations": {
        "dashboardUID": (str, False),
        "time": (int, False),
        "tags": (list, False),
        "text": (str, True),
    },
}
Answer = tuple[int, str, bytes]  # status, type of the content, content


def as_json(status: int, content: Any) -> Answer:
    return status, "application/json", json.dumps(content).encode()


class FakeGrafana:
    """Folders, dashboards and annotations in memory. `odd` answers instead, for requests that it knows."""

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}
        self.dashboards: dict[str, dict[str, Any]] = {}
        self.annotations: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.odd: Callable[[str, str], Answer | None] = lambda method, path: None
        self.prefix = ""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def _do(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                sent = self.rfile.read(size)
                status, kind, content = fake.answer(self.command, self.path, self.headers, sent)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                if status in (301, 302):
                    self.send_header("Location", "/login")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_DELETE = _do

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}{self.prefix}"

    def answer(self, method: str, target: str, headers: Any, sent: bytes) -> Answer:
        path = urlsplit(target).path
        assert path.startswith(self.prefix + "/api/") or path == "/login", path
        path = path.removeprefix(self.prefix)
        self.requests.append(f"{method} {path}")
        if (odd := self.odd(method, path)) is not None:
            return odd
        if path == "/api/health":
            return as_json(200, {"database": "ok", "version": "13.0.0", "commit": "x"})
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return as_json(401, {"message": "Invalid API key"})
        body = json.loads(sent) if sent and sent != b"null" else None
        if method == "POST" and (fault := self._fault(path, body)):
            return as_json(400, {"message": fault})
        return self._done(method, path, body, parse_qs(urlsplit(target).query))

    def _fault(self, path: str, body: Any) -> str:
        fields = BODIES[path]
        for key, value in body.items():
            if key not in fields or not isinstance(value, fields[key][0]):
                return f"bad field {key}"
        missing = [key for key, (_, required) in fields.items() if required and key not in body]
        if path == "/api/dashboards/db" and not missing:
            one = body["dashboard"]
            if not re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", one["uid"]) or not one["title"] or one["schemaVersion"] < 39:
                return "bad dashboard"
        return f"missing {missing}" if missing else ""

    def _done(self, method: str, path: str, body: Any, query: dict[str, list[str]]) -> Answer:
        name = path.rsplit("/", 1)[-1]
        if path == "/api/folders":
            if body["uid"] in self.folders:
                return as_json(412, {"message": "a folder with that uid exists"})
            self.folders[body["uid"]] = body["title"]
            return as_json(200, body | {"id": 1})
        if path == "/api/dashboards/db":
            there = self.dashboards.get(body["dashboard"]["uid"], {"version": 0})
            self.dashboards[body["dashboard"]["uid"]] = body["dashboard"] | {"id": 7, "version": there["version"] + 1}
            saved = {key: body["dashboard"][key] for key in ("uid", "title")}
            return as_json(200, {"status": "success", "id": 7, "version": 1, "url": "x"} | saved)
        if path == "/api/annotations" and method == "POST":
            self.annotations.append(body)
            return as_json(200, {"id": len(self.annotations), "message": "Annotation added"})
        if path == "/api/annotations":
            return as_json(200, [a for a in self.annotations if set(query["tags"]) <= set(a["tags"])])
        place = self.folders if path.startswith("/api/folders/") else self.dashboards
        if name not in place:
            return as_json(404, {"message": "not found"})
        if place is self.folders:
            return as_json(200, {"uid": name, "title": place[name]})
        return as_json(200, {"dashboard": place[name], "meta": {}})
