"""Names that reach a hub or the cache: repository, revision, folder, token. Begin with checked_place.

The cache's paths are made from these names, so a name with `..` in it could leave the cache: such names are refused
before anything is asked.
"""

import re

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from moelora.integrations.hub.errors import HubError, Place

# git's rules for names of branches and tags, narrowed to printable ASCII.
REVISION = re.compile(r"(?!/)(?!.*(?:\.\.|//|/\.|@\{))[A-Za-z0-9_.+=@#,/-]{1,200}(?<!/)(?<!\.)(?<!\.lock)")
FOLDER = re.compile(r"(?!\.{1,2}$)[\w.+@=, -]{1,200}")
COMMIT = re.compile(r"[0-9a-f]{40}")
ETAG = re.compile(r"[A-Za-z0-9_-]{1,128}")


def checked_place(
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    endpoint: str | None = None,
) -> Place:
    """All names checked; `revision` defaults to main, `endpoint` to the hub client's (HF_ENDPOINT)."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is not the id of a hub repository, such as 'owner/name': {error}") from None
    if revision is not None and not REVISION.fullmatch(revision):
        raise HubError(f"{revision!r} is not a revision: expected a branch, a tag or a commit of {repo_id!r}.")
    if subfolder and not all(FOLDER.fullmatch(part) for part in subfolder.split("/")):
        raise HubError(
            f"{subfolder!r} is not a folder inside {repo_id!r}: expected names joined by '/', without '..' and "
            "without a leading or trailing '/'."
        )
    if endpoint is not None and not re.match(r"https?://[^/]", endpoint):
        raise HubError("endpoint=... must be the address of a hub, beginning with https:// (or http://).")
    return Place(
        repo_id=repo_id,
        revision=revision or constants.DEFAULT_REVISION,
        subfolder=subfolder or None,
        endpoint=(endpoint or constants.ENDPOINT).rstrip("/"),
    )


def check_token(token: str | bool | None) -> None:
    """Refuse what cannot be sent as a header, without repeating it."""
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise HubError(
            "token=... is empty or has spaces, line ends or other characters that no token has: pass the bare token "
            "(it is not repeated here)."
        )
