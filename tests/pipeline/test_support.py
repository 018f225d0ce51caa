from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.plugins.precision import DoublePrecision, MixedPrecision, Precision
from torch import nn

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.support import refuse_unsupported, require_one_optimizer


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2))


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Clipping(Module):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        pass


def trainer(**options: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 1.0}, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "norm"}, {"gradient_clip_val": 0.0}],
    ids=str,
)
def test_fine(options: dict[str, Any]) -> None:
    refuse_unsupported(Module(), trainer(**options), Precision())


def test_manual_optimization() -> None:
    with pytest.raises(ConfigurationError, match=r"Manual uses manual optimization.*automatic_optimization = True"):
        refuse_unsupported(Manual(), trainer(), Precision())


def test_clipping_by_value() -> None:
    run = trainer(gradient_clip_val=1.0, gradient_clip_algorithm="value")
    with pytest.raises(ConfigurationError, match=r"gradient_clip_algorithm='value'\) cannot.*gradient_clip_algorithm='norm'"):
        refuse_unsupported(Module(), run, Precision())


def test_clipping_of_the_users_own() -> None:
    with pytest.raises(ConfigurationError, match=r"Clipping\.configure_\w+ would see one stage's.*Trainer\(gradient_clip_val"):
        refuse_unsupported(Clipping(), trainer(), Precision())


@pytest.mark.parametrize("precision", [DoublePrecision(), MixedPrecision("bf16-mixed", "cpu")], ids=lambda p: p.precision)
def test_precision(precision: Precision) -> None:
    kind = type(precision).__name__
    with pytest.raises(ConfigurationError, match=rf"{kind}\(precision='{precision.precision}'\).*precision='32-true'"):
        refuse_unsupported(Module(), trainer(), precision)


class TestOptimizers:
    def test_one(self) -> None:
        module = Module()
        require_one_optimizer(module, [torch.optim.SGD(module.parameters())])

    @pytest.mark.parametrize("count", [0, 2])
    def test_none_and_two(self, count: int) -> None:
        module = Module()
        optimizers = [torch.optim.SGD(module.parameters()) for _ in range(count)]
        with pytest.raises(ConfigurationError, match=rf"Module\.configure_optimizers returned {count} optimizers;.*exactly one"):
            require_one_optimizer(module, optimizers)

    @pytest.mark.filterwarnings("ignore:.*configure_optimizers.*returned .None.")
    def test_what_lightning_makes_of_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """``configure_optimizers`` that returns ``None`` reaches the strategy as a mock, which steps nothing."""
        module = Module()
        monkeypatch.setattr(module, "configure_optimizers", lambda: None)
        run = trainer()
        run.strategy.connect(module)
        module.trainer = run
        run.strategy._lightning_module = module
        optimizers, _ = _init_optimizers_and_lr_schedulers(module)
        with pytest.raises(ConfigurationError, match="exactly one"):
            require_one_optimizer(module, optimizers)
