"""Replicas of a virtual mesh that put signals of different shapes into their pipelines."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_sentinel as ls

LONGEST = 7


class Sequences(Dataset[tuple[Tensor, int]]):
    """Of different lengths, padded to the longest of all."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, LONGEST, 4, generator=generator)
        self.lengths = torch.randint(2, LONGEST + 1, (count,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.lengths[index]


class Trims(L.LightningModule):
    """Cuts its batch to the length of its longest sequence. What is behind a sequence's end has no part in its loss."""

    seen: set[tuple[int, ...]]

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(layers)))
        self.seen = set()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, lengths = batch
        x = x[:, : int(lengths.max())]
        self.seen.add(tuple(x.shape))
        inside = torch.arange(x.shape[1]) < lengths[:, None]
        error = (self.net(x) - x.flip(2)).square().mean(dim=2)
        loss = ((error * inside).sum(dim=1) / lengths).mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class Pictures(Trims):
    """Lists of images, of which each replica's are as large as its largest."""

    def training_step(self, batch: dict[str, list[Tensor]], batch_idx: int) -> Tensor:
        images = batch["images"]
        side = max(image.shape[0] for image in images)
        x = torch.stack([nn.functional.pad(image, (0, 0, 0, side - len(image))) for image in images])
        self.seen.add(tuple(x.shape))
        errors = [(out[: len(image)] - image.flip(1)).square().mean() for out, image in zip(self.net(x), images)]
        return torch.stack(errors).mean()


class Pieces(Trims):
    """Deals its batches itself, into micro-batches of different numbers of samples."""

    def split_batch(self, batch: tuple[Tensor, Tensor], count: int) -> list[Any]:
        each = 2 * len(batch[0]) // count
        first = [each // 2 + number % 2 * (each % 2) for number in range(count // 2)]
        sizes = [*first, *(each - one for one in first)]
        return list(zip(batch[0].split(sizes), batch[1].split(sizes)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.add(tuple(batch[0].shape))
        return (self.net(batch[0]) - batch[0].flip(2)).square().mean()


def listed(samples: list[tuple[Tensor, int]]) -> dict[str, list[Tensor]]:
    return {"images": [x[:length] for x, length in samples]}


def fitted(module: Trims, strategy: Any, callbacks: Any = (), steps: int = 6, samples: int = 44) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = L.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_steps=steps, callbacks=list(callbacks), **quiet)
    kind = {"collate_fn": listed} if isinstance(module, Pictures) else {}
    run.fit(module, DataLoader(Sequences(samples), batch_size=12, **kind))
    return run


@pytest.mark.parametrize("make", [Trims, Pictures, Pieces])
@pytest.mark.parametrize(
    "settings",
    [
        {"verification": None},
        {"verification": ls.Verification(warmup_steps=2), "response": ls.Response(audit_rate=None)},
        {"verification": ls.Verification(warmup_steps=2), "response": ls.Response(audit_rate=1.0)},
    ],
    ids=["plain", "verified", "audited"],
)
def test_the_weights_are_those_of_a_plain_run(make: Any, settings: dict[str, Any]) -> None:
    """The last batch has eight samples, of which each of four replicas gets two."""
    alone, module = make(), make()
    plain = fitted(alone, "auto")
    strategy = ls.SentinelStrategy(3, 4, micro_batches=2, engine="virtual", **settings)
    run = fitted(module, strategy)
    assert len(module.seen) > 1
    torch.testing.assert_close(dict(module.state_dict()), dict(alone.state_dict()), rtol=0, atol=1e-6)
    if make is Trims:
        assert float(run.callback_metrics["loss"]) == pytest.approx(float(plain.callback_metrics["loss"]), abs=1e-5)
    assert not strategy.ledger.banned


@pytest.mark.parametrize("rate", [None, 0.1])
def test_who_lies_is_found_whatever_the_length(rate: float | None) -> None:
    guilty = ls.Worker(1, 2)
    response = ls.Response(audit_rate=rate, ban_after=2)
    verification = ls.Verification(warmup_steps=20, seed=1)
    strategy = ls.SentinelStrategy(3, 6, micro_batches=2, engine="virtual", verification=verification, response=response)
    attack = ls.AttackInjector({"name": "scale", "factor": 20.0}, workers=[guilty], start_step=22)
    fitted(Trims(), strategy, [attack], steps=34, samples=144)
    assert strategy.ledger.banned == {guilty}


class Tells(Trims):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        x = batch[0][:, : int(batch[1].max())]
        return {"loss": self.net(x).square().mean(), "x": x}


def test_hooks_get_one_entry_a_sample_of_what_has_different_lengths() -> None:
    given: list[Any] = []

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            given.append((outputs["x"], batch[0]))

    fitted(Tells(), ls.SentinelStrategy(2, 4, micro_batches=2, engine="virtual", verification=None), [Looks()], steps=1)
    ((rows, whole),) = given
    assert len(rows) == len(whole) and len({len(row) for row in rows}) > 1
    assert all(torch.equal(row, sample[: len(row)]) for row, sample in zip(rows, whole))


def test_each_worker_has_its_row_in_the_table_of_a_step() -> None:
    """Groups of replicas are verified one after the other, and what was found is in the order of replicas again."""
    strategy = ls.SentinelStrategy(
        2, 4, micro_batches=2, engine="virtual", verification=ls.Verification(), response=ls.Response(audit_rate=None)
    )
    tables = []

    class Looks(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            settle = strategy._run.guard.settle
            strategy._run.guard.settle = lambda table, *rest, **more: tables.append(table) or settle(table, *rest, **more)

    fitted(Trims(), strategy, [Looks()], steps=1)
    _, lengths = zip(*(Sequences(44)[index] for index in range(12)))
    # Of replica r the samples r, r + 4 and r + 8, the first two of which are its first micro-batch.
    longest = [[max(lengths[replica], lengths[replica + 4]), lengths[replica + 8]] for replica in range(4)]
    assert tables[0].column("positions").tolist() == [longest] * 2
