"""A hub on loopback: what huggingface_hub asks of one, with faults to order.

Files of 1 MB and more are kept as the hub keeps large files: `resolve` answers with a redirect to another
host (localhost instead of 127.0.0.1), which knows nothing of tokens and sends ranges.
"""

import contextlib
import functools
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = 1_000_000
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@functools.cache
def _etag(file: Path) -> str:
    """As git names a file's content, or LFS that of a large one."""
    data = file.read_bytes()
    if len(data) >= LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Hub:
    """repos: name -> directory. `asked` has (method, path, headers) of every request so far."""

    def __init__(self, repos: dict[str, Path]) -> None:
        self.repos = repos
        self.commit = COMMIT
        self.token = None  # that private and gated models ask for
        self.private = set()
        self.architectures = {}  # of GGUF files, as the hub finds them
        self.gated = set()
        self.asked = []
        # File name -> what to do when its content is asked for, first to last: a status, or ("cut", bytes).
        self.faults = {}
        self.release = threading.Event()  # ends ("stall", bytes)
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.release.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def contents(self, name):
        """Requests for the content of a file: the ranges they asked for."""
        return [
            headers.get("Range")
            for method, path, headers in self.asked
            if method == "GET" and path.startswith("/cdn/") and path.endswith(name)
        ]

    def names(self):
        """Files whose content was asked for, small ones included."""
        return {
            path.rpartition("/")[2]
            for method, path, _ in self.asked
            if method == "GET" and ("/cdn/" in path or "/resolve/" in path)
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, {k.title(): v for k, v in self.headers.items()}))
        with contextlib.suppress(ConnectionError):
            if path.startswith("/cdn/"):
                self._content(path.removeprefix("/cdn/"))
            elif path.startswith("/api/models/"):
                self._api(path.removeprefix("/api/models/"))
            elif "/resolve/" in path:
                self._resolve(path)
            else:
                self._send(404)

    def _send(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refused(self, repo, revision, content):
        """Answer as the hub does where it does not give something; whether that was so."""
        if repo in self.hub.faults:
            return self._fault(self.hub.faults[repo])
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        known = sent == self.hub.token
        if sent and not known:
            message = "Invalid credentials in Authorization header"
            self._send(401, b"{}", X_Error_Message=message)
        elif repo not in self.hub.repos or (repo in self.hub.private and not known):
            status = 404 if sent else 401
            self._send(status, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif revision not in ("main", self.hub.commit):
            message = f"Invalid rev id: {revision}"
            self._send(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message=message)
        elif content and repo in self.hub.gated and not known:
            self._send(401, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        else:
            return False
        return True

    def _fault(self, faults):
        if not faults:
            return False
        status, headers = faults.pop(0)
        self._send(status, b"{}", **headers)
        return True

    def _api(self, path):
        org, name, _, revision = [*path.split("/", 3), "main"][:4]
        repo = f"{org}/{name}"
        revision = revision.removeprefix("revision/")
        if self._refused(repo, revision, content=False):
            return
        siblings = []
        for file in sorted(self.hub.repos[repo].rglob("*")):
            if file.is_file():
                size, etag = file.stat().st_size, _etag(file)
                entry = {"rfilename": file.relative_to(self.hub.repos[repo]).as_posix(), "size": size}
                if size >= LARGE:
                    entry["lfs"] = {"sha256": etag, "size": size, "pointerSize": 134}
                siblings.append(entry | {"blobId": etag[:40]})
        info = {"id": repo, "sha": self.hub.commit, "siblings": siblings, "private": False}
        if repo in self.hub.architectures:
            info["gguf"] = {"architecture": self.hub.architectures[repo], "context_length": 128}
        self._send(200, json.dumps(info).encode(), Content_Type="application/json")

    def _resolve(self, path):
        org, name, _, rest = path.removeprefix("/").split("/", 3)
        revision, _, file = rest.partition("/")
        repo = f"{org}/{name}"
        if self._refused(repo, revision, content=True):
            return
        found = self.hub.repos[repo] / file
        if not found.is_file():
            self._send(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=self.hub.commit)
            return
        size, etag, commit = found.stat().st_size, _etag(found), self.hub.commit
        if size < LARGE:
            self._send(200, found.read_bytes(), ETag=f'"{etag}"', X_Repo_Commit=commit, Accept_Ranges="bytes")
            return
        self._send(
            302,
            Location=f"http://localhost:{self.hub.port}/cdn/{repo}/{file}",
            X_Linked_Etag=f'"{etag}"',
            X_Linked_Size=size,
            X_Repo_Commit=commit,
        )

    def _content(self, path):
        org, name, file = path.split("/", 2)
        data = (self.hub.repos[f"{org}/{name}"] / file).read_bytes()
        total, start = len(data), 0
        asked = self.headers.get("Range")
        if asked:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        fault = self.hub.faults[file].pop(0) if self.hub.faults.get(file) else (None, 0)
        what, n = fault
        if isinstance(what, int):
            self._send(what, b"")
            return
        if what == "whole":  # as one that knows no ranges
            asked, start = None, 0
        if what == "damaged":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(total - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.end_headers()
        if what in ("cut", "stall"):
            self.wfile.write(data[start : start + n])
            self.wfile.flush()
            if what == "stall":
                self.hub.release.wait(30)
            self.close_connection = True
            return
        self.wfile.write(data[start:])
