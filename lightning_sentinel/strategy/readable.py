"""What users and callbacks read from a strategy: its settings, its mesh, and what was detected."""

from __future__ import annotations

import sys
from dataclasses import fields
from datetime import timedelta
from typing import Literal

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.strategy.run_state import RunState
from lightning_sentinel.verification import Detection, Ledger, SignalTable
from lightning_sentinel.wiring import Wiring

__all__ = ["ReadableStrategy"]

_OTHER = "pytorch_lightning"


class ReadableStrategy:
    """The settings of a strategy, and the state of its run, as attributes that cannot be set.

    Args:
        run: the state of the run.
    """

    def __init__(self, run: RunState) -> None:
        self._run = run
        self._settings = run.settings
        self._processes = run.processes

    @property
    def stages(self) -> int | None:
        """The argument as given; ``strategy.mesh.stages`` is the number in use, also if none was given."""
        return self._settings.stages

    @property
    def replicas(self) -> int | None:
        """The argument as given; ``strategy.mesh.replicas`` is the number in use, also if none was given."""
        return self._settings.replicas

    @property
    def micro_batches(self) -> int:
        return self._settings.micro_batches

    @property
    def verification(self) -> Verification | None:
        return self._settings.verification

    @property
    def response(self) -> Response:
        return self._settings.response

    @property
    def partition(self) -> str:
        return self._settings.partition

    @property
    def engine(self) -> Literal["process", "virtual"]:
        return self._settings.engine

    @property
    def sequential(self) -> str | None:
        return self._settings.sequential

    @property
    def zero_stage(self) -> int:
        return self._settings.zero_stage

    @property
    def activation_checkpointing(self) -> bool:
        return self._settings.activation_checkpointing

    @property
    def transport(self) -> Literal["auto", "device", "host"]:
        return self._settings.transport

    @property
    def state_dict_type(self) -> Literal["full", "sharded"]:
        return self._settings.state_dict_type

    @property
    def timeout(self) -> timedelta:
        return self._settings.timeout

    @property
    def ledger(self) -> Ledger:
        """Flags and bans; the same on all ranks."""
        return self._run.ledger

    @property
    def detections(self) -> list[Detection]:
        """Signals that were flagged and not cleared, in order: the latest 100,000; ``detections.jsonl`` has all of a run."""
        return self._run.detections

    @property
    def table(self) -> SignalTable | None:
        """All signals of the last training batch with their scores."""
        return self._run.table

    @property
    def wiring(self) -> Wiring | None:
        """Which worker served which lane of the last training batch."""
        return self._run.wiring

    @property
    def step(self) -> int:
        """Training batches so far: the number that detections and attacks go by."""
        return self._run.step

    def __repr__(self) -> str:
        settings = ", ".join(f"{one.name}={getattr(self._settings, one.name)!r}" for one in fields(self._settings))
        shown = f"{type(self).__name__}({settings})"
        # `pytorch_lightning` shows this where it refuses a strategy that is not its own.
        return f"{shown}, for the package `lightning` and not for `pytorch_lightning`" if _OTHER in sys.modules else shown
