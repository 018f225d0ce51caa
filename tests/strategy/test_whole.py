"""A mesh of one stage in one process: nothing is cut, so a module need not say what its layers are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_sentinel.errors import ConfigurationError, PipelineModelError
from tests.strategy.test_by_hand import ONE_STAGE
from tests.strategy.test_modules import MESHES, fitted, same_as_without, trainer, virtual
from tests.user_modules import Module, loader


class Unsaid(L.LightningModule):
    """Two towers, one of which is called twice, dropout, and a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.norm(self.one(x))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = batch["x"]
        loss = ((self(x) - self.two(x)) ** 2).mean() + ((self(2 * x) - 1) ** 2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", (self(batch["x"]) + self(batch["x"])).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}], ids=str)
def test_a_module_that_does_not_say_what_its_layers_are(options: dict[str, Any]) -> None:
    expected, logged, _ = fitted(Unsaid(), "auto", **options)
    found, also_logged, _ = fitted(Unsaid(), virtual(1, 1, micro_batches=1), **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(also_logged, logged)


class Siamese(Module):
    """Says what its layers are, and calls them twice."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return super().loss(batch) + (self.model(2 * batch["x"]) ** 2).mean()


@pytest.mark.parametrize("mesh", [(1, 1), (1, 2)])
def test_one_stage_is_called_as_often_as_a_step_likes(mesh: tuple[int, int]) -> None:
    same_as_without(Siamese, mesh)
    with pytest.raises(PipelineModelError, match=r"called self\.model\(x\) more than once"):
        trainer(virtual(2, 1)).fit(Siamese(), loader())


class Scaled(Module):
    """Says what its layers are, and trains more than them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.scale * super().loss(batch)


@pytest.mark.parametrize("mesh", [(1, 1), (1, 2)])
def test_parameters_outside_of_the_layers(mesh: tuple[int, int]) -> None:
    same_as_without(Scaled, mesh, gradient_clip_val=0.1)
    with pytest.raises(PipelineModelError, match=r"trainable parameters outside its pipeline: scale"):
        trainer(virtual(2, 1)).fit(Scaled(), loader())


def test_it_is_refused_where_it_would_be_cut() -> None:
    with pytest.raises(PipelineModelError, match=r"Unsaid has no nn\.Sequential"):
        trainer(virtual(2, 1)).fit(Unsaid(), loader())


class Counts(L.LightningModule):
    """A baseline that has no layers at all."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("mean", batch["y"].mean())

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return batch["y"].mean(dim=1)


@pytest.mark.parametrize("mesh", ONE_STAGE)
def test_a_module_without_layers_is_evaluated(mesh: tuple[int, int]) -> None:
    found, expected = [
        (run.validate(Counts(), loader()), run.test(Counts(), loader()), run.predict(Counts(), loader()))
        for run in (trainer(virtual(*mesh)), trainer("auto"))
    ]
    torch.testing.assert_close(found, expected)


class Thawing(BaseFinetuning):
    """All layers are frozen when the module is cut, and some train from the second epoch on."""

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.model)

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 0:
            self.unfreeze_and_add_param_group(pl_module.model.head, optimizer)


class Frozen(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.inp.parameters(), lr=0.1)


@pytest.mark.parametrize("mesh", MESHES)
def test_layers_that_are_unfrozen_when_training_begins(mesh: tuple[int, int]) -> None:
    expected, found = Frozen(), Frozen()
    trainer("auto", callbacks=[Thawing()]).fit(expected, loader())
    trainer(virtual(*mesh), callbacks=[Thawing()]).fit(found, loader())
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=1e-6)


class Detached(Module):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch).detach()


@pytest.mark.parametrize("mesh", MESHES)
def test_a_loss_of_which_nothing_follows_is_an_error(mesh: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError, match="does not require grad"):
        trainer(virtual(*mesh)).fit(Detached(), loader())


@pytest.mark.parametrize(
    ("returned", "why"), [(5.0, "must return a Tensor, a dict, or None"), ({"a": 5}, "'loss' key needs to be")]
)
def test_what_is_no_loss_is_lightnings_error_too(returned: Any, why: str) -> None:
    class Odd(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            self.model(batch["x"])
            return returned

    for strategy in (virtual(3, 1), "auto"):
        with pytest.raises(MisconfigurationException, match=why):
            trainer(strategy).fit(Odd(), loader())


class LogsOddly(Module):
    def __init__(self, log: Callable[[L.LightningModule], None]) -> None:
        super().__init__()
        self.bar, self.do = MeanMetric(), log

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        self.do(self)
        return super().training_step(batch, batch_idx)


def twice(module: L.LightningModule) -> None:
    module.log("foo", 1.0, prog_bar=False)
    module.log("foo", 1.0, prog_bar=True)


@pytest.mark.parametrize(
    ("log", "kind", "why"),
    [
        (lambda m: m.log("foo", None), ValueError, r"`self\.log\(foo, None\)` was called"),
        (lambda m: m.log("foo", [1, 2]), ValueError, r"`self\.log\(foo, \[1, 2\]\)` was called"),
        (lambda m: m.log("foo", torch.ones(2)), ValueError, "tensor must have a single element"),
        (lambda m: m.log("foo/dataloader_idx_0", 1.0), MisconfigurationException, "with the key `foo/dataloader_idx_0`"),
        (lambda m: m.log("foo", MeanMetric()), MisconfigurationException, r"metric_attribute=name\)` where `name` is one of \["),
        (lambda m: m.log("foo", 1.0, reduce_fx=torch.argmax), MisconfigurationException, "{min,max,mean,sum}"),
        (twice, MisconfigurationException, r"self\.log\(foo, ...\)` twice in `training_step`"),
    ],
)
def test_what_lightning_does_not_log_is_the_same_error(log: Any, kind: type[Exception], why: str) -> None:
    for strategy in (virtual(3, 1), "auto"):
        with pytest.raises(kind, match=why):
            trainer(strategy).fit(LogsOddly(log), loader())


def test_predictions_log_nothing() -> None:
    class Predicts(Module):
        def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.log("foo", 1.0)
            return self.model(batch["x"])

    for strategy in (virtual(3, 1), "auto"):
        with pytest.raises(MisconfigurationException, match="result collection is not registered yet"):
            trainer(strategy).predict(Predicts(), loader())


class Odd(Module):
    """Its batches agree on no number of samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert batch["names"] == ["a", "b", "c"]
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "names": batch["names"], "found": self.model.inp.weight.detach()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert outputs["names"] == batch["names"]
        assert outputs["found"].shape == (6, 4)


def test_a_batch_that_is_not_dealt_need_not_be_told_how() -> None:
    def batches() -> DataLoader[Any]:
        data = [{"x": torch.ones(8, 4) * number, "y": torch.ones(8, 2), "names": ["a", "b", "c"]} for number in range(3)]
        return DataLoader(data, batch_size=None)

    expected, found = Odd(), Odd()
    trainer("auto").fit(expected, batches(), batches())
    trainer(virtual(3, 1, micro_batches=1)).fit(found, batches(), batches())
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=1e-6)
    trainer(virtual(3, 2)).validate(found, batches())
    with pytest.raises(ConfigurationError, match="does not agree on a number of samples"):
        trainer(virtual(3, 1)).fit(found, batches())
