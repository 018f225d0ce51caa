"""Files of evidence: one of JSON for each ban, which people can look into and other programs can read.

Keys are texts, statements and digests are base64 of their encodings (:mod:`lightning_sentinel.trust.encoding`). A file may come
from anybody: it is bounded before it is read, and whatever is wrong with it is one error,
:class:`~lightning_sentinel.errors.ConfigurationError`, that says which field it is.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.digests import Digest
from lightning_sentinel.trust.evidence import Evidence, Message, Reason, Recomputation, Testimony
from lightning_sentinel.trust.fields import (
    UnreadableError,
    as_text,
    list_of,
    number,
    of_bytes,
    of_text,
    place,
    plain,
    real,
    require_fields,
    worker_of,
)
from lightning_sentinel.trust.identity import PublicKey
from lightning_sentinel.trust.record_files import content_of_record, read_record
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import ContributionVote, VoteStatement

__all__ = ["LARGEST_FILE", "VERSION", "file_name", "read_evidence", "write_evidence"]

VERSION = 2
"""Of the format; counted up with every change."""

LARGEST_FILE = 32 * 2**20
"""In bytes. A vote has about 500, and a row of a mesh with 64 micro-batches 46,000: this is room for hundreds of both."""

_FORMAT = "lightning-sentinel evidence"
_FIELDS = (
    *("format", "version", "banned", "reason", "step", "proof"),
    *("keys", "messages", "contents", "testimonies", "record"),
)


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
    except UnreadableError as error:
        raise ConfigurationError(f"{path} was edited, or is no evidence: {error}. Use the file as the run wrote it.") from None


_REMEDY = "Name a file of the folder sentinel/evidence in a run's log directory."


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
        "banned": place(evidence.banned),
        "reason": str(evidence.reason),
        "step": evidence.step,
        "proof": _proof(evidence),
        "keys": [{**place(worker), "key": str(key)} for worker, key in sorted(evidence.keys.items())],
        "messages": [as_text(message.encode()) for message in evidence.messages],
        "contents": [as_text(one) for one in evidence.contents],
        "testimonies": [
            {"vote": as_text(one.vote.encode()), "recomputation": _found(one.recomputation)} for one in evidence.testimonies
        ],
        "record": None if evidence.record is None else content_of_record(evidence.record),
    }


def _proof(evidence: Evidence) -> str:
    """What the file is, for people who look into it."""
    if not evidence.keys:
        return "none: nobody signed this, so it is a record and no proof"
    if evidence.reason is Reason.FLAGGED:
        return "none: receivers signed their rows, and nobody recomputed them, so it is a record and no proof"
    return "the signatures, which lightning-sentinel verify-evidence checks"


def _found(recomputation: Recomputation | None) -> dict[str, Any] | None:
    if recomputation is None:
        return None
    return {
        "recomputed": as_text(recomputation.recomputed.encode()),
        "error": plain(recomputation.error),
        "tolerance": recomputation.tolerance,
    }


def _evidence(content: dict[str, Any]) -> Evidence:
    require_fields(content, _FIELDS, "the file")
    reasons = {str(reason): reason for reason in Reason}
    if not isinstance(content["reason"], str) or content["reason"] not in reasons:
        raise UnreadableError(f"reason is none of {', '.join(reasons)}")
    require_fields(content["banned"], ("stage", "replica"), "banned")
    record = content["record"]
    evidence = Evidence(
        banned=worker_of(content["banned"], "banned"),
        reason=reasons[content["reason"]],
        step=number(content["step"], "step", 2**64 - 1),
        keys=_keys(content["keys"]),
        messages=tuple(_message(*one) for one in _numbered(content, "messages")),
        testimonies=tuple(_testimony(*one) for one in _numbered(content, "testimonies")),
        contents=tuple(of_text(of_bytes, *one) for one in _numbered(content, "contents")),
        record=None if record is None else read_record(record, "record"),
    )
    if content["proof"] != _proof(evidence):
        raise UnreadableError(f"proof is not {_proof(evidence)!r}, which follows from the rest")
    return evidence


def _numbered(content: dict[str, Any], name: str) -> list[tuple[Any, str]]:
    return [(entry, f"{name}[{index}]") for index, entry in enumerate(list_of(content[name], name))]


def _keys(entries: Any) -> dict[Worker, PublicKey]:
    keys: dict[Worker, PublicKey] = {}
    for index, entry in enumerate(list_of(entries, "keys")):
        name = f"keys[{index}]"
        require_fields(entry, ("stage", "replica", "key"), name)
        worker = worker_of(entry, name)
        if worker in keys:
            raise UnreadableError(f"{name} is a second key of {worker}")
        keys[worker] = of_text(PublicKey.of, entry["key"], f"{name}.key")
    return keys


def _message(entry: Any, name: str) -> Message:
    signed = of_text(lambda text: Signed.decode(of_bytes(text)), entry, name)
    if isinstance(signed.statement, (VoteStatement, ContributionVote)):
        raise UnreadableError(f"{name} is a vote, and votes belong to the testimonies")
    return signed


def _testimony(entry: Any, name: str) -> Testimony:
    require_fields(entry, ("vote", "recomputation"), name)
    vote = of_text(lambda text: Signed.decode(of_bytes(text)), entry["vote"], f"{name}.vote")
    if not isinstance(vote.statement, (VoteStatement, ContributionVote)):
        raise UnreadableError(f"{name}.vote is no vote")
    found = entry["recomputation"]
    if found is None:
        return Testimony(vote, None)
    require_fields(found, ("recomputed", "error", "tolerance"), f"{name}.recomputation")
    recomputed = of_text(lambda text: Digest.decode(of_bytes(text)), found["recomputed"], f"{name}.recomputation.recomputed")
    error = math.inf if found["error"] == "inf" else real(found["error"], f"{name}.recomputation.error")
    tolerance = real(found["tolerance"], f"{name}.recomputation.tolerance")
    return Testimony(vote, Recomputation(recomputed, error, tolerance))
