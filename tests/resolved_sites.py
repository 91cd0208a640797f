"""What tests of target resolution ask of its answer."""

from moelora.integrations.sites import Resolution


def last(path: str) -> str:
    """The last segment of a module path."""
    return path.rpartition(".")[2]


def by_role(resolution: Resolution) -> dict[str, list[str]]:
    """The paths of the sites of each role."""
    roles: dict[str, list[str]] = {}
    for site in resolution.sites:
        roles.setdefault(site.role, []).append(site.path)
    return roles
