"""Plain JSON values as checked dataclasses. Begin with checked.

The values may come from a stranger: every error says which field it is, what was expected there, and what came.
"""

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def checked(kind: type[Kind], values: Any, what: str) -> Kind:
    """A dataclass of numbers, texts, flags and further dataclasses, from what `dataclasses.asdict` gave of it.

    Fields with a default may be missing.

    Args:
        kind: the dataclass.
        values: of its fields, by name.
        what: they are, for messages.

    Raises:
        ValueError: for fields that are missing or unknown, values of another type, and what the class itself refuses.
    """
    assert is_dataclass(kind)
    known = {field.name: field for field in fields(kind)}
    required = [name for name, field in known.items() if field.default is field.default_factory is MISSING]
    check_names(values, what, required=required, known=known)
    return kind(**{name: _of_type(known[name].type, value, f"{name} of {what}") for name, value in values.items()})


def check_names(values: Any, what: str, *, required: Collection[str], known: Collection[str] | None = None) -> None:
    """Raise ValueError unless these are a mapping with the required names, and no others than the known ones."""
    expect(isinstance(values, dict), what, "a mapping", values)
    missing, unknown = sorted(set(required) - set(values)), sorted(set(values) - set(known or required))
    if missing or unknown:
        raise ValueError(f"{what}: missing {missing}, unknown {unknown[:5]}; expected {sorted(known or required)}")


def check_type(kind: Any, value: Any, what: str) -> None:
    """Raise ValueError unless a value is of a type: bool, int, float, str, or one of these and None."""
    expected, fits = _TYPES[kind]
    expect(fits(value), what, expected, value)


def expect(holds: bool, what: str, expected: str, came: object) -> None:
    """Raise ValueError unless a condition holds."""
    if not holds:
        raise ValueError(f"{what}: expected {expected}, got {repr(came)[:120]}")


def is_whole(value: object) -> bool:
    """Whether this is an integer of 64 bits, and no flag."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_number(value: object) -> bool:
    """Whether this is a finite number, and no flag. JSON's integers may be too large for a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


# --- inside -----------------------------------------------------------------------------------------------------------

_TYPES: Mapping[Any, tuple[str, Callable[[object], bool]]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", is_whole),
    float: ("a finite number", is_number),
    str: ("text", lambda value: isinstance(value, str)),
    int | None: ("a whole number or null", lambda value: value is None or is_whole(value)),
    float | None: ("a finite number or null", lambda value: value is None or is_number(value)),
}


def _of_type(kind: Any, value: Any, what: str) -> Any:
    if is_dataclass(kind):
        return checked(kind, value, what)  # pyright: ignore[reportArgumentType]
    check_type(kind, value, what)
    return float(value) if kind is float else value
