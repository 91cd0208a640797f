"""What an adapter is once it has passed the door. Begin with Adapter.

An adapter holds factors per module path; a path's factors are one expert-to-be: `delta = scale * (x A' B + bias)`.
Everything here is plain data; reading and checking happen in the neighbours.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor


class AdapterError(ValueError):
    """An adapter was refused; the message names the source, the field or key, what was expected and what to do."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper bounds on what an adapter, which is untrusted input, may ask for.

    Attributes:
        file_bytes: size of the weight file; checked before a download too.
        header_bytes: size of the safetensors header.
        config_bytes: size of adapter_config.json.
        tensors: number of tensors in the file.
        elements: numbers in all tensors together.
        rank: rank of one factor pair.
        scale: absolute value of lora_alpha / r (or of lora_alpha / sqrt(r) for rsLoRA).
    """

    file_bytes: int = 16 * 2**30
    header_bytes: int = 16 * 2**20
    config_bytes: int = 4 * 2**20
    tensors: int = 100_000
    elements: int = 2**33
    rank: int = 1024
    scale: float = 1e4


@dataclass(frozen=True, kw_only=True)
class SiteFactors:
    """One adapter's factors for one linear projection: `delta = scale * ((x @ A_RD.T) @ B_RO + bias_O)`.

    Attributes:
        A_RD: PEFT's lora_A as it is.
        B_RO: PEFT's lora_B, (out, r), as a transposed view.
        scale: the trained scale; it multiplies the bias too, as in PEFT.
        bias_O: bias of lora_B (`lora_bias=True`), or None.
    """

    A_RD: Float[Tensor, "R D"]
    B_RO: Float[Tensor, "R O"]
    scale: float
    bias_O: Float[Tensor, " O"] | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterSource:
    """Where an adapter came from, exactly enough to fetch the same bytes again.

    Attributes:
        kind: "folder", "hub", "state_dict", "peft_model" or "fresh".
        location: the folder, the hub id, or a description of an object in memory.
        revision: the revision that was asked for.
        subfolder: the sub-folder inside the repository.
        commit: the commit the hub resolved the revision to.
        sha256: digest of the weight file; None for objects in memory.
    """

    kind: str
    location: str
    revision: str | None = None
    subfolder: str | None = None
    commit: str | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        subfolder = f":{self.subfolder}" if self.subfolder else ""
        return f"{self.location}{revision}{subfolder}"

    def to_dict(self) -> dict[str, str | None]:
        """The source as JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AdapterSource":
        """The inverse of `to_dict`; an unknown field is an error."""
        known = set(cls.__dataclass_fields__)
        if unknown := sorted(set(values) - known):
            raise AdapterError(f"unknown fields {unknown} in an adapter source; expected some of {sorted(known)}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One loaded adapter.

    Attributes:
        name: the expert's name: letters, digits, "-", "_" and ".".
        source: where it came from.
        base_model: the base named in its config, which may be anything, a path on the author's disk included.
        factors: module path (wrapper prefixes removed) to factors.
        notes: what a user may want to know, one sentence each; with strict=False also what was left out.
    """

    name: str
    source: AdapterSource
    base_model: str | None = None
    factors: dict[str, SiteFactors] = field(repr=False)
    notes: tuple[str, ...] = ()


def shown(value: object, limit: int = 120) -> str:
    """A value from an untrusted file, fit for a message: escaped, on one line, and short."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def listed(items: "list[str] | tuple[str, ...]", limit: int = 8) -> str:
    """The first few of many, comma-separated, with the number of the rest."""
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest
