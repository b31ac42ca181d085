"""A stand-in for the Hub on this machine, as much of its HTTP API as huggingface_hub needs for
models, in memory.

Point huggingface_hub at `StandInHub().endpoint` with the environment variable HF_ENDPOINT, and set
HF_HUB_DISABLE_XET: this server knows the older LFS transfer alone.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_standin"
OWNER = "tester"
DATE = "2026-01-01T00:00:00.000Z"


class File(NamedTuple):
    data: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        if self.is_lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def describe(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": len(self.data),
            "oid": self.oid,
        }
        if self.is_lfs:
            entry["lfs"] = {"oid": self.oid, "size": len(self.data), "pointerSize": 134}
        return entry


@dataclass
class Commit:
    message: str
    files: dict[str, File]

    @property
    def oid(self) -> str:
        listing = [
            self.message,
            *(f"{name} {file.oid}" for name, file in sorted(self.files.items())),
        ]
        return hashlib.sha1("\n".join(listing).encode()).hexdigest()


@dataclass
class Repo:
    private: bool
    refs: dict[str, list[Commit]] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        if revision in self.refs:
            return self.refs[revision][-1]
        return next(
            (
                commit
                for commits in self.refs.values()
                for commit in commits
                if commit.oid == revision
            ),
            None,
        )

    def files(self, revision: str = "main") -> dict[str, bytes]:
        commit = self.find(revision)
        assert commit is not None, f"no {revision} among {list(self.refs)}"
        return {name: file.data for name, file in commit.files.items()}

    def open_pull_request(self) -> int:
        number = 1 + sum(name.startswith("refs/pr/") for name in self.refs)
        self.refs[f"refs/pr/{number}"] = list(self.refs["main"])
        return number


class Answer(Exception):
    """Ends the handling of a request."""

    def __init__(self, content: Any = None, status: int = 200, error: str = "", **headers: str):
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if error:
            self.headers["X-Error-Code"] = error
            content = {"error": error}
        self.body = content if isinstance(content, bytes) else json.dumps(content).encode()


class StandInHub:
    """Use it as a context manager.

    Attributes:
        repos: Of this server, by id.
        requests: Method and path of each request so far.
        blobs: Contents of LFS files by their SHA-256.
        refusal: Status of the answer to every request that changes something, or None.
        card_errors: What the check of a card's metadata finds.
        lfs: Whether weights are sent as LFS files; if not, every file is part of the commit itself.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.blobs: dict[str, bytes] = {}
        self.refusal: int | None = None
        self.card_errors: list[str] = []
        self.lfs = True
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._lock = threading.Lock()

    def __enter__(self) -> "StandInHub":
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(
        self, method: str, path: str, query: dict[str, str], body: bytes, token: str | None
    ) -> None:
        """Always ends in an `Answer`."""
        with self._lock:
            self.requests.append((method, path))
            if path == "/api/validate-yaml":
                errors = [{"message": message} for message in self.card_errors]
                raise Answer({"errors": errors, "warnings": []}, 400 if errors else 200)
            if method in ("POST", "PUT") and not path.startswith("/blobs/"):
                if self.refusal:
                    raise Answer({"error": "not for you"}, self.refusal)
                if token != TOKEN:
                    raise Answer({"error": "Invalid username or password."}, 401)
            for pattern, action in _ROUTES:
                if match := pattern.fullmatch(f"{method} {path}"):
                    groups = {
                        name: unquote(value or "") for name, value in match.groupdict().items()
                    }
                    if "repo" in groups:
                        groups["repo"] = self._visible(groups["repo"], token)
                    action(self, query=query, body=body, **groups)
            raise Answer({"error": f"the stand-in has no {method} {path}"}, 404)

    def _visible(self, repo_id: str, token: str | None) -> str:
        if repo_id not in self.repos or (self.repos[repo_id].private and token != TOKEN):
            raise Answer(status=404 if token == TOKEN else 401, error="RepoNotFound")
        return repo_id

    def _commit(self, repo: str, revision: str) -> Commit:
        commit = self.repos[repo].find(revision)
        if commit is None:
            raise Answer(status=404, error="RevisionNotFound")
        return commit

    def who_am_i(self, **_: Any) -> None:
        raise Answer({"type": "user", "name": OWNER, "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self, body: bytes, **_: Any) -> None:
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        url = f"{self.endpoint}/{repo_id}"
        if repo_id in self.repos:
            raise Answer({"error": "You already created this model repo", "url": url}, 409)
        first = Commit(
            "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}
        )
        self.repos[repo_id] = Repo(wanted.get("visibility") == "private", {"main": [first]})
        raise Answer({"url": url, "name": repo_id})

    def create_branch(self, repo: str, branch: str, **_: Any) -> None:
        if branch.startswith("refs/"):
            raise Answer({"error": "Invalid reference for a branch"}, 400)
        if branch in self.repos[repo].refs:
            raise Answer({"error": "Reference already exists"}, 409)
        self.repos[repo].refs[branch] = list(self.repos[repo].refs["main"])
        raise Answer({})

    def preupload(self, repo: str, revision: str, body: bytes, **_: Any) -> None:
        there = self._commit(repo, revision).files
        files = []
        for entry in json.loads(body)["files"]:
            path = entry["path"]
            mode = (
                "lfs"
                if self.lfs and path.endswith((".safetensors", ".model", ".png", ".jpg"))
                else "regular"
            )
            oid = there[path].oid if path in there else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise Answer({"files": files})

    def lfs_batch(self, repo: str, body: bytes, **_: Any) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            if wanted["oid"] not in self.blobs:
                upload = {"href": f"{self.endpoint}/blobs/{wanted['oid']}"}
                verify = {"href": f"{self.endpoint}/{repo}.git/info/lfs/verify"}
                wanted = {**wanted, "actions": {"upload": upload, "verify": verify}}
            objects.append(wanted)
        raise Answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str, body: bytes, **_: Any) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Answer({"error": "another content than announced"}, 400)
        self.blobs[oid] = body
        raise Answer({})

    def lfs_verify(self, body: bytes, **_: Any) -> None:
        wanted = json.loads(body)
        raise Answer({}, 200 if len(self.blobs.get(wanted["oid"], b"")) == wanted["size"] else 404)

    def commit(
        self, repo: str, revision: str, query: dict[str, str], body: bytes, **_: Any
    ) -> None:
        files = dict(self._commit(repo, revision).files)
        message = ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.blobs:
                    raise Answer({"error": f"{value['path']} was never uploaded"}, 400)
                files[value["path"]] = File(self.blobs[value["oid"]], True)
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        number = self.repos[repo].open_pull_request() if query.get("create_pr") else None
        commit = Commit(message, files)
        self.repos[repo].refs.setdefault(f"refs/pr/{number}" if number else revision, []).append(
            commit
        )
        url = f"{self.endpoint}/{repo}"
        pr_url = f"{url}/discussions/{number}" if number else None
        raise Answer(
            {
                "commitUrl": f"{url}/commit/{commit.oid}",
                "commitOid": commit.oid,
                "pullRequestUrl": pr_url,
            }
        )

    def open_discussion(self, repo: str, **_: Any) -> None:
        raise Answer({"num": self.repos[repo].open_pull_request()})

    def discussion(self, repo: str, number: str, **_: Any) -> None:
        raise Answer(
            {
                "num": int(number),
                "title": "a pull request",
                "status": "draft",
                "createdAt": DATE,
                "repo": {"name": repo, "type": "model"},
                "isPullRequest": True,
                "changes": {"base": "refs/heads/main"},
                "filesWithConflicts": [],
                "events": [],
            }
        )

    def info(self, repo: str, revision: str = "main", **_: Any) -> None:
        commit = self._commit(repo, revision)
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        private = self.repos[repo].private
        raise Answer(
            {"id": repo, "sha": commit.oid, "private": private, "tags": [], "siblings": siblings}
        )

    def tree(
        self, repo: str, revision: str, query: dict[str, str], folder: str = "", **_: Any
    ) -> None:
        commit = self._commit(repo, revision)
        prefix = f"{folder}/" if folder else ""
        inside = {
            path: file for path, file in sorted(commit.files.items()) if path.startswith(prefix)
        }
        if not inside:
            raise Answer(status=404, error="EntryNotFound")
        entries = []
        for path, file in inside.items():
            step, _, rest = path.removeprefix(prefix).partition("/")
            if rest and query.get("recursive", "").lower() != "true":
                entry = {"type": "directory", "path": prefix + step, "oid": "0" * 40, "size": 0}
                if entry not in entries:
                    entries.append(entry)
            else:
                entries.append(file.describe(path))
        raise Answer(entries)

    def refs(self, repo: str, **_: Any) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].oid}
            for name, commits in self.repos[repo].refs.items()
            if not name.startswith("refs/")
        ]
        raise Answer({"branches": branches, "converts": [], "tags": []})

    def resolve(self, repo: str, revision: str, path: str, **_: Any) -> None:
        commit = self._commit(repo, revision)
        if path not in commit.files:
            raise Answer(status=404, error="EntryNotFound", X_Repo_Commit=commit.oid)
        file = commit.files[path]
        raise Answer(file.data, ETag=f'"{file.oid}"', X_Repo_Commit=commit.oid)


def _route(pattern: str) -> re.Pattern[str]:
    """`{repo}` takes a namespace and a name, other words in braces one quoted step, `{*word}` the
    rest of the path.
    """
    pattern = pattern.replace("{repo}", r"(?P<repo>[^/]+/[^/]+?)")
    return re.compile(
        re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", re.sub(r"\{\*(\w+)\}", r"(?P<\1>.+)", pattern))
    )


_ROUTES = [
    (_route(pattern), action)
    for pattern, action in (
        ("GET /api/whoami-v2", StandInHub.who_am_i),
        ("POST /api/repos/create", StandInHub.create_repo),
        ("POST /api/models/{repo}/branch/{branch}", StandInHub.create_branch),
        ("POST /api/models/{repo}/preupload/{revision}", StandInHub.preupload),
        ("POST /api/models/{repo}/commit/{revision}", StandInHub.commit),
        ("POST /api/models/{repo}/discussions", StandInHub.open_discussion),
        ("GET /api/models/{repo}/discussions/{number}", StandInHub.discussion),
        ("POST /{repo}.git/info/lfs/objects/batch", StandInHub.lfs_batch),
        ("POST /{repo}.git/info/lfs/verify", StandInHub.lfs_verify),
        ("PUT /blobs/{oid}", StandInHub.lfs_put),
        ("GET /api/models/{repo}", StandInHub.info),
        ("GET /api/models/{repo}/revision/{revision}", StandInHub.info),
        ("GET /api/models/{repo}/tree/{revision}", StandInHub.tree),
        ("GET /api/models/{repo}/tree/{revision}/{*folder}", StandInHub.tree),
        ("GET /api/models/{repo}/refs", StandInHub.refs),
        ("(GET|HEAD) /{repo}/resolve/{revision}/{*path}", StandInHub.resolve),
    )
]


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        body = self._body()
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        try:
            self.hub.answer(
                self.command, url.path, query, body, token if scheme == "Bearer" else None
            )
        except Answer as answer:
            self._send(answer)
        except Exception as error:  # a mistake of the stand-in shows as such in the client
            self._send(Answer({"error": repr(error)}, 400))

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:
        pass
