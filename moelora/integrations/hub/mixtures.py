"""Whole mixtures, as `moelora.save` writes them, from a hub and to it. Begin with download_mixture.

A mixture is a folder with a config, the routers and, if they were included, its experts as numbered PEFT folders; a
stack's has two files more. Nothing else is downloaded, and nothing else but the model card is uploaded.
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoSibling

from moelora.integrations.hub.client import LIBRARY_NAME, LIBRARY_VERSION, hub_api, patiently, sends_token, too_large
from moelora.integrations.hub.errors import CLIENT_ERRORS, HubError, Place, explain, not_a_hub, offline
from moelora.integrations.hub.names import COMMIT, check_token, checked_place
from moelora.integrations.hub.verify import discard_unless_intact

CONFIG_NAME = "moelora_config.json"
ROUTERS_NAME = "routers.safetensors"
STACK_NAMES = ("stack.json", "stack.safetensors")
FILES = re.compile(
    r"moelora_config\.json|routers\.safetensors|stack\.(json|safetensors)"
    r"|experts/\d{3,6}/adapter_(config\.json|model\.safetensors)"
)

MAX_CONFIG_BYTES = 64 * 2**20
MAX_MIXTURE_BYTES = 64 * 2**30

UPLOADED = [
    "README.md",
    CONFIG_NAME,
    ROUTERS_NAME,
    *STACK_NAMES,
    "experts/*/adapter_config.json",
    "experts/*/adapter_model.safetensors",
]


@dataclass(frozen=True, kw_only=True)
class HubCommit:
    """A commit on a hub: its 40-digit name and its page."""

    commit: str
    url: str


def download_mixture(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    max_bytes: int = MAX_MIXTURE_BYTES,
) -> tuple[Path, str]:
    """The local folder of a mixture that was pushed to a hub, and its commit.

    Raises `HubError` as `download_adapter` does, and for a repository without a moelora mixture.
    """
    place = checked_place(repo_id, revision=revision, endpoint=endpoint)
    check_token(token)
    cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
    cached = _cached_mixture(place, cache_dir)
    if local_files_only or constants.HF_HUB_OFFLINE:
        if cached is None or not _is_complete(place, cache_dir):
            raise offline(place)
        return cached, cached.name

    # which commit, and which files with which sizes
    try:
        commit, files = _mixture_files(place, token)
    except HubError as error:
        if cached is None or not error.transient:
            raise
        warnings.warn(f"{error} Going on with commit {cached.name} from the cache.", stacklevel=2)
        return cached, cached.name
    _check_sizes(place, files, max_bytes)
    missing = [file for file in files if not _is_cached(place, file.rfilename, commit, cache_dir)]
    if not missing and cached is not None and cached.name == commit:
        return cached, commit

    def fetch() -> str:
        return snapshot_download(
            place.repo_id,
            revision=place.revision,
            token=token,
            endpoint=place.endpoint,
            cache_dir=cache_dir,
            allow_patterns=[file.rfilename for file in files],
            library_name=LIBRARY_NAME,
            library_version=LIBRARY_VERSION,
        )

    folder = Path(patiently(fetch, place, token))
    if folder.name != commit:
        raise HubError(f"{place} got a new commit while it was downloaded: call again.", transient=True)
    for file in missing:
        announced = file.lfs.sha256 if file.lfs is not None else str(file.blob_id)
        discard_unless_intact(folder / file.rfilename, announced, place)
    return folder, commit


def upload_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    endpoint: str | None = None,
    private: bool = False,
    commit_message: str = "Upload a mixture of LoRA experts",
) -> HubCommit:
    """Push a saved mixture and its card; the repository is made where it does not exist.

    Only the files of a mixture and README.md go up, whatever else the folder holds; experts and a stack's files of an
    earlier push that the folder does not have are removed there. `private` counts when the repository is new.

    Raises `HubError` for a folder that is no mixture, offline mode, no right to write, an unreachable hub.
    """
    place = checked_place(repo_id, endpoint=endpoint)
    check_token(token)
    for name in (CONFIG_NAME, ROUTERS_NAME):
        if not (Path(folder) / name).is_file():
            raise HubError(
                f"{str(folder)!r} is not a saved mixture: it has no {name}. Call moelora.save(model, folder) first."
            )
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{place} cannot be written: HF_HUB_OFFLINE is set. The mixture is in {str(folder)!r}.")

    api = hub_api(place, token)
    try:
        api.create_repo(place.repo_id, private=private, exist_ok=True)
        pushed = api.upload_folder(
            repo_id=place.repo_id,
            folder_path=folder,
            commit_message=commit_message,
            allow_patterns=UPLOADED,
            delete_patterns=["experts/*", *STACK_NAMES],
        )
    except (*CLIENT_ERRORS, RuntimeError) as error:
        raise explain(error, place, has_token=sends_token(token)) from error
    return HubCommit(commit=pushed.oid, url=str(pushed.commit_url))


def _mixture_files(place: Place, token: str | bool | None) -> tuple[str, list[RepoSibling]]:
    """The commit that the revision stands for now, and the mixture's files in it."""
    api = hub_api(place, token)
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = patiently(
        lambda: api.model_info(place.repo_id, revision=place.revision, files_metadata=True, timeout=timeout),
        place,
        token,
    )
    if not COMMIT.fullmatch(info.sha or ""):
        raise HubError(not_a_hub(place, "its answer lacks a commit"))
    files = [file for file in info.siblings or [] if FILES.fullmatch(file.rfilename)]
    names = {file.rfilename for file in files}
    if not {CONFIG_NAME, ROUTERS_NAME} <= names:
        missing = sorted({CONFIG_NAME, ROUTERS_NAME} - names)
        hint = ""
        if any(file.rfilename == "adapter_config.json" for file in info.siblings or []):
            hint = " It holds a single adapter: pass it to moelora.patch_model(model, experts=[...]) instead."
        raise HubError(f"{place} has no {' and no '.join(missing)}, so it is not a mixture pushed by moelora.{hint}")
    return str(info.sha), files


def _check_sizes(place: Place, files: list[RepoSibling], max_bytes: int) -> None:
    """Refuse what is too large before anything is downloaded."""
    for file in files:
        if file.size is None:
            raise HubError(not_a_hub(place, f"it does not say how large {file.rfilename} is"))
        if file.rfilename.endswith(".json") and file.size > MAX_CONFIG_BYTES:
            raise too_large(place, file.rfilename, file.size, MAX_CONFIG_BYTES)
    total = sum(file.size or 0 for file in files)
    if total > max_bytes:
        raise too_large(place, "the whole mixture", total, max_bytes)


def _cached_mixture(place: Place, cache_dir: Path | None) -> Path | None:
    """The snapshot folder for this revision, if config and routers lie in it. Asks nobody."""
    found = [
        try_to_load_from_cache(place.repo_id, name, cache_dir, place.revision) for name in (CONFIG_NAME, ROUTERS_NAME)
    ]
    return Path(found[0]).parent if isinstance(found[0], str) and isinstance(found[1], str) else None


def _is_complete(place: Place, cache_dir: Path | None) -> bool:
    """Whether the snapshot has all the files that its listing, kept by the client, names. Asks nobody."""
    try:
        snapshot_download(
            place.repo_id,
            revision=place.revision,
            cache_dir=cache_dir,
            local_files_only=True,
            allow_patterns=[pattern for pattern in UPLOADED if pattern != "README.md"],
        )
    except LocalEntryNotFoundError:
        return False
    return True


def _is_cached(place: Place, path: str, commit: str, cache_dir: Path | None) -> bool:
    return isinstance(try_to_load_from_cache(place.repo_id, path, cache_dir, commit), str)
