"""A small hub on this machine, for tests and examples. Begin with HubServer.

    with HubServer({"acme/law-lora": "path/to/folder"}) as hub:
        moelora.patch_model(model, experts=["acme/law-lora"], endpoint=hub.endpoint, cache_dir=...)

It speaks as much of the Hugging Face hub's protocol as its client needs to download models and to push them: commits,
branches and tags, large files behind a redirect to a second host (as to a content network), range requests, private
and gated repositories, and failures on demand (`fail`). It keeps every request it saw. Nothing leaves the machine,
and the real client is not replaced: it only gets another `endpoint`. Uploads need the variable HF_HUB_DISABLE_XET=1,
since the chunked Xet protocol is not spoken here; `environment` has it and the others that a fresh process wants.
"""

import re
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote

from moelora.testing.hub_repos import HubRepo, git_sha1, is_large, read_files, sha256
from moelora.testing.hub_uploads import REPO, Shelves, upload_reply
from moelora.testing.hub_wire import Fault, HttpListener, Reply, Request, error_reply, json_reply, with_range

RESOLVE = re.compile(rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
TREE = re.compile(rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
INFO = re.compile(rf"/api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?")


class HubServer:
    """A hub that serves `repos` (id "owner/name" -> a folder, or path -> bytes), used as a context manager.

    `repos` may also be one folder that holds `owner/name` folders. `tokens` maps access tokens to user names: a user
    owns the repositories below that name. `requests` lists what was asked, oldest first.
    """

    def __init__(
        self,
        repos: Mapping[str, str | Path | Mapping[str, bytes]] | str | Path | None = None,
        *,
        tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.repos: dict[str, HubRepo] = {}
        self.renamed: dict[str, str] = {}
        self.tokens: dict[str, str] = dict(tokens or {})
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self._large: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._listeners = [HttpListener("hub", self._respond), HttpListener("storage", self._respond)]
        if isinstance(repos, str | Path):
            repos = {folder.relative_to(repos).as_posix(): folder for folder in sorted(Path(repos).glob("*/*/"))}
        for repo_id, files in (repos or {}).items():
            self.add_repo(repo_id, files)

    def __enter__(self) -> "HubServer":
        for listener in self._listeners:
            # the poll interval is what closing waits for
            threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()

    @property
    def endpoint(self) -> str:
        """The address to give as `endpoint=`, or in HF_ENDPOINT."""
        return self._listeners[0].url

    @property
    def storage_endpoint(self) -> str:
        """The other address, where large files lie: tokens must not arrive there."""
        return self._listeners[1].url

    def environment(self, home: str | Path) -> dict[str, str]:
        """Variables for a fresh process whose hub is this one and whose cache is below `home`."""
        flags = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), **dict.fromkeys(flags, "1")}

    def add_repo(
        self,
        repo_id: str,
        files: str | Path | Mapping[str, bytes],
        *,
        private: bool = False,
        gated: bool = False,
    ) -> HubRepo:
        """Add a repository with one commit on `main`."""
        if repo_id.count("/") != 1:
            raise ValueError(f"a repository of the local hub is named 'owner/name', got {repo_id!r}")
        repo = HubRepo(repo_id, private=private, gated=gated)
        repo.commit(read_files(files))
        self.repos[repo_id] = repo
        return repo

    def fail(self, fault: Fault) -> None:
        """Let matching requests go wrong; the oldest fault that still has `times` left acts first."""
        self.faults.append(fault)

    def asked(self) -> list[str]:
        """The requests so far as lines such as "HEAD /acme/law/resolve/main/adapter_config.json"."""
        return [str(request) for request in self.requests]

    def _respond(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self.faults if fault.matches(request)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None:
            self._closing.wait(fault.hang_s)
            return fault.spoil(self._answer(request))
        return self._answer(request)

    def _answer(self, request: Request) -> Reply:
        user = self.tokens.get(request.token) if request.token else None
        if request.host == "hub" and request.token and user is None:
            return error_reply(401, None, "Invalid credentials in Authorization header")

        with self._lock:
            shelves = Shelves(
                repos=self.repos, large=self._large, hub_url=self.endpoint, storage_url=self.storage_endpoint
            )
            written = upload_reply(request, shelves, user)
        if written is not None:
            return written
        if request.host == "storage":
            return self._stored(request)
        if request.path == "/api/whoami-v2" and user is not None:
            return json_reply({"type": "user", "name": user, "fullname": user, "orgs": [], "auth": {"type": "token"}})
        for pattern, answer in ((RESOLVE, self._file), (TREE, self._tree), (INFO, self._info)):
            if found := pattern.fullmatch(request.path):
                return answer(request, user, {name: unquote(part or "") for name, part in found.groupdict().items()})
        return error_reply(404, None, "Sorry, we can't find the page you are looking for.")

    def _refused(self, request: Request, user: str | None, repo_id: str, revision: str, *, files: bool) -> Reply | None:
        """The redirect or refusal for a repository or revision that is not there for this user; None: go on."""
        if repo_id in self.renamed:
            return Reply(status=307, headers={"Location": request.path.replace(repo_id, self.renamed[repo_id], 1)})
        repo = self.repos.get(repo_id)
        if repo is None or not repo.readable_by(user):
            # to a stranger a private repository looks like none at all
            if user is None:
                return error_reply(401, "RepoNotFound", "Invalid username or password.")
            return error_reply(404, "RepoNotFound", "Repository not found")
        if files and not repo.open_to(user):
            status = 401 if user is None else 403
            return error_reply(status, "GatedRepo", f"Access to model {repo_id} is restricted. Ask for access.")
        if repo.resolve(revision) is None:
            return error_reply(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _file(self, request: Request, user: str | None, asked: dict[str, str]) -> Reply:
        repo_id, revision, path = asked["repo"], asked["revision"], asked["path"]
        if refused := self._refused(request, user, repo_id, revision, files=True):
            return refused
        commit, files = self._files(repo_id, revision)
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            return error_reply(404, "EntryNotFound", "Entry not found", headers)
        content = files[path]
        if not is_large(path):
            return with_range(request, Reply(headers={**headers, "ETag": f'"{git_sha1(content)}"'}, body=content))

        oid = sha256(content)
        self._large[oid] = content
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        location = f"{self.storage_endpoint}/large/{oid}"
        return Reply(status=302, headers={**headers, **linked, "Location": location}, body=b"Found")

    def _info(self, request: Request, user: str | None, asked: dict[str, str]) -> Reply:
        repo_id, revision = asked["repo"], asked["revision"] or "main"
        if refused := self._refused(request, user, repo_id, revision, files=False):
            return refused
        commit, files = self._files(repo_id, revision)
        repo = self.repos[repo_id]
        entries = [_entry(path, content) for path, content in files.items()]
        siblings = [{"rfilename": entry["path"]} for entry in entries]
        if "blobs" in request.query:
            siblings = [
                {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"], "lfs": _blob_lfs(entry)}
                for entry in entries
            ]
        identity = {"_id": git_sha1(repo_id.encode())[:24], "id": repo_id, "modelId": repo_id, "sha": commit}
        flags = {"private": repo.private, "gated": "auto" if repo.gated else False, "disabled": False}
        return json_reply({**identity, **flags, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings})

    def _tree(self, request: Request, user: str | None, asked: dict[str, str]) -> Reply:
        repo_id, revision, folder = asked["repo"], asked["revision"], asked["folder"]
        if refused := self._refused(request, user, repo_id, revision, files=False):
            return refused
        _, files = self._files(repo_id, revision)
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        below = {path: content for path, content in files.items() if path.startswith(prefix)}
        if folder and not below:
            return error_reply(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        if request.query.get("recursive", ["false"])[0].lower() in ("true", "1"):
            return json_reply([_entry(path, content) for path, content in below.items()])
        here = [_entry(path, content) for path, content in below.items() if "/" not in path[len(prefix) :]]
        folders = sorted({prefix + path[len(prefix) :].split("/")[0] for path in below if "/" in path[len(prefix) :]})
        return json_reply([{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders] + here)

    def _files(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        commit = self.repos[repo_id].resolve(revision)
        assert commit is not None, "refused before"
        return commit, self.repos[repo_id].commits[commit]

    def _stored(self, request: Request) -> Reply:
        content = self._large.get(request.path.removeprefix("/large/"))
        if content is None:
            return error_reply(404, None, "no such object")
        return with_range(request, Reply(headers={"Accept-Ranges": "bytes"}, body=content))


def _entry(path: str, content: bytes) -> dict[str, object]:
    """A file in a listing."""
    entry: dict[str, object] = {"type": "file", "oid": git_sha1(content), "size": len(content), "path": path}
    if is_large(path):
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def _blob_lfs(entry: dict[str, object]) -> dict[str, object] | None:
    """The same large-file record under the names that the model-info route uses."""
    lfs = entry.get("lfs")
    if not isinstance(lfs, dict):
        return None
    return {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
