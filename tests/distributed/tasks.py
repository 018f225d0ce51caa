"""Modules and runs that the distributed tests share; a rank imports them from here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightning_sentinel as ls

SAMPLES, FEATURES, CLASSES = 96, 12, 4
PATIENCE = timedelta(seconds=20)
"""How long ranks wait for each other: a test that hangs says whom it waited for."""


def tokens(samples: int = SAMPLES, seed: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 6, FEATURES, generator=generator)
    labels = (inputs.sum(dim=(1, 2)) * 0.7).long().clamp(-1, 2) + 1
    return TensorDataset(inputs, labels)


def loader(batch_size: int, replicas: int = 1, samples: int = SAMPLES) -> DataLoader[Any]:
    """In order, so that step ``k`` sees the same samples whatever the number of replicas; Lightning's own sampler shuffles."""
    data, replica = tokens(samples), int(os.environ.get("LOCAL_RANK", "0")) % replicas
    return DataLoader(data, batch_size=batch_size, sampler=DistributedSampler(data, replicas, replica, shuffle=False))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class Classifier(L.LightningModule):
    """An ordinary module: knows nothing of pipelines."""

    def __init__(self, optimizer: str = "sgd", width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(11)
        self.net = nn.Sequential(
            nn.Linear(FEATURES, width), *(Block(width) for _ in range(depth)), Mean(), nn.Linear(width, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        logits = self(inputs * 1.0)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_accuracy", (logits.argmax(-1) == labels).float().mean())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self(inputs), labels))

    def configure_optimizers(self) -> Any:
        if self.hparams["optimizer"] == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        else:
            decayed = [p for p in self.parameters() if p.ndim > 1]
            others = [p for p in self.parameters() if p.ndim <= 1]
            groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 3e-3}]
            optimizer = torch.optim.AdamW(groups, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def trainer(strategy: Any, devices: int, steps: int, callbacks: Sequence[L.Callback] = (), **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": -1,
        "limit_val_batches": 0,
    }
    return L.Trainer(
        strategy=strategy, accelerator="cpu", devices=devices, max_steps=steps, callbacks=list(callbacks), **(defaults | options)
    )


def local_weights(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def fit(
    optimizer: str, stages: int, replicas: int, steps: int, batch_size: int, mode: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Train on this rank and return what it knows."""
    settings: dict[str, Any] = {
        "plain": {"verification": None},
        "checkpointing": {"verification": None, "activation_checkpointing": True},
        "sharding": {
            "verification": ls.Verification(warmup_steps=2),
            "response": ls.Response(on_flag="log", ban_after=None),
            "zero_stage": 1,
        },
        "excluding": {"verification": ls.Verification(warmup_steps=100)},
        # Fences fitted to so few values flag something, which a run that only reports must survive bit for bit.
        "reporting": {"verification": ls.Verification(warmup_steps=2), "response": ls.Response(on_flag="log", ban_after=None)},
    }[mode]
    strategy = ls.SentinelStrategy(stages=stages, replicas=replicas, micro_batches=3, timeout=PATIENCE, **settings)
    module = Classifier(optimizer)
    run = trainer(strategy, stages * replicas, steps, **options)
    run.fit(module, loader(batch_size, replicas), loader(batch_size, replicas))
    return {
        "weights": local_weights(module),
        "metrics": {name: float(value) for name, value in run.callback_metrics.items()},
        "flags": strategy.ledger.total_flags,
    }


def fit_alone(
    optimizer: str, steps: int, batch_size: int, options: dict[str, Any], kind: type[Classifier] = Classifier
) -> dict[str, Any]:
    """The same training in one process, without the plugin."""
    module = kind(optimizer)
    run = trainer("auto", 1, steps, **options)
    run.fit(module, loader(batch_size), loader(batch_size))
    return {"weights": local_weights(module), "metrics": {n: float(v) for n, v in run.callback_metrics.items()}}


def resume(directory: str, attacked: bool) -> dict[str, Any]:
    """Some steps, a checkpoint, some more; and the same steps in one go."""
    devices, replicas = 4, 2
    path = Path(directory) / f"attacked-{attacked}.ckpt"
    found: dict[str, Any] = {}
    for name, epochs, source in (("whole", 3, None), ("first", 2, None), ("second", 3, path)):
        strategy = ls.SentinelStrategy(
            stages=2,
            replicas=replicas,
            micro_batches=2,
            timeout=PATIENCE,
            verification=ls.Verification(warmup_steps=5, false_positive_rate=0.12, seed=0),
            response=ls.Response(audit_rate=None, ban_after=3),
        )
        module = Classifier("adamw")
        callbacks = (
            [ls.AttackInjector({"name": "scale", "factor": 50.0}, workers=[ls.Worker(1, 1)], start_step=5)] if attacked else []
        )
        run = trainer(strategy, devices, -1, callbacks, max_epochs=epochs)
        # Cut at the end of an epoch of four steps: in the middle Lightning would begin its data anew.
        run.fit(module, loader(12, replicas), ckpt_path=source)
        run.save_checkpoint(path if name == "first" else path.with_suffix(f".{name}"))
        found[name] = {
            "weights": local_weights(module),
            "banned": strategy.ledger.banned_at,
            "verifiers": strategy._run.guard.state_dict(),  # type: ignore[union-attr]
            "step": strategy.step,
            "flags": dict(strategy.ledger.flags),
        }
    return found


def logged_values(batch_size: int) -> dict[str, Any]:
    """Everything that ``self.log`` can do, from a step that runs on the last stage only."""
    import torchmetrics

    class Logging(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES, average="micro")

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            inputs, labels = batch
            logits = self(inputs)
            self.log_dict({"largest": labels.max().float(), "count": 1.0}, reduce_fx="max")
            self.log("total", float(len(labels)), reduce_fx="sum", on_step=False, on_epoch=True)
            if batch_idx > 0:
                self.log("late", logits.mean() * 0 + 3.0, batch_size=1)
            return {"loss": nn.functional.cross_entropy(logits, labels)}

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            inputs, labels = batch
            self.accuracy(self(inputs), labels)
            self.log("val_accuracy", self.accuracy)
            self.log("val_mean_label", labels.float().mean())

        def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            return {"logits": self(batch[0]), "labels": batch[1]}

    replicas = int(os.environ.get("WORLD_SIZE", "1")) // 2 or 1
    alone = "WORLD_SIZE" not in os.environ
    strategy: Any = "auto" if alone else ls.SentinelStrategy(stages=2, replicas=replicas, micro_batches=2, timeout=PATIENCE)
    run = trainer(strategy, 1 if alone else 2 * replicas, -1, max_epochs=2, limit_val_batches=1.0, num_sanity_val_steps=0)
    module = Logging()
    validation = [loader(batch_size, replicas), loader(batch_size, replicas, samples=48)]
    run.fit(module, loader(batch_size, replicas), validation)
    metrics = {name: float(value) for name, value in run.callback_metrics.items() if not name.startswith("sentinel/")}
    predictions = run.predict(module, loader(batch_size, replicas, samples=24))
    return {"metrics": metrics, "predictions": predictions}


ATTACKS: dict[str, tuple[Any, str, float | None]] = {
    "sign": ("sign", "activation", None),
    "scale": ({"name": "scale", "factor": 10.0}, "gradient", None),
    "noise": ("noise", "both", None),
    # Too little to be flagged, so that it is for the random audits to find.
    "a little noise, audited": ({"name": "add_noise", "strength": 0.02}, "both", 0.2),
}
"""Attack, direction and rate of audits."""


def attacked(engine: str, name: str | None, warm: Path | None = None) -> dict[str, Any]:
    """The same mesh, data and seeds on either engine.

    Args:
        engine: ``"virtual"`` or ``"process"``.
        name: of the attack; without one the run ends with the warm-up.
        warm: a checkpoint of the end of the warm-up: written without an attack, gone on from with one.
    """
    batch_size, warmup = 8, 20
    attack, direction, audit_rate = ATTACKS[name] if name is not None else (None, "both", None)
    # Of two workers of a stage an audit bans nobody.
    stages, replicas = (3, 2) if audit_rate is None else (2, 3)
    virtual = engine == "virtual"
    strategy = ls.SentinelStrategy(
        stages,
        replicas,
        micro_batches=2,
        verification=ls.Verification(warmup_steps=warmup, false_positive_rate=0.03, seed=0),
        response=ls.Response(audit_rate=audit_rate),
        engine=engine,  # type: ignore[arg-type]
        timeout=PATIENCE,
    )
    # A worker that is flagged is banned after five steps; audits are drawn at random.
    steps = warmup + (0 if attack is None else 8 if audit_rate is None else 10)
    module = Classifier("sgd")
    injector = [] if attack is None else [ls.AttackInjector(attack, workers=[ls.Worker(1, 1)], direction=direction)]  # type: ignore[arg-type]
    data = loader(batch_size * replicas) if virtual else loader(batch_size, replicas)
    run = trainer(strategy, 1 if virtual else stages * replicas, steps, injector)
    run.fit(module, data, ckpt_path=warm if injector else None)
    if warm is not None and not injector:
        run.save_checkpoint(warm)
    return {
        "weights": local_weights(module),
        "detections": strategy.detections,
        "banned": strategy.ledger.banned_at,
        "audits": strategy.ledger.audits,
    }


def attacked_in_turn(engine: str, warm: Path) -> dict[str, dict[str, Any]]:
    """All attacks: one in a whole run, the others after one and the same warm-up."""
    return {name: attacked(engine, name, None if rate is not None else warm) for name, (_, _, rate) in ATTACKS.items()}
