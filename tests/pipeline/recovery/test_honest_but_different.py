"""One replica gets other data after the warm-up, and nobody lies: nobody is banned, and with audits nothing is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_sentinel as ls

STAGES, REPLICAS, MICRO_BATCHES = 3, 5, 2
WARMUP, STEPS, EACH = 30, 60, 8

Change = Callable[[Tensor], Tensor]

CHANGES: dict[str, Change] = {
    "larger": lambda x: 3 * x,
    "all alike": lambda x: x[:1].expand_as(x),
}


class Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """Whole batches of the mesh; row ``r`` of each ``REPLICAS`` goes to replica ``r``. That of replica 1 changes."""

    def __init__(self, change: Change) -> None:
        self.change = change

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        truth = torch.randn(8, generator=generator)
        for step in range(STEPS):
            x = torch.randn(EACH, REPLICAS, 8, generator=generator)
            if step >= WARMUP + 5:
                x[:, 1] = self.change(x[:, 1])
            rows = x.flatten(0, 1)
            yield rows, (rows @ truth).sign()[:, None]


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)]
        self.net = nn.Sequential(nn.Linear(8, 16), *blocks, nn.Linear(16, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.soft_margin_loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(strategy: Any, change: Change) -> Net:
    module = Net()
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Batches(change), batch_size=None))
    return module


@pytest.mark.parametrize(("change", "rate"), [("larger", None), ("larger", 0.01), ("all alike", None)])
def test_who_has_other_data_is_not_banned_for_it(change: str, rate: float | None) -> None:
    strategy = ls.SentinelStrategy(
        STAGES,
        REPLICAS,
        micro_batches=MICRO_BATCHES,
        engine="virtual",
        verification=ls.Verification(warmup_steps=WARMUP, seed=0),
        response=ls.Response(audit_rate=rate),
    )
    module = fit(strategy, CHANGES[change])
    assert not strategy.ledger.banned
    assert any(one.worker.replica == 1 for one in strategy.detections), "it is out of line"
    if rate is not None:
        plain = fit("auto", CHANGES[change])
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(module.state_dict()[name], value, atol=1e-5, rtol=1e-4)
