"""The types that target resolution answers with: `Site`, `Refused`, `Resolution`, and the error `TargetError`."""

from collections.abc import Iterable
from dataclasses import dataclass

from moelora.integrations.families import ROLES


@dataclass(frozen=True, kw_only=True)
class Site:
    """One linear projection that can be patched. Its name is its module path.

    `reads_encoder`: a key or value projection of cross-attention, whose input rows are the encoder's tokens.
    `aliases`: the other paths at which the same module object stands; they must be replaced together.
    """

    path: str
    role: str
    in_features: int
    out_features: int
    reads_encoder: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A linear that cannot be patched, and why."""

    path: str
    reason: str


class TargetError(ValueError):
    """Targets that match nothing, or that cannot be patched; `refused` holds the latter with their reasons."""

    def __init__(self, message: str, refused: tuple[Refused, ...] = ()) -> None:
        super().__init__(message)
        self.refused = refused


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """What will be patched. `str()` of it is a table to read.

    `groups` splits the site paths: those of one group stand in one block and read the same input tensor in every call
    of the probe (q, k and v), so they may share a router. A site that shares its input with nobody is a group of its
    own.
    """

    sites: tuple[Site, ...]
    refused: tuple[Refused, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()

    def __str__(self) -> str:
        lines = [("role", "sites", "in -> out", "where")]
        for role in ROLES:
            members = [site for site in self.sites if site.role == role]
            shapes: dict[str, list[Site]] = {}
            for site in members:
                shapes.setdefault(f"{site.in_features} -> {site.out_features}", []).append(site)
            for shape, alike in shapes.items():
                lines.append((role, str(len(alike)), shape, ", ".join(_patterns(site.path for site in alike))))
        lines += [
            ("refused", str(len(paths)), reason, ", ".join(_patterns(paths))) for reason, paths in self._reasons()
        ]
        widths = [max(len(line[column]) for line in lines) for column in range(2)]
        return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}  {d}" for a, b, c, d in lines)

    def _reasons(self) -> list[tuple[str, list[str]]]:
        reasons: dict[str, list[str]] = {}
        for refused in self.refused:
            reasons.setdefault(refused.reason, []).append(refused.path)
        return list(reasons.items())


def _patterns(paths: Iterable[str]) -> list[str]:
    """Paths with their numbers starred out, each pattern once: `model.layers.*.self_attn.q_proj`."""
    starred = (".".join("*" if part.isdigit() else part for part in path.split(".")) for path in paths)
    return list(dict.fromkeys(starred))
