"""Adapters and mixtures from a model hub, and to it. Begin with download_adapter.

The hub client (`huggingface_hub`) does the transfer and keeps the cache. What this room adds: only files with fixed
names are touched; sizes are read before anything is downloaded; all files come from one commit; what arrives must have
the hash that was announced; and every failure is a `HubError` that says what to do. With `local_files_only=True` or
HF_HUB_OFFLINE nothing is asked, not even whether a newer version exists.

A user's way: `names` checks what was typed, `client` asks the hub and waits a little when it is busy, `adapters`,
`header` and `mixtures` know which files belong together, `verify` checks what arrived, `errors` explains the rest.
"""

from moelora.integrations.hub.adapters import HubFiles as HubFiles
from moelora.integrations.hub.adapters import download_adapter as download_adapter
from moelora.integrations.hub.errors import HubError as HubError
from moelora.integrations.hub.header import RemoteAdapter as RemoteAdapter
from moelora.integrations.hub.header import remote_header as remote_header
from moelora.integrations.hub.mixtures import HubCommit as HubCommit
from moelora.integrations.hub.mixtures import download_mixture as download_mixture
from moelora.integrations.hub.mixtures import upload_folder as upload_folder
