"""A model hub on the loopback interface: the endpoints that huggingface_hub lists and downloads from, and failures."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

Files = Mapping[str, bytes]


class Hub(ThreadingHTTPServer):
    """Serves `repos`: by id and revision (branch or tag), the files by path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, Files]] = {}
        self.gated: set[str] = set()
        self.cuts: dict[str, list[int]] = {}
        """By file: after how many bytes each of the next downloads breaks off."""
        self.broken = False
        """Whether everything is answered with an internal error."""
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo: str, folder: Path, revision: str = "main") -> None:
        """Publish every file of a folder as one revision."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repos.setdefault(repo, {})[revision] = files

    def commit(self, repo: str, revision: str) -> str:
        """The commit that a revision points to: new files, new commit."""
        digests = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in self.repos[repo][revision].items())
        return hashlib.sha1(json.dumps([repo, digests]).encode()).hexdigest()

    def downloads(self) -> list[str]:
        """The files whose contents were asked for, in order."""
        return [
            path.split("/resolve/")[1].partition("/")[2]
            for verb, path in self.requests
            if verb == "GET" and "/resolve/" in path
        ]

    def reset(self) -> None:
        """Forget what was asked."""
        self.requests.clear()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that runs in a thread until the end of the block."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        if self.server.broken:
            return self._send(500, b"", {})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            repo, revision = found[1], found[2] or "main"
            if (known := self._revision(repo, revision)) is not None:
                siblings = [{"rfilename": name} for name in self.server.repos[repo][known]]
                self._json({"id": repo, "modelId": repo, "sha": self.server.commit(repo, known), "siblings": siblings})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/auth-check", path):
            if self._revision(found[1], "main") is not None:
                self._send(
                    *((403, b"", {"X-Error-Code": "GatedRepo"}) if found[1] in self.server.gated else (200, b"", {}))
                )
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if (known := self._revision(found[1], found[2])) is not None:
                files = self.server.repos[found[1]][known].items()
                self._json(
                    [{"type": "file", "path": name, "size": len(data), "oid": _etag(data)} for name, data in files]
                )
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (known := self._revision(found[1], found[2])) is not None:
                self._file(found[1], known, found[3])
        else:
            self._send(404, b"", {})
        return None

    def _revision(self, repo: str, revision: str) -> str | None:
        """The name of the revision, which may be given as a commit; answers itself where there is none."""
        for known in self.server.repos.get(repo, ()):
            if revision in (known, self.server.commit(repo, known)):
                return known
        code, what = (404, "RevisionNotFound") if repo in self.server.repos else (401, "RepoNotFound")
        self._send(code, b"", {"X-Error-Code": what})
        return None

    def _file(self, repo: str, revision: str, name: str) -> None:
        data, commit = self.server.repos[repo][revision].get(name), self.server.commit(repo, revision)
        if repo in self.server.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start, code = 0, 200
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, code = int(found[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cuts = self.server.cuts.get(name)
        cut = cuts.pop(0) if cuts and self.command == "GET" else None
        return self._send(code, data[start:], headers, cut)

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: Mapping[str, str], cut: int | None = None) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def standing_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process talks to as if HF_ENDPOINT had named it, with an empty cache and home in `folder`."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # its pauses between attempts
    with serving() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(folder / "cache"),
            "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)  # which had read its own at import
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()
