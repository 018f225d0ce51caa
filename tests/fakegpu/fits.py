"""Verified training on the device; a rank imports it from here."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning as L

import lightning_sentinel as ls
from tests.distributed import tasks
from tests.distributed.gpu_tasks import Liar
from tests.fakegpu import accelerators
from tests.fakegpu.device import reads

WARMUP, STEPS, LIES_FROM = 2, 4, 2


class Watch(L.Callback):
    """Takes note of who waited for the device between the beginning of a batch and that of the next."""

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = []

    # Not at the end of a batch: who listens there is handed what the step returned, through the host.
    def on_train_batch_start(self, *_: Any) -> None:
        self.steps.append(Counter(reads.counts))
        reads.clear()


def fit(engine: str, stages: int, replicas: int, on_device: bool = True, warmup: int = WARMUP, **settings: Any) -> dict[str, Any]:
    """Train, and say what came of it."""
    if on_device:
        accelerators.install()
    options = {name: settings.pop(name) for name in ("gradient_clip_val", "callbacks") if name in settings}
    reads.clear()
    strategy = ls.SentinelStrategy(
        stages,
        replicas,
        micro_batches=2,
        engine=engine,
        verification=ls.Verification(warmup_steps=warmup, seed=1),
        timeout=tasks.PATIENCE,
        **settings,
    )
    module, watch, virtual = tasks.Classifier("sgd"), Watch(), engine == "virtual"
    run = L.Trainer(
        strategy=strategy,
        accelerator=accelerators.FakeGPU() if on_device else "cpu",
        devices=1 if virtual else stages * replicas,
        max_steps=STEPS,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[watch, *options.pop("callbacks", [])],
        **options,
    )
    batch = 8 * replicas if virtual else 8
    shards = 1 if virtual else replicas
    run.fit(module, tasks.loader(batch, shards))
    found = {name: value.cpu() for name, value in tasks.local_weights(module).items()}
    return {
        "weights": found,
        "reads": watch.steps[1:],
        "device": str(strategy.root_device),
        "flags": strategy.ledger.total_flags,
        "banned": dict(strategy.ledger.banned_at),
        "audits": strategy.ledger.audits,
        "loss": float(run.callback_metrics["train_loss_step"]),
    }


class OneLies(L.Callback):
    """A worker lies, without drawing random numbers, because the device has no generator."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, ls.SentinelStrategy)
        strategy.adversary = Liar(strategy.mesh, ls.Worker(1, 1), 1.5, LIES_FROM)


def both(engine: str, stages: int, replicas: int, on_device: bool = True, lies: bool = True) -> tuple[dict[str, Any], ...]:
    """Without audits, where what is flagged would be kept out at receipt and nothing is; and with audits of every signal."""
    plain = fit(engine, stages, replicas, on_device, 100, response=ls.Response(audit_rate=None), gradient_clip_val=0.5)
    callbacks = [OneLies()] if lies else []
    return plain, fit(engine, stages, replicas, on_device, response=ls.Response(audit_rate=1.0), callbacks=callbacks)
