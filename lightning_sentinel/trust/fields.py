"""Reads fields of JSON that may come from anybody: a field that is not what it has to be is one error, which names it."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from typing import Any, TypeVar

from lightning_sentinel.errors import ConfigurationError, MalformedMessageError
from lightning_sentinel.mesh import Worker

__all__ = [
    "LARGEST_REAL",
    "UnreadableError",
    "as_text",
    "flag",
    "list_of",
    "number",
    "of_bytes",
    "of_text",
    "place",
    "plain",
    "real",
    "require_fields",
    "text",
    "worker_of",
]

T = TypeVar("T")

_LARGEST_NUMBER = 2**32 - 1
LARGEST_REAL = 1e300
"""Below which real numbers in files are."""


class UnreadableError(Exception):
    """A field is not what it has to be."""


def require_fields(entry: Any, fields: tuple[str, ...], name: str) -> None:
    """Require an object with these fields and no others."""
    if not isinstance(entry, dict) or set(entry) != set(fields):
        raise UnreadableError(f"{name} has not exactly the fields {', '.join(fields)}")


def list_of(value: Any, name: str) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise UnreadableError(f"{name} is no list")
    return value


def worker_of(entry: Any, name: str) -> Worker:
    """A worker, of an object that has a stage and a replica."""
    return Worker(number(entry["stage"], f"{name}.stage"), number(entry["replica"], f"{name}.replica"))


def place(one: Worker) -> dict[str, int]:
    """The object from which :func:`worker_of` reads a worker."""
    return {"stage": one.stage, "replica": one.replica}


def number(value: Any, name: str, most: int = _LARGEST_NUMBER) -> int:
    """A whole number that is at least 0."""
    if type(value) is not int or not 0 <= value <= most:
        raise UnreadableError(f"{name} is no whole number from 0 to {most}")
    return value


def real(value: Any, name: str, signed: bool = False) -> float:
    """A number, which is at least 0 unless it is signed; where it is signed it may be infinite, which JSON has as a text."""
    if signed and value in ("inf", "-inf"):
        return float(value)
    # Compared before it is converted: a whole number may be too large for that, and JSON as Python reads it has NaN.
    if type(value) not in (int, float) or not (-LARGEST_REAL if signed else 0) <= value < LARGEST_REAL:
        raise UnreadableError(f"{name} is no number{'' if signed else ' that is at least 0'}")
    return float(value)


def flag(value: Any, name: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise UnreadableError(f"{name} is neither true nor false")
    return value


def text(value: Any, name: str) -> str:
    """A text."""
    if not isinstance(value, str):
        raise UnreadableError(f"{name} is no text")
    return value


def of_text(read: Callable[[str], T], value: Any, name: str) -> T:
    """What a text stands for."""
    try:
        return read(text(value, name))
    except (ConfigurationError, MalformedMessageError, ValueError) as error:
        raise UnreadableError(f"{name}: {error}") from None


def of_bytes(encoded: str) -> bytes:
    """The bytes that a text of base64 stands for."""
    return base64.b64decode(encoded, validate=True)


def as_text(encoded: bytes) -> str:
    """The text from which :func:`of_bytes` reads bytes."""
    return base64.b64encode(encoded).decode()


def plain(value: float) -> float | str:
    """A number for JSON, which has none for what is not finite."""
    return value if math.isfinite(value) else str(value)
