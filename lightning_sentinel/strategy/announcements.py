"""Tells the user, callbacks and loggers what was detected, and how the run responds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.step_results import Ruling
from lightning_sentinel.trust.evidence import Reason
from lightning_sentinel.verification import Detection, Ledger

__all__ = ["MOST_DETECTIONS", "Announcements", "announce_detections", "consequence", "keep_latest", "log_settings"]

MOST_DETECTIONS = 100_000
"""How many detections a strategy keeps, some thirty megabytes: a worker that is reported and never banned adds some every step."""


def consequence(audited: bool, ban_after: int | None, left: int, replicas: int) -> str:
    """Why workers are banned, and what becomes of their work.

    Args:
        audited: whether other workers recomputed their signals.
        ban_after: in how many steps in a row they were flagged, if no worker recomputed their signals.
        left: number of pipelines that go on.
        replicas: number of all pipelines.

    Example:
        >>> consequence(audited=False, ban_after=5, left=1, replicas=2)
        'flagged in at least 5 steps in a row; its work is dealt to others. 1 of 2 pipelines go on.'
    """
    if audited:
        why = "what it sent is not what most of its stage recomputed"
        then = "the step is done again without it"
    else:
        why = f"flagged in at least {ban_after} steps in a row"
        then = "its work is dealt to others"
    return f"{why}; {then}. {left} of {replicas} pipelines go on."


def _otherwise(worker: Worker, ruling: Ruling, ledger: Ledger) -> str:
    """Why a worker is banned, if it is for another reason than its signals; empty if not."""
    shown = ruling.evidence.get(worker)
    if shown is not None and shown.reason is Reason.SEAL:
        return "it does not open the seal of what it has drawn for audits; the step is done again without it."
    if worker in ruling.forgers:
        return "its row of the step before bears no valid signature; the step is done again without it."
    if any(worker in pair for pair in ruling.contradictions):
        return "it contradicts more workers of one stage than can be malicious there; the step is done again without it."
    if worker in ruling.verdict.outvoted - ruling.verdict.guilty:
        steps = ledger.refuted[worker]
        return f"in {steps} steps it said of others the opposite of what most of its stage recomputed; its work is dealt to others."
    return ""


def keep_latest(detections: list[Detection], more: Sequence[Detection]) -> None:
    """Append detections, and drop the oldest beyond :data:`MOST_DETECTIONS`."""
    detections += more
    del detections[:-MOST_DETECTIONS]


def announce_detections(trainer: L.Trainer, detections: Sequence[Detection]) -> None:
    """Call ``on_sentinel_detection`` of callbacks and module."""
    module = trainer.lightning_module
    listeners = [one for one in (*trainer.callbacks, module) if hasattr(one, "on_sentinel_detection")]  # type: ignore[attr-defined]
    for detection in detections:
        for listener in listeners:
            listener.on_sentinel_detection(trainer, module, detection)


class Announcements:
    """Prints a line for every ban, and one when a worker is first found guilty, disputed or outvoted.

    Args:
        ban_after: see :class:`Response`.
    """

    def __init__(self, ban_after: int | None) -> None:
        self._ban_after = ban_after
        self._told: set[tuple[Worker, str]] = set()
        self._spared = False
        self._stuck = False

    def tell(self, trainer: L.Trainer, ruling: Ruling, ledger: Ledger, left: int) -> None:
        """Tell the user what was decided about a step.

        Args:
            trainer: the Trainer of the run.
            ruling: what was decided.
            ledger: the ledger in which the ruling is entered.
            left: number of pipelines that go on.
        """
        verdict = ruling.verdict
        step = trainer.strategy.step  # type: ignore[attr-defined]
        replicas = trainer.strategy.mesh.replicas  # type: ignore[attr-defined]
        # Unlike a log record a printed line goes above the progress bar, not into it.
        say = trainer.lightning_module.print
        why = consequence(bool(ruling.excluded), self._ban_after, left, replicas)
        for worker in ruling.banned:
            shown = f" Evidence: {ledger.evidence[worker]}." if worker in ledger.evidence else ""
            say(f"Banned {worker} at step {step}: {_otherwise(worker, ruling, ledger) or why}{shown}")
        for one, other in ruling.contradictions:
            if not {one, other}.intersection(ruling.banned) and self._is_news(one, f"contradicts {other}"):
                say(
                    f"Contradiction at step {step}: {one} says that it sent {other} something else than {other} says that it"
                    " received. One of the two lies, or the network does; "
                    + ("the step is done again without one of them." if ruling.excluded else "this run only reports it.")
                )
        then = "the step is done again without it" if ruling.excluded else "this run only reports it"
        for worker in sorted(verdict.guilty.difference(ruling.banned)):
            if self._is_news(worker, "guilty"):
                say(f"Found out {worker} at step {step}: what it sent is not what most of its stage recomputed; {then}.")
        for worker in sorted(verdict.disputed - verdict.guilty):
            if self._is_news(worker, "disputed"):
                say(
                    f"Disputed {worker} at step {step}: what it sent is not what another recomputed, and nobody can tell which of"
                    f" them is wrong; {then}."
                )
        for worker in sorted(verdict.outvoted):
            if worker in ledger.muted and self._is_news(worker, "outvoted"):
                say(f"Outvoted {worker} at step {step}: most of its stage recomputed something else; its word counts no more.")
        if ledger.spared and not self._spared:
            self._spared = True
            worker, since = next(iter(sorted(ledger.spared.items())))
            rank_zero_warn(
                f"{worker} would be banned at step {since}, but as many of its stage are banned as can be: fewer than half, or one"
                " of two. What it sends that is flagged stays out of the weights, and the run goes on. If this goes on, look at"
                " sentinel/anomaly_score: the training may have diverged, or more are malicious than detection assumes."
            )
        if ruling.excluded and not ruling.redo and not self._stuck:
            self._stuck = True
            rank_zero_warn(
                f"Step {step} could not be done again: of some stage every worker is banned or disputed. Its batch is left out, and"
                " so are later ones of which that is true. Use more replicas: from three on, most decide who is wrong."
            )

    def _is_news(self, worker: Worker, what: str) -> bool:
        if (worker, what) in self._told:
            return False
        self._told.add((worker, what))
        return True


def log_settings(trainer: L.Trainer, settings: Mapping[str, Any]) -> None:
    """Log the strategy's settings to every logger, beside the module's hyperparameters, if the Trainer is to log those.

    Args:
        trainer: the Trainer of the run, before it logs the module's hyperparameters.
        settings: the settings in plain form.
    """
    if not trainer.enable_autolog_hparams:
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # TensorBoard's table has one row a run, which is the module's; the settings go into the file beside it.
            logger.hparams["sentinel"] = dict(settings)
        else:
            logger.log_hyperparams({"sentinel": dict(settings)})
