"""Files of evidence: one of JSON for each ban, which people can look into and other programs can read.

Keys are texts, statements and digests are base64 of their encodings (:mod:`lightning_sentinel.trust.encoding`). A file may come
from anybody: it is bounded before it is read, and whatever is wrong with it is one error,
:class:`~lightning_sentinel.errors.ConfigurationError`, that says which field it is.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lightning_sentinel.errors import ConfigurationError, MalformedMessageError
from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.digests import Digest
from lightning_sentinel.trust.evidence import Evidence, Message, Reason, Recomputation, Testimony
from lightning_sentinel.trust.identity import PublicKey
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import VoteStatement

__all__ = ["LARGEST_FILE", "VERSION", "file_name", "read_evidence", "write_evidence"]

VERSION = 1
"""Of the format; counted up with every change."""

LARGEST_FILE = 4 * 2**20
"""In bytes. A vote has about 500, so that this is room for thousands."""

_FORMAT = "lightning-sentinel evidence"
_FIELDS = ("format", "version", "banned", "reason", "step", "keys", "messages", "testimonies")
_LARGEST_NUMBER = 2**32 - 1

T = TypeVar("T")


def file_name(evidence: Evidence) -> str:
    """The name of a ban's file, in the folder ``sentinel`` of a run's log directory.

    Example:
        >>> file_name(Evidence(Worker(1, 0), Reason.LIED, step=12, keys={}, messages=(), testimonies=()))
        'evidence/step-00000012-stage-1-replica-0.json'
    """
    worker = evidence.banned
    return f"evidence/step-{evidence.step:08}-stage-{worker.stage}-replica-{worker.replica}.json"


def write_evidence(evidence: Evidence, log_dir: str | Path) -> Path:
    """Write the evidence of a ban below a run's log directory; the file is there when it is whole, and not before.

    Returns:
        the path, ``<log_dir>/sentinel/`` and :func:`file_name`.

    Raises:
        OSError: if it could not be written, with the path; a file that was there before is untouched.
    """
    target = Path(log_dir) / "sentinel" / file_name(evidence)
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w") as file:
            file.write(json.dumps(_content(evidence), indent=1, allow_nan=False) + "\n")
            file.flush()
            # Or after a loss of power there could be an empty file under the new name.
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(target)) from error
    return target


def read_evidence(path: str | Path) -> Evidence:
    """Read a file of evidence; none of it is verified yet.

    Raises:
        ConfigurationError: if the file is missing, too large, cut off, of another version, no evidence at all, or was edited so
            that a field is no longer what it has to be.

    Example:
        >>> from lightning_sentinel.trust.identity import Identity
        >>> worker = Worker(1, 0)
        >>> keys = {worker: Identity.seeded(0, "worker").public}
        >>> evidence = Evidence(worker, Reason.LIED, step=12, keys=keys, messages=(), testimonies=())
        >>> path = write_evidence(evidence, getfixture("tmp_path"))
        >>> path.name, read_evidence(path) == evidence
        ('step-00000012-stage-1-replica-0.json', True)
    """
    path = Path(path)
    content = _parsed(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ConfigurationError(f"{path} is JSON, and no evidence. {_REMEDY}")
    if content.get("version") != VERSION:
        raise ConfigurationError(
            f"{path} is evidence of version {str(content.get('version'))[:20]}, and this lightning-sentinel reads version"
            f" {VERSION}. Use the one that wrote it."
        )
    try:
        return _evidence(content)
    except _Unreadable as error:
        raise ConfigurationError(f"{path} was edited, or is no evidence: {error}. Use the file as the run wrote it.") from None


_REMEDY = "Name a file of the folder sentinel/evidence in a run's log directory."


class _Unreadable(Exception):
    """A field that is not what it has to be."""


def _parsed(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({type(error).__name__}: {error.strerror}). {_REMEDY}") from error
    if len(content) > LARGEST_FILE:
        raise ConfigurationError(f"{path} is larger than {LARGEST_FILE:,} bytes, and no evidence is. {_REMEDY}")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        text = content.strip()
        at_the_end = isinstance(error, json.JSONDecodeError) and error.pos >= len(text)
        if text[:1] in (b"", b"{") and (text[-1:] != b"}" or at_the_end):
            raise ConfigurationError(
                f"{path} was cut off after {len(content):,} bytes, while it was copied. Copy it again from where the run wrote it."
            ) from None
        raise ConfigurationError(f"{path} is no JSON ({str(error)[:80]}), so it is no evidence. {_REMEDY}") from None


def _content(evidence: Evidence) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "version": VERSION,
        "banned": _place(evidence.banned),
        "reason": str(evidence.reason),
        "step": evidence.step,
        "keys": [{**_place(worker), "key": str(key)} for worker, key in sorted(evidence.keys.items())],
        "messages": [_text(message.encode()) for message in evidence.messages],
        "testimonies": [
            {"vote": _text(one.vote.encode()), "recomputation": _found(one.recomputation)} for one in evidence.testimonies
        ],
    }


def _place(worker: Worker) -> dict[str, int]:
    return {"stage": worker.stage, "replica": worker.replica}


def _text(encoded: bytes) -> str:
    return base64.b64encode(encoded).decode()


def _found(recomputation: Recomputation | None) -> dict[str, Any] | None:
    if recomputation is None:
        return None
    error = recomputation.error
    return {
        "recomputed": _text(recomputation.recomputed.encode()),
        # JSON has no number for what is not finite.
        "error": error if math.isfinite(error) else str(error),
        "tolerance": recomputation.tolerance,
    }


def _evidence(content: dict[str, Any]) -> Evidence:
    _require_fields(content, _FIELDS, "the file")
    reasons = {str(reason): reason for reason in Reason}
    if not isinstance(content["reason"], str) or content["reason"] not in reasons:
        raise _Unreadable(f"reason is none of {', '.join(reasons)}")
    keys: dict[Worker, PublicKey] = {}
    for index, entry in enumerate(_list(content, "keys")):
        name = f"keys[{index}]"
        _require_fields(entry, ("stage", "replica", "key"), name)
        worker = _worker(entry, name)
        if worker in keys:
            raise _Unreadable(f"{name} is a second key of {worker}")
        keys[worker] = _of_text(PublicKey.of, entry["key"], f"{name}.key")
    _require_fields(content["banned"], ("stage", "replica"), "banned")
    return Evidence(
        banned=_worker(content["banned"], "banned"),
        reason=reasons[content["reason"]],
        step=_number(content["step"], "step", 2**64 - 1),
        keys=keys,
        messages=tuple(_message(entry, f"messages[{index}]") for index, entry in enumerate(_list(content, "messages"))),
        testimonies=tuple(_testimony(one, f"testimonies[{index}]") for index, one in enumerate(_list(content, "testimonies"))),
    )


def _message(entry: Any, name: str) -> Message:
    signed = _of_text(lambda text: Signed.decode(_bytes(text)), entry, name)
    if isinstance(signed.statement, VoteStatement):
        raise _Unreadable(f"{name} is a vote, and votes belong to the testimonies")
    return signed


def _testimony(entry: Any, name: str) -> Testimony:
    _require_fields(entry, ("vote", "recomputation"), name)
    vote = _of_text(lambda text: Signed.decode(_bytes(text)), entry["vote"], f"{name}.vote")
    if not isinstance(vote.statement, VoteStatement):
        raise _Unreadable(f"{name}.vote is no vote")
    found = entry["recomputation"]
    if found is None:
        return Testimony(vote, None)
    _require_fields(found, ("recomputed", "error", "tolerance"), f"{name}.recomputation")
    recomputed = _of_text(lambda text: Digest.decode(_bytes(text)), found["recomputed"], f"{name}.recomputation.recomputed")
    error = math.inf if found["error"] == "inf" else _real(found["error"], f"{name}.recomputation.error")
    return Testimony(vote, Recomputation(recomputed, error, _real(found["tolerance"], f"{name}.recomputation.tolerance")))


def _require_fields(entry: Any, fields: tuple[str, ...], name: str) -> None:
    if not isinstance(entry, dict) or set(entry) != set(fields):
        raise _Unreadable(f"{name} has not exactly the fields {', '.join(fields)}")


def _list(content: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(content[name], list):
        raise _Unreadable(f"{name} is no list")
    return content[name]


def _worker(entry: dict[str, Any], name: str) -> Worker:
    return Worker(_number(entry["stage"], f"{name}.stage"), _number(entry["replica"], f"{name}.replica"))


def _number(value: Any, name: str, most: int = _LARGEST_NUMBER) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise _Unreadable(f"{name} is no whole number from 0 to {most}")
    return value


def _real(value: Any, name: str) -> float:
    # Compared before it is converted: a whole number may be too large for that, and JSON as Python reads it has NaN.
    if type(value) not in (int, float) or not 0 <= value < 1e300:
        raise _Unreadable(f"{name} is no number that is at least 0")
    return float(value)


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _of_text(read: Callable[[str], T], value: Any, name: str) -> T:
    if not isinstance(value, str):
        raise _Unreadable(f"{name} is no text")
    try:
        return read(value)
    except (ConfigurationError, MalformedMessageError, ValueError) as error:
        raise _Unreadable(f"{name}: {error}") from None
