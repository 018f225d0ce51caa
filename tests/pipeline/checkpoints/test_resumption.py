"""A run that is stopped anywhere in an epoch and resumed sees the data, and draws the random numbers, of one that was not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lightning_sentinel as ls
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline.checkpoints.resumption import data_generators, own_generators, set_data_generators

BATCHES, STEPS = 6, 15
"""In an epoch, and in a run: two epochs and a half."""


class Augmented(Dataset[Tensor]):
    """Sample number, and something drawn from every generator."""

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> Tensor:
        return torch.cat([torch.tensor([index, random.random(), float(np.random.rand())]), torch.rand(1)])


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from (Augmented()[index] for index in range(4 * BATCHES))


class Batches:
    """Any iterable is a loader."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.full((4, 4), float(number)) for number in range(BATCHES)])


class Recording(L.LightningModule):
    """Dropout in the pipeline; notes every batch that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1))
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = batch["one"] if isinstance(batch, dict) else batch
        return self.net(batch / 10).pow(2).mean()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append((batch_idx, batch))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Estimating(Recording):
    """Asks for its loaders before it has an optimizer, as every schedule over a whole run does."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        total = self.trainer.estimated_stepping_batches
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)]


class Saves(L.Callback):
    """Saves at one point of the run."""

    def __init__(self, path: Path, hook: str, step: int) -> None:
        def save(trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == step and not path.exists():
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


def plain() -> Any:
    return DataLoader(Augmented(), batch_size=4, shuffle=True)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": plain,
    "workers": lambda: DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=2),
    "stream": lambda: DataLoader(Stream(), batch_size=4),
    "several": lambda: {"one": plain(), "two": DataLoader(Augmented(), batch_size=12, shuffle=True)},
    "no DataLoader": lambda: Batches(),
}


def fit(
    loader: Any, callbacks: list[L.Callback], ckpt_path: Path | None = None, estimates: bool = False, **options: Any
) -> Recording:
    module = Estimating() if estimates else Recording()
    strategy = ls.SentinelStrategy(2, 2, micro_batches=1, engine="virtual", verification=None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        max_epochs=100 if estimates else -1,
        max_steps=STEPS,
        callbacks=callbacks,
        num_sanity_val_steps=0,
        **quiet,
        **options,
    )
    validation = DataLoader(Augmented(), batch_size=4) if options else None
    trainer.fit(module, loader, validation, ckpt_path=ckpt_path)
    return module


CASES = [
    ("shuffled", "on_train_batch_end", 4, {}),
    ("shuffled", "on_train_batch_start", 4, {}),
    ("shuffled", "on_train_batch_end", 8, {"val_check_interval": 3}),
    ("shuffled", "on_train_epoch_end", 6, {}),
    ("shuffled", "on_validation_end", 6, {"val_check_interval": 3}),
    ("workers", "on_train_batch_end", 9, {}),
    ("stream", "on_train_batch_end", 10, {}),
    ("several", "on_train_batch_end", 10, {}),
    ("no DataLoader", "on_train_batch_end", 4, {}),
    # Where a signal of the cluster may have it saved; the validation goes on, as in Lightning, with what it draws anew.
    ("no DataLoader", "on_validation_batch_end", 3, {"val_check_interval": 3}),
]


@pytest.mark.parametrize(("loader", "hook", "step", "options"), CASES, ids=lambda value: str(value))
def test_it_goes_on_where_it_was(loader: str, hook: str, step: int, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "at.ckpt"
    unbroken = fit(LOADERS[loader](), [Saves(path, hook, step)], **options)
    assert path.exists()
    resumed = fit(LOADERS[loader](), [], path, **options)
    assert len(unbroken.seen) == STEPS and len(resumed.seen) == STEPS - step
    torch.testing.assert_close(resumed.seen, unbroken.seen[step:], rtol=0, atol=0)
    torch.testing.assert_close(resumed.state_dict(), unbroken.state_dict(), rtol=0, atol=0)


def test_a_loader_that_knows_its_place_is_left_alone(tmp_path: Path) -> None:
    class Own:
        """Counts what it gave out, as a loader with ``state_dict`` does."""

        def __init__(self) -> None:
            self.given = 0

        def __iter__(self) -> Iterator[Tensor]:
            while self.given < BATCHES:
                self.given += 1
                yield torch.full((4, 4), float(self.given))
            self.given = 0

        def state_dict(self) -> dict[str, int]:
            return {"given": self.given}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.given = state["given"]

        def __len__(self) -> int:
            return BATCHES

    path = tmp_path / "at.ckpt"
    unbroken = fit(Own(), [Saves(path, "on_train_batch_end", 4)])
    resumed = fit(Own(), [], path)
    torch.testing.assert_close(resumed.seen, unbroken.seen[4:], rtol=0, atol=0)


class Tap(IterableDataset[Tensor]):
    """A stream that gives out every sample once, whoever opens it, and counts how often it is opened."""

    def __init__(self) -> None:
        self.given = self.opened = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.opened += 1
        for _ in range(4 * BATCHES):
            self.given += 1
            yield torch.full((4,), float(self.given))


class Sized(Tap):
    def __len__(self) -> int:
        return 4 * BATCHES


@pytest.mark.parametrize("kind", [Tap, Sized])
@pytest.mark.parametrize(
    ("hook", "options"),
    [("on_train_epoch_end", {}), ("on_train_batch_end", {}), ("on_validation_end", {"val_check_interval": 1.0})],
)
def test_at_the_end_of_an_epoch_a_loader_is_opened_once_and_nothing_is_lost(
    kind: type[Tap], hook: str, options: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "at.ckpt"
    unbroken, stream = kind(), kind()
    before = fit(DataLoader(unbroken, batch_size=4), [Saves(path, hook, BATCHES)], **options)
    stream.given = 4 * BATCHES
    resumed = fit(DataLoader(stream, batch_size=4), [], path, **options)
    torch.testing.assert_close(resumed.seen, before.seen[BATCHES:], rtol=0, atol=0)
    assert (unbroken.opened, stream.opened) == (3, 2)
    assert stream.given == unbroken.given


@pytest.mark.parametrize("loader", ["shuffled", "workers"])
def test_it_goes_on_where_it_was_although_its_optimizer_has_asked_for_the_data(loader: str, tmp_path: Path) -> None:
    path = tmp_path / "at.ckpt"
    unbroken = fit(LOADERS[loader](), [Saves(path, "on_train_batch_end", 4)], estimates=True)
    resumed = fit(LOADERS[loader](), [], path, estimates=True)
    torch.testing.assert_close(resumed.seen, unbroken.seen[4:], rtol=0, atol=0)
    torch.testing.assert_close(resumed.state_dict(), unbroken.state_dict(), rtol=0, atol=0)


def test_a_stream_that_the_optimizer_asks_for_is_opened_once_it_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "at.ckpt"
    unbroken, stream = Sized(), Sized()
    before = fit(DataLoader(unbroken, batch_size=4), [Saves(path, "on_train_epoch_end", BATCHES)], estimates=True)
    stream.given = 4 * BATCHES
    resumed = fit(DataLoader(stream, batch_size=4), [], path, estimates=True)
    torch.testing.assert_close(resumed.seen, before.seen[BATCHES:], rtol=0, atol=0)
    assert (unbroken.opened, stream.opened) == (3, 2)


@pytest.mark.parametrize("state_dict_type", ["full", "sharded"])
def test_weights_alone_are_evaluated_and_no_more(state_dict_type: Any, tmp_path: Path) -> None:
    path = tmp_path / "at.ckpt"
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    strategy = ls.SentinelStrategy(2, 2, micro_batches=1, engine="virtual", verification=None, state_dict_type=state_dict_type)
    trainer, module = L.Trainer(strategy=strategy, accelerator="cpu", max_steps=2, **quiet), Recording()
    trainer.fit(module, plain())
    trainer.save_checkpoint(path, weights_only=True)
    assert path.is_dir() == (state_dict_type == "sharded")
    other = Recording()
    torch.nn.init.zeros_(other.net[0].weight)
    strategy = ls.SentinelStrategy(2, 2, micro_batches=1, engine="virtual", verification=None)
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", max_steps=2, **quiet)
    trainer.validate(other, plain(), ckpt_path=path, verbose=False)
    torch.testing.assert_close(other.state_dict(), module.state_dict(), rtol=0, atol=0)
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        trainer.fit(other, plain(), ckpt_path=path)


def test_generators_are_put_back() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]

    random.gauss(), np.random.randn()  # a second value of each pair waits
    states = data_generators()
    first = draw()
    draw()
    set_data_generators(states)
    assert draw() == first


class TestOtherMeshes:
    SAVED = {rank: {"now/torch": torch.tensor([rank]), "computation/torch": torch.tensor([rank])} for rank in range(6)}

    def test_the_same(self) -> None:
        for rank in range(6):
            assert own_generators(self.SAVED, Mesh(3, 2), 6, Mesh(3, 2), rank, 6) == self.SAVED[rank]

    def test_as_many_replicas_draw_the_same_data(self) -> None:
        found = [own_generators(self.SAVED, Mesh(3, 2), 6, Mesh(2, 2), rank, 4) for rank in range(4)]
        assert [int(one["now/torch"]) for one in found if one] == [0, 1, 0, 1]
        assert all(one and "computation/torch" not in one for one in found)

    def test_who_was_not_asked_draws_the_data_of_its_replica(self) -> None:
        asked = {rank: self.SAVED[rank] for rank in (0, 3, 4, 5)}
        assert own_generators(asked, Mesh(3, 2), 6, Mesh(3, 2), 1, 6) == {"now/torch": torch.tensor([3])}

    @pytest.mark.parametrize(("mesh", "processes"), [(Mesh(2, 3), 6), (Mesh(3, 2), 1), (Mesh(2, 2), 1)])
    def test_others_draw_anew(self, mesh: Mesh, processes: int) -> None:
        assert own_generators(self.SAVED, Mesh(3, 2), 6, mesh, 0, processes) is None

    def test_a_virtual_mesh_is_another(self) -> None:
        assert own_generators({0: self.SAVED[0]}, Mesh(3, 2), 1, Mesh(3, 2), 0, 1) == self.SAVED[0]
        assert own_generators({0: self.SAVED[0]}, Mesh(3, 2), 1, Mesh(3, 2), 0, 6) is None
