"""Six processes, one of them malicious: the same training with nobody malicious, unprotected, and protected.

    python examples/shakespeare/demo.py

Two stages x three replicas learn Shakespeare byte by byte. From step 60 on one worker of the first stage sends random values. What
is flagged is recomputed by the two others of its stage: they agree, so the step is done again without it, and the second time it is
banned. Three replicas are the fewest of whom it can be told who is wrong.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import lightning_sentinel as ls  # noqa: E402
from examples.shakespeare.data import ShakespeareText  # noqa: E402
from examples.shakespeare.model import ByteLlama  # noqa: E402

STAGES, REPLICAS, STEPS, ATTACK_STEP = 2, 3, 150, 60
GUILTY = ls.Worker(stage=0, replica=1)
ATTACK = "random"


@dataclass
class Outcome:
    """What became of a run: bits per byte on the validation text before the attack and at the end, and who was caught."""

    name: str
    before: float
    after: float
    seconds: float
    caught: str = ""
    precision: str = ""
    recall: str = ""


def strategy(protected: bool) -> ls.SentinelStrategy:
    verification = ls.Verification(warmup_steps=ATTACK_STEP) if protected else None
    return ls.SentinelStrategy(stages=STAGES, replicas=REPLICAS, micro_batches=4, verification=verification)


def data() -> ShakespeareText:
    return ShakespeareText(data_dir=ROOT / "data" / "shakespeare", batch_size=16, sequence_length=64)


def bits_per_byte(model: ByteLlama) -> float:
    """On the same text for all runs: by a strategy of its own, because one that has banned a worker leaves out its share."""
    judge = L.Trainer(
        strategy=strategy(protected=False),
        accelerator="cpu",
        devices=STAGES * REPLICAS,
        limit_val_batches=8,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return float(judge.validate(model, data(), verbose=False)[0]["val_bits_per_byte"])


def train(name: str, attacked: bool, protected: bool) -> Outcome:
    L.seed_everything(42, verbose=False)
    started = time.monotonic()
    model, ours = ByteLlama(width=96, depth=4, heads=4), strategy(protected)
    injector = [ls.AttackInjector(ATTACK, workers=[GUILTY], start_step=ATTACK_STEP)] if attacked else []
    trainer = L.Trainer(
        strategy=ours,
        accelerator="cpu",
        devices=STAGES * REPLICAS,
        max_steps=STEPS,
        logger=CSVLogger(ROOT / "runs", name="demo", version=name.replace(" ", "-")),
        callbacks=[*injector, TQDMProgressBar(refresh_rate=10)],
        log_every_n_steps=5,
        val_check_interval=ATTACK_STEP,
        limit_val_batches=8,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    before: list[float] = []
    trainer.callbacks.append(_Before(before))
    trainer.fit(model, data())
    outcome = Outcome(name, before[0], bits_per_byte(model), time.monotonic() - started)
    if protected:
        ledger = ours.ledger
        outcome.caught = (
            ", ".join(
                f"stage {worker.stage}, replica {worker.replica} at step {step}"
                for worker, step in sorted(ledger.banned_at.items())
            )
            or "nobody"
        )
        outcome.precision = _percent(ls.metrics.DetectionPrecision(STAGES, REPLICAS), ledger)
        outcome.recall = _percent(ls.metrics.DetectionRecall(STAGES, REPLICAS), ledger)
    return outcome


def _percent(metric: ls.metrics.DetectionPrecision | ls.metrics.DetectionRecall, ledger: ls.Ledger) -> str:
    metric.update(ledger.banned, {GUILTY})
    return f"{100 * float(metric.compute()):.0f} %"


class _Before(L.Callback):
    def __init__(self, values: list[float]) -> None:
        self.values = values

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.values.append(float(trainer.callback_metrics["val_bits_per_byte"]))


@rank_zero_only
def say(text: str) -> None:
    Console().print(text)


@rank_zero_only
def report(outcomes: list[Outcome]) -> None:
    table = Table(
        title=f"{STAGES} stages x {REPLICAS} replicas, {STEPS} steps; {GUILTY} sends {ATTACK} values from step {ATTACK_STEP}"
    )
    for heading in ("run", "bits/byte before", "bits/byte after", "caught", "precision", "recall", "seconds"):
        table.add_column(heading, justify="left" if heading in ("run", "caught") else "right")
    for outcome in outcomes:
        numbers = (f"{outcome.before:.2f}", f"{outcome.after:.2f}")
        table.add_row(outcome.name, *numbers, outcome.caught, outcome.precision, outcome.recall, f"{outcome.seconds:.0f}")
    console = Console(width=116)
    console.print(table)
    console.print("Scores and detections of every run: runs/demo/")


def main() -> None:
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Banned" in record.getMessage())
    warnings.filterwarnings("ignore")
    runs = [("nobody malicious", False, False), ("unprotected", True, False), ("protected", True, True)]
    outcomes = []
    for number, (name, attacked, protected) in enumerate(runs, start=1):
        say(f"\n[bold]{number} of {len(runs)}: {name}[/bold]")
        outcomes.append(train(name, attacked, protected))
    report(outcomes)


if __name__ == "__main__":
    main()
