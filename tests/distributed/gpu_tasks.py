"""Runs that ``make test-gpu`` makes on GPUs, for any accelerator, so that they are tried out where there is none."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import lightning_sentinel as ls
from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Mesh
from tests.distributed import tasks

STEPS, BATCH = 6, 6
LIES_FROM = 3


class Liar(Adversary):
    """Multiplies what one worker sends; draws no random numbers, for which a device may have no generator."""

    def __init__(self, mesh: Mesh, worker: ls.Worker, factor: float, lies_from: int) -> None:
        super().__init__("zeros", mesh, workers=[worker], start_step=lies_from)
        self._factor = factor

    def tamper(
        self,
        signal: Tensor,
        worker: ls.Worker,
        direction: ls.Direction,
        step: int,
        micro_batch: int,
        received: Tensor | None = None,
    ) -> Tensor:
        return signal * self._factor if self.tampers(worker, direction, step) else signal


def fit(
    accelerator: Any,
    stages: int,
    replicas: int,
    *,
    devices: Any = "auto",
    shared: str | None = None,
    precision: Any = "32-true",
    factor: float | None = None,
    audit_rate: float | None = None,
    transport: Any = "auto",
) -> dict[str, Any]:
    """Train on this rank.

    Args:
        devices: of the Trainer.
        shared: the device that all ranks share, instead.
        precision: of the Trainer.
        factor: by which a worker multiplies what it sends from the fourth batch on, if one does.
        audit_rate: share of signals that are audited.
        transport: of the strategy.

    Returns:
        the weights on the host; devices and dtypes that layers were seen to work on and in; the device of the engine; how the
        process group sends from it; what audits found.
    """
    where = {"parallel_devices": [torch.device(shared)] * (stages * replicas)} if shared is not None else {}
    strategy = ls.SentinelStrategy(
        stages,
        replicas,
        micro_batches=3,
        verification=ls.Verification(warmup_steps=50, seed=1) if precision != "16-mixed" else None,
        response=ls.Response(audit_rate=audit_rate if precision != "16-mixed" else None),
        transport=transport,
        timeout=tasks.PATIENCE,
        **where,
    )
    if factor is not None:
        strategy.adversary = Liar(Mesh(stages, replicas), ls.Worker(stages - 1, replicas - 1), factor, LIES_FROM)
    module = tasks.Classifier("sgd")
    seen: set[tuple[str, torch.dtype]] = set()
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _, inputs, output: seen.add((str(output.device), output.dtype)))
    run = L.Trainer(
        strategy=strategy,
        accelerator=accelerator,
        precision=precision,
        max_steps=STEPS,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        num_sanity_val_steps=1,
        **({} if shared is not None else {"devices": devices}),
    )
    run.fit(module, tasks.loader(BATCH, replicas), tasks.loader(BATCH, replicas))
    return {
        "weights": {name: value.cpu() for name, value in tasks.local_weights(module).items()},
        "devices": {device for device, _ in seen},
        "dtypes": {dtype for _, dtype in seen},
        "root": str(strategy.root_device),
        "backend": torch.distributed.get_backend_config(),
        "audits": strategy.ledger.audits,
        "banned": dict(strategy.ledger.banned_at),
    }
