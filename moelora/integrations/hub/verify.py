"""What came over the wire must be what was announced. Begin with discard_unless_intact.

A hub announces a file by its ETag: the sha-256 of a large file, git's sha-1 of a small one. The client checks sizes
only, so a file damaged on the way would stay in the cache under a good name, and every later load would take it.
"""

import hashlib
import re
from pathlib import Path

from moelora.integrations.hub.errors import HubError, Place


def discard_unless_intact(path: Path, etag: str, place: Place) -> None:
    """Remove a cached file whose content does not have the announced hash, and raise `HubError`.

    An ETag of another kind, as some mirrors send, says nothing and passes.
    """
    if content_matches(path, etag):
        return
    # the cache links a name in the snapshot to a blob: both go, so that the next call downloads anew
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)
    raise HubError(
        f"{place}: {path.name} was damaged on the way (its content does not have the announced hash). "
        "It was removed from the cache; try again.",
        transient=True,
    )


def content_matches(path: Path, etag: str) -> bool:
    """Whether the file has the hash that an ETag names: sha-256 (64 digits) or git's sha-1 of a blob (40 digits)."""
    if re.fullmatch(r"[0-9a-f]{64}", etag):
        expected = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", etag):
        expected = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    else:
        return True
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            expected.update(chunk)
    return expected.hexdigest() == etag
