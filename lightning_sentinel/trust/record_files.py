"""Records of bans by flags as JSON, a part of files of evidence."""

from __future__ import annotations

from typing import Any

from lightning_sentinel.mesh import Boundary, Direction, Worker
from lightning_sentinel.trust.fields import (
    UnreadableError,
    as_text,
    flag,
    list_of,
    number,
    of_bytes,
    of_text,
    place,
    plain,
    real,
    require_fields,
    text,
    worker_of,
)
from lightning_sentinel.trust.records import ROW_BYTES, FlaggedSignal, FlaggedStep, FlagRecord
from lightning_sentinel.verification.streaks import Sighting, Streak

__all__ = ["content_of_record", "read_record"]

_RECORD = ("rule", "ban_after", "habit", "earlier", "steps")
_STEP = ("step", "suspects", "verified", "unmistakable", "signals")
_SIGNAL = ("direction", "boundary", "lane", "micro_batch", "receiver", "row", "score", "feature", "fences", "flagged")
_PLACE = ("stage", "replica")
_RULE = "ban_after consecutive steps as a suspect, more of them where others of the stage are suspects too"
_DIRECTIONS = {direction.value: direction for direction in Direction}
_LONGEST_NAME = 80


def content_of_record(record: FlagRecord) -> dict[str, Any]:
    """The record as JSON."""
    return {
        "rule": _RULE,
        "ban_after": record.ban_after,
        "habit": record.habit,
        "earlier": list(record.earlier),
        "steps": [_step(one) for one in record.steps],
    }


def read_record(entry: Any, name: str) -> FlagRecord:
    """The record that an object of JSON is; none of it is verified.

    Args:
        entry: anything at all.
        name: of the field that it is in.

    Raises:
        UnreadableError: if it is none, with the name of the field that is wrong.
    """
    require_fields(entry, _RECORD, name)
    steps = list_of(entry["steps"], f"{name}.steps")
    return FlagRecord(
        number(entry["ban_after"], f"{name}.ban_after"),
        real(entry["habit"], f"{name}.habit"),
        _read_earlier(entry["earlier"], f"{name}.earlier"),
        tuple(_read_step(one, f"{name}.steps[{index}]") for index, one in enumerate(steps)),
    )


def _step(one: FlaggedStep) -> dict[str, Any]:
    return {
        "step": one.step,
        "suspects": [place(worker) for worker in one.seen.suspects],
        "verified": [place(worker) for worker in one.seen.verified],
        "unmistakable": one.seen.unmistakable,
        "signals": [_signal(signal) for signal in one.signals],
    }


def _signal(one: FlaggedSignal) -> dict[str, Any]:
    return {
        "direction": one.boundary.direction.value,
        "boundary": one.boundary.index,
        "lane": one.lane,
        "micro_batch": one.slot,
        "receiver": place(one.receiver),
        "row": as_text(one.row),
        "score": one.score,
        "feature": one.feature,
        "fences": [plain(value) for value in one.fences],
        "flagged": one.flagged,
    }


def _read_earlier(entry: Any, name: str) -> list[Any]:
    try:
        return Streak.of_state(entry).state()
    except (TypeError, ValueError, AttributeError):
        raise UnreadableError(f"{name} is no state of a streak") from None


def _read_step(entry: Any, name: str) -> FlaggedStep:
    require_fields(entry, _STEP, name)
    seen = Sighting(
        _read_workers(entry["suspects"], f"{name}.suspects"),
        _read_workers(entry["verified"], f"{name}.verified"),
        flag(entry["unmistakable"], f"{name}.unmistakable"),
    )
    signals = list_of(entry["signals"], f"{name}.signals")
    read = tuple(_read_signal(one, f"{name}.signals[{index}]") for index, one in enumerate(signals))
    return FlaggedStep(number(entry["step"], f"{name}.step", 2**64 - 1), read, seen)


def _read_workers(entries: Any, name: str) -> tuple[Worker, ...]:
    return tuple(_read_worker(one, f"{name}[{index}]") for index, one in enumerate(list_of(entries, name)))


def _read_worker(entry: Any, name: str) -> Worker:
    require_fields(entry, _PLACE, name)
    return worker_of(entry, name)


def _read_signal(entry: Any, name: str) -> FlaggedSignal:
    require_fields(entry, _SIGNAL, name)
    direction = _DIRECTIONS.get(text(entry["direction"], f"{name}.direction"))
    row = of_text(of_bytes, entry["row"], f"{name}.row")
    fences = [real(one, f"{name}.fences", signed=True) for one in list_of(entry["fences"], f"{name}.fences")]
    feature = text(entry["feature"], f"{name}.feature")
    if direction is None or len(row) != ROW_BYTES or len(fences) != 4 or len(feature) > _LONGEST_NAME:
        raise UnreadableError(f"{name} has another direction, row, number of fences or feature than signals have")
    return FlaggedSignal(
        Boundary(number(entry["boundary"], f"{name}.boundary"), direction),
        number(entry["lane"], f"{name}.lane"),
        number(entry["micro_batch"], f"{name}.micro_batch"),
        _read_worker(entry["receiver"], f"{name}.receiver"),
        row,
        real(entry["score"], f"{name}.score"),
        feature,
        (fences[0], fences[1], fences[2], fences[3]),
        flag(entry["flagged"], f"{name}.flagged"),
    )
