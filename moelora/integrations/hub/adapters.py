"""The two files of a PEFT adapter, through the hub client's cache. Begin with download_adapter."""

import warnings
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfFileMetadata, constants, hf_hub_download, try_to_load_from_cache

from moelora.integrations.hub.client import LIBRARY_NAME, LIBRARY_VERSION, file_list, file_metadata, patiently
from moelora.integrations.hub.errors import HubError, Place, offline
from moelora.integrations.hub.names import check_token, checked_place
from moelora.integrations.hub.verify import discard_unless_intact

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

MAX_CONFIG_BYTES = 2**20
MAX_WEIGHTS_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class HubFiles:
    """The two files of an adapter in the local cache, both of one commit."""

    config_path: Path
    weights_path: Path
    commit: str


def download_adapter(
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    max_bytes: int = MAX_WEIGHTS_BYTES,
) -> HubFiles:
    """The config and the weights of a PEFT adapter, downloaded into the hub client's cache where they are not yet.

    A full commit that is in the cache costs no request; a branch or a tag costs one, to learn whether it moved. If
    the hub cannot answer, the newest cached files of that branch are used with a warning.

    Raises `HubError`: not found, private, gated, no such revision, not an adapter, pickled weights, larger than
    `max_bytes`, damaged on the way, hub unreachable, or offline and not in the cache.
    """
    place = checked_place(repo_id, revision=revision, subfolder=subfolder, endpoint=endpoint)
    check_token(token)
    cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
    cached = _cached_adapter(place, cache_dir)
    if local_files_only or constants.HF_HUB_OFFLINE:
        if cached is None:
            raise offline(place)
        return cached
    if cached is not None and cached.commit == place.revision:
        return cached

    # which commit, and how large are its files
    try:
        config = adapter_file(place, CONFIG_NAME, token, place.revision, MAX_CONFIG_BYTES)
        commit = str(config.commit_hash)
        if cached is not None and cached.commit == commit:
            return cached
        weights = adapter_file(place, WEIGHTS_NAME, token, commit, max_bytes)
    except HubError as error:
        if cached is None or not error.transient:
            raise
        warnings.warn(f"{error} Going on with commit {cached.commit} from the cache.", stacklevel=2)
        return cached

    # the branch's name goes with the first file, so that the cache knows later what the branch was
    config_path = _download(place, CONFIG_NAME, place.revision, token, cache_dir, config)
    weights_path = _download(place, WEIGHTS_NAME, commit, token, cache_dir, weights)
    return HubFiles(config_path=config_path, weights_path=weights_path, commit=commit)


def adapter_file(place: Place, name: str, token: str | bool | None, revision: str, max_bytes: int) -> HfFileMetadata:
    """What the hub says of one of the two files; a missing one is explained."""
    metadata = file_metadata(place, name, token, revision=revision, max_bytes=max_bytes)
    if metadata is None:
        raise _no_such_file(place, name, token)
    return metadata


def _download(
    place: Place,
    name: str,
    revision: str,
    token: str | bool | None,
    cache_dir: Path | None,
    announced: HfFileMetadata,
) -> Path:
    """One file into the cache, with the announced hash, or nothing."""

    def fetch() -> str:
        return hf_hub_download(
            place.repo_id,
            place.path_of(name),
            revision=revision,
            token=token,
            endpoint=place.endpoint,
            cache_dir=cache_dir,
            library_name=LIBRARY_NAME,
            library_version=LIBRARY_VERSION,
        )

    path = Path(patiently(fetch, place, token))
    if _commit_of(path, place) != announced.commit_hash:
        raise HubError(f"{place} got a new commit while it was downloaded: call again.", transient=True)
    discard_unless_intact(path, str(announced.etag), place)
    return path


def _cached_adapter(place: Place, cache_dir: Path | None) -> HubFiles | None:
    """Both files as the cache has them for this revision, if it has both. Asks nobody."""
    found = []
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        path = try_to_load_from_cache(place.repo_id, place.path_of(name), cache_dir, place.revision)
        if not isinstance(path, str):
            return None
        found.append(Path(path))
    return HubFiles(config_path=found[0], weights_path=found[1], commit=_commit_of(found[0], place))


def _commit_of(path: Path, place: Place) -> str:
    """The snapshot that a file of the cache belongs to."""
    return path.parents[len(place.subfolder.split("/")) if place.subfolder else 0].name


def _no_such_file(place: Place, name: str, token: str | bool | None) -> HubError:
    """Why an adapter's file is missing, from the list of what the repository has instead."""
    files = file_list(place, token)
    folder = f"{place.subfolder}/" if place.subfolder else ""
    if name == WEIGHTS_NAME and folder + PICKLE_NAME in files:
        return HubError(
            f"{place} has its weights only as {PICKLE_NAME}, a pickle, which can run code when it is read: refused. "
            "Ask its author for safetensors, or, if you trust it, load it with PEFT, call save_pretrained(folder) and "
            "pass that folder."
        )
    elsewhere = sorted({path.rpartition("/")[0] for path in files if path.rpartition("/")[2] == CONFIG_NAME} - {""})
    hint = (
        f" Its folders {elsewhere[:5]} have one: add the folder to the source, as in {place.repo_id}:{elsewhere[0]}."
        if elsewhere
        else ""
    )
    return HubError(f"{place} has no {name}, so it is not a PEFT adapter with safetensors weights.{hint}")
