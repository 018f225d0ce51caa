"""Modules and optimizers that decide themselves when a loss is evaluated, and when weights change: as under ``strategy="auto"``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_sentinel as ls
from lightning_sentinel.errors import ConfigurationError
from tests.strategy.test_modules import MESHES, fitted, same_as_without, trainer, virtual
from tests.user_modules import Module, Samples, loader

ONE_STAGE = [(1, 1), (1, 3)]
CLIPPING = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}


class Manual(Module):
    """Two optimizers that take turns, each with a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        for name, optimizer in zip(("first", "second"), self.optimizers()):
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            self.log(name, loss, prog_bar=True)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=1.0)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch) + self.loss(batch))

    def configure_optimizers(self) -> Any:
        front, back = self.model.inp.parameters(), self.model.head.parameters()
        return [torch.optim.AdamW(front, lr=0.01), torch.optim.SGD(back, lr=0.1, momentum=0.9)]


@pytest.mark.parametrize("mesh", ONE_STAGE)
def test_manual_optimization_where_there_is_no_pipeline(mesh: tuple[int, int]) -> None:
    same_as_without(Manual, mesh)


def test_a_checkpoint_of_several_optimizers(tmp_path: Path) -> None:
    whole, *_ = fitted(Manual(), "auto", max_epochs=4)
    half = trainer(virtual(1, 2))
    half.fit(Manual(), loader(), loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    module = Manual()
    trainer(virtual(1, 1), max_epochs=4).fit(module, loader(), loader(), ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(module.state_dict(), whole, rtol=0, atol=1e-6)
    plain = Manual()
    trainer("auto", max_epochs=4).fit(plain, loader(), loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    torch.testing.assert_close(plain.state_dict(), whole, rtol=0, atol=1e-6)


def test_manual_optimization_is_refused_in_a_pipeline_and_in_shards() -> None:
    with pytest.raises(ConfigurationError, match=r"Manual uses manual optimization.*stages=1, engine='virtual'"):
        trainer(virtual(2, 1)).fit(Manual(), loader())
    with pytest.raises(ConfigurationError, match=r"Manual uses manual optimization.*state_dict_type='full'"):
        trainer(virtual(1, 1, state_dict_type="sharded")).fit(Manual(), loader())


class Evaluated(Manual):
    validation_step = Module.validation_step
    test_step = Module.validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(batch["x"])


def test_a_module_of_manual_optimization_is_evaluated_by_a_pipeline() -> None:
    found, expected = [
        (run.validate(Evaluated(), loader()), run.test(Evaluated(), loader()), run.predict(Evaluated(), loader()))
        for run in (trainer(virtual(3, 1)), trainer("auto"))
    ]
    torch.testing.assert_close(found, expected)


def test_several_optimizers_without_manual_optimization() -> None:
    class Several(Manual):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = True

        training_step = Module.training_step

    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual optimization"):
        trainer(virtual(1, 1)).fit(Several(), loader())
    with pytest.raises(ConfigurationError, match=r"returned more than one optimizer"):
        trainer(virtual(2, 1)).fit(Several(), loader())


class Newton(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, CLIPPING], ids=str)
def test_an_optimizer_that_evaluates_the_loss_itself(mesh: tuple[int, int], options: dict[str, Any]) -> None:
    same_as_without(Newton, mesh, **options)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_checkpoint_of_one_that_keeps_lists_of_tensors(tmp_path: Path, kind: Any) -> None:
    whole, *_ = fitted(Newton(), virtual(3, 2), max_epochs=4)
    half = trainer(virtual(3, 2, state_dict_type=kind))
    half.fit(Newton(), loader(), loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    module = Newton()
    trainer(virtual(3, 2, state_dict_type=kind), max_epochs=4).fit(module, loader(), loader(), ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(module.state_dict(), whole, rtol=0, atol=1e-6)


def test_each_evaluation_is_verified() -> None:
    attack = ls.AttackInjector(ls.attacks.get("scale", factor=50.0), workers=[ls.Worker(1, 0)], start_step=4)
    settings = ls.Verification(warmup_steps=4)
    run = trainer(virtual(3, 3, verification=settings, response=ls.Response(audit_rate=1.0)), callbacks=[attack], max_epochs=3)
    module, plain = Newton(), Newton()
    run.fit(module, DataLoader(Samples(), batch_size=12))
    assert run.strategy.ledger.banned == {ls.Worker(1, 0)}
    assert run.strategy.step == 3 * run.global_step
    trainer("auto", max_epochs=3).fit(plain, DataLoader(Samples(), batch_size=12))
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=1e-5)


class Unstepped(Module):
    def configure_optimizers(self) -> None:
        return None


@pytest.mark.filterwarnings("ignore:.*configure_optimizers.*returned .None.")
@pytest.mark.parametrize("mesh", MESHES)
def test_a_module_without_an_optimizer(mesh: tuple[int, int], tmp_path: Path) -> None:
    same_as_without(Unstepped, mesh)
    *_, run = fitted(Unstepped(), virtual(*mesh))
    run.save_checkpoint(tmp_path / "last.ckpt")
    trainer(virtual(*mesh), max_epochs=3).fit(Unstepped(), loader(), ckpt_path=tmp_path / "last.ckpt")


class OwnStep(Module):
    """Of Lightning's hook; an optimizer of one's own takes more than a closure."""

    def configure_optimizers(self) -> Any:
        class Scaled(torch.optim.SGD):
            def step(self, closure: Any = None, factor: float = 1.0) -> Any:
                loss = closure()
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.data.sub_(group["lr"] * factor * parameter.grad)
                return loss

        return Scaled(self.parameters(), lr=0.1)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        assert optimizer.step(closure=optimizer_closure, factor=0.5 if batch_idx % 2 else 2.0) is not None


@pytest.mark.parametrize("mesh", MESHES)
def test_what_a_hook_hands_to_an_optimizer(mesh: tuple[int, int]) -> None:
    same_as_without(OwnStep, mesh)
