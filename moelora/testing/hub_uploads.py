"""The upload side of the local hub: create a repository, store large files, commit. Begin with upload_reply.

The order in which a client calls: `repos/create`, `validate-yaml` for the card, `preupload` (which files are large),
the git-LFS `batch` for those, `PUT` to the address it names, `verify`, and one `commit` as lines of JSON.
"""

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote

from moelora.testing.hub_repos import HubRepo, git_sha1, is_large, sha256
from moelora.testing.hub_wire import Reply, Request, error_reply, json_reply

REPO = r"(?P<repo>[^/]+/[^/]+?)"
COMMIT = re.compile(rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)")
PREUPLOAD = re.compile(rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)")
BATCH = re.compile(rf"/{REPO}\.git/info/lfs/objects/batch")
VERIFY = re.compile(rf"/{REPO}\.git/info/lfs/objects/verify")


@dataclass(frozen=True, kw_only=True)
class Shelves:
    """What uploads change: the repositories, and the large files by their sha-256."""

    repos: dict[str, HubRepo]
    large: dict[str, bytes]
    hub_url: str
    storage_url: str


def upload_reply(request: Request, shelves: Shelves, user: str | None) -> Reply | None:
    """The answer to a request that writes, or None where no such route exists."""
    if request.host == "storage":
        return _put(request, shelves) if request.method == "PUT" else None
    if request.method != "POST":
        return None
    if request.path == "/api/validate-yaml":
        return json_reply({"errors": [], "warnings": []})
    if user is None:
        return error_reply(401, None, "Invalid username or password.")
    if request.path == "/api/repos/create":
        return _create(json.loads(request.body), shelves, user)

    for pattern, answer in ((COMMIT, _commit), (PREUPLOAD, _preupload), (BATCH, _batch), (VERIFY, _verify)):
        if found := pattern.fullmatch(request.path):
            repo = shelves.repos.get(found["repo"])
            if repo is None or not repo.readable_by(user):
                return error_reply(404, "RepoNotFound", "Repository not found")
            if found["repo"].split("/")[0] != user:
                return error_reply(403, None, "You don't have the rights to write to this repository")
            return answer(request, shelves, repo, unquote(found.groupdict().get("revision") or "main"))
    return None


def _create(asked: Mapping[str, object], shelves: Shelves, user: str) -> Reply:
    owner = asked.get("organization") or user
    repo_id = f"{owner}/{asked['name']}"
    content = {"url": f"{shelves.hub_url}/{repo_id}", "name": repo_id}
    if repo_id in shelves.repos:
        return json_reply({**content, "error": "You already created this model repo"}, status=409)
    if owner != user:
        return error_reply(403, None, f"You don't have the rights to create a model under the namespace {owner}")
    repo = HubRepo(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
    repo.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, message="initial commit")
    shelves.repos[repo_id] = repo
    return json_reply(content)


def _preupload(request: Request, shelves: Shelves, repo: HubRepo, revision: str) -> Reply:
    commit = repo.resolve(revision)
    if commit is None:
        return error_reply(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def describe(path: str) -> dict[str, object]:
        present = repo.commits[commit].get(path)
        name = None if present is None else sha256(present) if is_large(path) else git_sha1(present)
        return {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False, "oid": name}

    return json_reply({"files": [describe(file["path"]) for file in json.loads(request.body)["files"]]})


def _batch(request: Request, shelves: Shelves, repo: HubRepo, revision: str) -> Reply:
    def describe(oid: str, size: int) -> dict[str, object]:
        if oid in shelves.large:
            return {"oid": oid, "size": size}
        verify = f"{shelves.hub_url}/{repo.repo_id}.git/info/lfs/objects/verify"
        actions = {"upload": {"href": f"{shelves.storage_url}/large/{oid}"}, "verify": {"href": verify}}
        return {"oid": oid, "size": size, "actions": actions}

    objects = [describe(item["oid"], item["size"]) for item in json.loads(request.body)["objects"]]
    return json_reply({"transfer": "basic", "objects": objects})


def _put(request: Request, shelves: Shelves) -> Reply:
    oid = request.path.removeprefix("/large/")
    if sha256(request.body) != oid:
        return error_reply(400, None, "the content does not have the announced sha-256")
    shelves.large[oid] = request.body
    return Reply(headers={"ETag": f'"{oid}"'})


def _verify(request: Request, shelves: Shelves, repo: HubRepo, revision: str) -> Reply:
    asked = json.loads(request.body)
    stored = shelves.large.get(asked["oid"])
    if stored is None or len(stored) != asked["size"]:
        return error_reply(404, None, "no such object")
    return json_reply({})


def _commit(request: Request, shelves: Shelves, repo: HubRepo, revision: str) -> Reply:
    changes: dict[str, bytes | None] = {}
    message = ""
    present = repo.commits[repo.refs[revision]] if revision in repo.refs else {}
    for line in request.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        match item["key"]:
            case "header":
                message = value["summary"]
            case "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            case "lfsFile" if value["oid"] in shelves.large:
                changes[value["path"]] = shelves.large[value["oid"]]
            case "deletedFile":
                changes[value["path"]] = None
            case "deletedFolder":
                changes |= {path: None for path in present if path.startswith(value["path"].rstrip("/") + "/")}
            case other:
                return error_reply(400, None, f"cannot commit {other} {value.get('path')}")
    commit = repo.commit(changes, branch=revision, message=message)
    url = f"{shelves.hub_url}/{repo.repo_id}/commit/{commit}"
    return json_reply({"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": ""})
