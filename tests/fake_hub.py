"""A hub of data sets on loopback: one repository over HTTP, with failures on demand."""

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789" * 4


class FakeHub(ThreadingHTTPServer):
    """Serves `files` (path -> bytes) as the data set `repository` while its `with` block runs.

    `outcomes` maps a piece of a URL's path to what becomes of the next answers there, in turn:
    "ok", an error status such as "503", "cut" (half of the body, then the connection closes) or
    "hang up" (no answer at all).
    """

    def __init__(self, repository: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository = repository
        self.files = files
        self.outcomes: dict[str, list[str]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """/api/datasets/OWNER/NAME/CALL/REVISION/PATH; /datasets/OWNER/NAME/resolve/REVISION/PATH.

        There is one revision. Parquet files are a redirect away, as large files are on the hub.
        """
        url = urlsplit(self.path)
        self.url_path = unquote(url.path)
        if self.url_path.startswith("/storage/"):
            self._stored(self.server.files[self.url_path.removeprefix("/storage/")])
            return
        parts = [*self.url_path.removeprefix("/api").split("/", 6), *[""] * 6]
        _, _, owner, name, call, _, path = parts[:7]
        if f"{owner}/{name}" != self.server.repository:
            self._answer(401, {"X-Error-Code": "RepoNotFound"})
        elif call == "revision":
            self._json({"id": self.server.repository, "sha": COMMIT})
        elif call == "tree":
            self._tree(path, recursive=parse_qs(url.query).get("recursive") == ["true"])
        else:
            self._resolve(path)

    do_HEAD = do_GET

    def _tree(self, folder: str, recursive: bool) -> None:
        prefix = folder + "/" if folder else ""
        entries: dict[str, dict[str, str | int]] = {}
        for name, body in self.server.files.items():
            if name.startswith(prefix):
                *folders, _ = name.removeprefix(prefix).split("/")
                for below in itertools.accumulate(folders, "{}/{}".format):
                    entries[prefix + below] = {"type": "directory"}
                entries[name] = {"type": "file", "size": len(body)}
        self._json(
            [
                {"path": path, "oid": COMMIT, **entry}
                for path, entry in entries.items()
                if recursive or "/" not in path.removeprefix(prefix)
            ]
        )

    def _resolve(self, path: str) -> None:
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{path}"'}
        if path not in self.server.files:
            self._answer(404, {"X-Repo-Commit": COMMIT, "X-Error-Code": "EntryNotFound"})
        elif path.endswith(".parquet"):
            self._answer(302, headers | {"Location": f"/storage/{path}"})
        else:
            self._answer(200, headers, self.server.files[path])

    def _stored(self, body: bytes) -> None:
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        headers = {"Content-Range": f"bytes {first}-{last}/{len(body)}"}
        self._answer(206, headers, body[int(first) : int(last) + 1])

    def _json(self, value: object) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        due = [todo for piece, todo in self.server.outcomes.items() if piece in self.url_path]
        outcome = due[0].pop(0) if due and due[0] else "ok"
        self.close_connection = outcome in ("cut", "hang up")
        if outcome == "hang up":
            return
        if outcome.isdecimal():
            status, headers, body = int(outcome), {}, b""
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if outcome == "cut" else body)

    def log_message(self, *_: object) -> None:
        """Keeps the requests off standard error."""
