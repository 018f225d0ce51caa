"""Turns an error of ``jsonargparse`` about a setting of this package into the message of the setting's own class.

``jsonargparse`` puts the reason among all types that it has tried, and the whole configuration behind that. The class knows what a
setting is for and which values it can have, so its message is shown.
"""

from __future__ import annotations

import ast
import inspect
import re
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.errors import SentinelError

__all__ = ["in_our_words"]

_CLASS = re.compile(r"class_path '(lightning_sentinel\.[\w.]+)'")
_UNKNOWN = re.compile(r"Option '([\w.]+)' is not accepted")
_KEY = re.compile(r'Parser key "([\w.]+)":')
_VALUE = re.compile(r"(?:Got|Given) value: (.*)")
_EXPECTED = re.compile(r"Expected an? .*|Not of type .*")
_NESTED = re.compile(r"NestedArg\(key='[\w.]+', val=(.*)\)$")
_GROUPS = {"verification": Verification, "response": Response}


def in_our_words(message: str) -> str | None:
    """One sentence with the value, the cause and the remedy; ``None`` if the message is about something else.

    Args:
        message: the error message of a ``jsonargparse`` parser.

    Example:
        >>> in_our_words("- Problem with given class_path 'lightning_sentinel.Verification':\\n  Option 'warmup' is not accepted")
        "Verification has no setting 'warmup'. Did you mean 'warmup_steps'?"
    """
    named = list(_CLASS.finditer(message))
    if not named:
        return None
    reason = message[named[-1].end() :]
    kind = _class_of(named[-1].group(1))
    unknown = _UNKNOWN.search(reason)
    key = _KEY.search(reason)
    found = unknown or key
    if kind is None or found is None:
        return None
    outer, _, inner = found.group(1).rpartition(".")
    kind = _GROUPS.get(outer, kind) if outer else kind
    if unknown is not None:
        return _no_such(inner, kind)
    value = _value_of(inner, reason[found.end() :])
    try:
        kind(**{inner: value})
    except SentinelError as error:
        return str(error)
    except Exception:
        pass
    expected = _EXPECTED.search(reason)
    return f"{kind.__name__}.{inner}={value!r} cannot work. {'' if expected is None else expected.group().strip()}".strip()


def _class_of(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None


def _no_such(name: str, kind: Any) -> str:
    known = list(inspect.signature(kind).parameters)
    near = get_close_matches(name, known, 1)
    remedy = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(known)}."
    return f"{kind.__name__} has no setting {name!r}. {remedy}"


def _value_of(name: str, reason: str) -> Any:
    """The value given for a setting: the one that the parser names, or the setting's entry in the whole object that it names."""
    found = _VALUE.search(reason)
    text = "" if found is None else found.group(1).strip()
    if (nested := _NESTED.match(text)) is not None:
        text = nested.group(1)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value["init_args"].get(name) if isinstance(value, dict) and "init_args" in value else value
