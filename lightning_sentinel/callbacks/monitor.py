"""Logs the scores of a verified run, and writes its detections to a file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_sentinel.mesh import Direction, Mesh, Worker
from lightning_sentinel.metrics import AnomalyScore
from lightning_sentinel.metrics.functional import nanmax
from lightning_sentinel.trust.evidence import Evidence
from lightning_sentinel.trust.evidence_files import file_name, write_evidence

if TYPE_CHECKING:
    from lightning_sentinel.strategy import SentinelStrategy
    from lightning_sentinel.verification import Detection

__all__ = ["SentinelMonitor"]


class SentinelMonitor(L.Callback):
    """Logs anomaly scores, flags and bans, and writes detections to a file. :class:`SentinelStrategy` adds one by itself.

    It logs ``sentinel/anomaly_score``, the highest score since loggers last received it (1 is the fence), the same by stage of the
    sender and direction as ``sentinel/anomaly_score/stage{s}/{activation|gradient}``, and the running totals ``sentinel/flags``,
    ``sentinel/banned`` and ``sentinel/audits``: to every logger every ``Trainer(log_every_n_steps=...)`` batches, and for callbacks
    and the progress bar in each batch in which a worker was flagged or banned. If the Trainer has a logger, detections go to
    ``<log_dir>/sentinel/detections.jsonl``, one JSON object a line, and bans to ``<log_dir>/sentinel/ledger.json``, from which a
    later run can start. What shows why a worker was banned goes to ``<log_dir>/sentinel/evidence``, a file for each ban, which
    ``lightning-sentinel verify-evidence`` checks without the run.

    Attributes:
        anomaly_score: mean scores of the run so far; ``anomaly_score.plot()`` draws them over the mesh.

    Example:
        >>> import lightning_sentinel as ls
        >>> monitor = ls.SentinelMonitor()  # Trainer(callbacks=[monitor]) to keep a hand on it
    """

    anomaly_score: AnomalyScore

    def __init__(self) -> None:
        self._file: Path | None = None
        self._banned = 0
        self._found = (0, 0)
        """Numbers of flags and bans up to the previous batch."""
        self._totals: tuple[int, ...] | None = None
        """The totals that were logged last: Lightning keeps a value until its epoch ends."""
        self._highest: Tensor | None = None
        """``(stages, directions)``, the highest scores since loggers last received them; NaN where there is none."""

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        mesh = _strategy(trainer).mesh
        self.anomaly_score = AnomalyScore(mesh.stages, mesh.replicas)
        self._highest = None
        directory = trainer.log_dir  # a broadcast from rank zero, so every rank has to read it
        # Without a logger it is the working directory, where the user has asked for no files.
        writes = trainer.is_global_zero and bool(trainer.loggers) and directory is not None
        self._file = Path(str(directory)) / "sentinel" / "detections.jsonl" if writes else None

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._totals = None

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = _strategy(trainer)
        if strategy.table is None or strategy.wiring is None:
            return
        scores = strategy.table.worker_scores(strategy.mesh, strategy.wiring)
        self.anomaly_score.update(scores)
        highest = nanmax(scores, dim=1)
        self._highest = highest if self._highest is None else self._highest.fmax(highest)
        ledger = strategy.ledger
        totals = (ledger.total_flags, len(ledger.banned), ledger.audits)
        happened = totals[:2] != self._found
        self._found = totals[:2]
        # Logging costs more than verifying a small batch, and in most batches no logger is listening.
        loggers_listen = trainer._logger_connector.should_update_logs
        if loggers_listen or happened:
            self._log(pl_module, strategy.mesh, self._highest)
            # Most batches do not change the totals.
            if totals != self._totals:
                self._totals = totals
                _log_totals(pl_module, totals)
        if loggers_listen:
            self._highest = None
        if self._file is not None and len(ledger.banned) != self._banned:
            self._banned = len(ledger.banned)
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._write_evidence(strategy.evidence)
            ledger.export(self._file.with_name("ledger.json"))

    def _write_evidence(self, evidence: Mapping[Worker, Evidence]) -> None:
        """Write the evidence of bans for which there is no file yet."""
        assert self._file is not None, "only the process that has a file writes"
        folder = self._file.parent
        for one in evidence.values():
            if (folder / file_name(one)).exists():
                continue
            try:
                write_evidence(one, folder.parent)
            except OSError as error:
                warnings.warn(f"The evidence against {one.banned} could not be written ({error}).", stacklevel=2)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # After the run trainer.callback_metrics has to include its last batches.
        ledger = _strategy(trainer).ledger
        trainer.callback_metrics.update(_totals((ledger.total_flags, len(ledger.banned), ledger.audits)))

    @staticmethod
    def _log(module: L.LightningModule, mesh: Mesh, highest: Tensor) -> None:
        values = {"sentinel/anomaly_score": nanmax(highest.flatten())}
        for boundary in mesh.boundaries:
            values[f"sentinel/anomaly_score/{boundary.name}"] = highest[boundary.sender, list(Direction).index(boundary.direction)]
        module.log_dict({name: value for name, value in values.items() if not value.isnan()}, batch_size=1)

    def on_sentinel_detection(self, trainer: L.Trainer, pl_module: L.LightningModule, detection: Detection) -> None:
        """Append a detection to the file, at once: a run that dies keeps what it found."""
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as lines:
            lines.write(json.dumps(asdict(detection)) + "\n")


def _totals(totals: Sequence[int]) -> dict[str, Tensor]:
    # Tensors on the host: from a number Lightning would make a tensor on the device, and wait for the device to show it.
    return {f"sentinel/{name}": torch.tensor(float(total)) for name, total in zip(("flags", "banned", "audits"), totals)}


def _log_totals(module: L.LightningModule, totals: Sequence[int]) -> None:
    values = _totals(totals)
    audits = values.pop("sentinel/audits")
    module.log_dict(values, prog_bar=True, batch_size=1)
    module.log("sentinel/audits", audits, batch_size=1)


def _strategy(trainer: L.Trainer) -> SentinelStrategy:
    from lightning_sentinel.strategy import SentinelStrategy

    if not isinstance(trainer.strategy, SentinelStrategy):
        from lightning_sentinel.errors import ConfigurationError

        raise ConfigurationError(
            f"SentinelMonitor has nothing to watch under {type(trainer.strategy).__name__}. Use Trainer(strategy='sentinel')."
        )
    return trainer.strategy
