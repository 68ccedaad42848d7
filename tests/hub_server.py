"""A stand-in for the Hub on this machine: the endpoints that downloads and ranged requests use, and their failures."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by id, each a dict of file name → bytes, at one commit on the branch ``main``.

    Attributes
    ----------
    gated
        Ids whose files need the token ``"granted"``; their listing is public, as on the real Hub.
    cut
        File name → how many bytes its first download gives before the connection breaks.
    without_ranges
        Ids whose files are sent whole, whatever range is asked for.
    broken
        Ids whose safetensors are answered with this status.
    requests
        ``"METHOD path"`` of every request so far.
    tokens
        Every ``Authorization`` so far.
    sent
        File name, first byte and bytes of every content that was sent.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.sizes: dict[str, int] = {}  # file name → size to claim in the listing
        self.gated: set[str] = set()
        self.cut: dict[str, int] = {}
        self.without_ranges: set[str] = set()
        self.broken: dict[str, int] = {}
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.sent: list[tuple[str, int, int]] = []
        self.endpoint = ""

    def downloads(self) -> list[str]:
        """The names of the files whose content was sent, in order."""
        return [line.rsplit("/", 1)[1] for line in self.requests if line.startswith("GET ") and "/resolve/" in line]


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub on a free port of the loopback interface."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.tokens.add(self.headers.get("Authorization") or "")
        if path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            repo_id, rest = path[1:].split("/resolve/", 1)
            self._file(repo_id, *rest.split("/", 1))
        else:
            self._fail(404, "RepoNotFound")

    def _api(self, rest: str) -> None:
        repo_id, revision, listing = rest, "main", False
        for word in ("/revision/", "/tree/"):
            if word in rest:
                repo_id, revision = rest.split(word, 1)
                listing = word == "/tree/"
        files = self._files(repo_id, revision)
        if files is None:
            return
        sizes = {name: self.hub.sizes.get(name, len(data)) for name, data in files.items()}
        if listing:
            body: Any = [
                {"type": "file", "path": name, "size": size, "oid": _etag(files[name])} for name, size in sizes.items()
            ]
        else:
            siblings = [{"rfilename": name, "size": size, "blobId": "0" * 40} for name, size in sizes.items()]
            body = {"id": repo_id, "modelId": repo_id, "sha": COMMIT, "siblings": siblings, "private": False,
                    "gated": False, "tags": [], "downloads": 0}  # fmt: skip
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, repo_id: str, revision: str, name: str) -> None:
        files = self._files(repo_id, revision)
        if files is None:
            return
        if repo_id in self.hub.gated and self.headers.get("Authorization") != "Bearer granted":
            self._fail(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        elif repo_id in self.hub.broken and name.endswith(".safetensors"):
            self._fail(self.hub.broken[repo_id], "Broken")
        elif name not in files:
            self._fail(404, "EntryNotFound")
        else:
            data, headers = files[name], {"ETag": f'"{_etag(files[name])}"', "X-Repo-Commit": COMMIT}
            asked = None if repo_id in self.hub.without_ranges else self.headers.get("Range")
            first, _, last = (asked or "bytes=0-").removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1 if last else None]
            if asked:
                headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
            cut = self.hub.cut.pop(name, None) if self.command == "GET" else None
            if self.command == "GET":
                self.hub.sent.append((name, int(first), len(part)))
            self._send(206 if asked else 200, part, headers, cut)

    def _files(self, repo_id: str, revision: str) -> dict[str, bytes] | None:
        files = self.hub.repositories.get(repo_id)
        if files is None:
            self._fail(401, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._fail(404, "RevisionNotFound")
            return None
        return files

    def _fail(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, data: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
