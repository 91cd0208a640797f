"""What holds in every test: shapes are checked, nothing leaves the machine, one thread, reproducible examples."""

import os
import socket
import tempfile

# Read by huggingface_hub when it is imported, so set before anything else: a cache of its own, no token of the
# developer's, no telemetry, and time-outs that a local server can exhaust in a test.
os.environ.update(
    HF_HOME=tempfile.mkdtemp(prefix="moelora-tests-hf-"),
    HF_HUB_DISABLE_IMPLICIT_TOKEN="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DOWNLOAD_TIMEOUT="5",
    HF_HUB_ETAG_TIMEOUT="2",
    TOKENIZERS_PARALLELISM="false",
    # what cuBLAS needs to be deterministic, where there is a GPU
    CUBLAS_WORKSPACE_CONFIG=":4096:8",
)
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
    os.environ.pop(name, None)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# Without a GPU, Triton's kernels are interpreted; Triton looks at this when the kernels are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Annotations of moelora become checks. Tests of torch.compile switch this off: checked functions break the graph.
if os.environ.get("JAXTYPING_DISABLE", "0") != "1":
    from jaxtyping import install_import_hook

    install_import_hook("moelora", "beartype.beartype")

# Two workers on two cores: more threads than that only wait for each other.
torch.set_num_threads(1)

hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


class LeftTheMachine(Exception):
    """A test tried to reach another machine. Not an OSError, so that no client retries it."""


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def connect_to_this_machine(self: socket.socket, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise LeftTheMachine(f"tests stay on this machine, but one connects to {address[0]!r}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_to_this_machine)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)
