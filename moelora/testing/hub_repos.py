"""What the local hub keeps: repositories with commits, branches and tags. Begin with HubRepo.

A repository here is small and lives in memory: a commit is the full mapping from path to content. Large files
(by suffix, as a hub's `.gitattributes` does) are served through a redirect to the storage host, like git LFS.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".msgpack", ".h5")


def is_large(path: str) -> bool:
    """Whether a hub keeps this file in its large-file storage."""
    return path.endswith(LARGE_SUFFIXES)


def git_sha1(content: bytes) -> str:
    """git's name for a blob: the ETag of a small file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    """The name of a large file, and its ETag."""
    return hashlib.sha256(content).hexdigest()


def read_files(source: str | Path | Mapping[str, bytes]) -> dict[str, bytes]:
    """All files below a folder as path -> content; a mapping is copied."""
    if isinstance(source, Mapping):
        return dict(source)
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"a hub repository is made from a folder or a mapping path -> bytes, got {str(source)!r}")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@dataclass
class HubRepo:
    """One model repository. `refs` maps branches and tags to commits; `accepted` are the users who took the terms."""

    repo_id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    accepted: set[str] = field(default_factory=set)

    def commit(self, changes: Mapping[str, bytes | None], *, branch: str = "main", message: str = "") -> str:
        """Add, replace or (with None) delete files on a branch; returns the new commit's 40-digit name."""
        parent = self.refs.get(branch)
        files = dict(self.commits[parent]) if parent else {}
        for path, content in changes.items():
            if content is None:
                files.pop(path, None)
            else:
                files[path] = content

        described = [parent, message, len(self.commits), {path: sha256(content) for path, content in files.items()}]
        commit = hashlib.sha1(json.dumps(described, sort_keys=True).encode()).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit

    def tag(self, name: str, revision: str = "main") -> None:
        """Give a commit a second name."""
        commit = self.resolve(revision)
        if commit is None:
            raise ValueError(f"{self.repo_id} has no revision {revision!r}; it has {sorted(self.refs)}")
        self.refs[name] = commit

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag, a commit or the first 7 or more digits of one stands for."""
        if revision in self.refs:
            return self.refs[revision]
        matching = [commit for commit in self.commits if len(revision) >= 7 and commit.startswith(revision)]
        return matching[0] if len(matching) == 1 else None

    def readable_by(self, user: str | None) -> bool:
        """Private repositories are seen by their owner alone."""
        return not self.private or user == self.repo_id.split("/")[0]

    def open_to(self, user: str | None) -> bool:
        """Files of a gated repository are handed to those who took its terms."""
        return not self.gated or user in self.accepted
