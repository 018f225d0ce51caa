from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, StochasticWeightAveraging
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer

import lightning_sentinel as ls
from lightning_sentinel.config import Response, Verification
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.strategy.protection import protection
from lightning_sentinel.strategy.refusals import (
    check_precision,
    check_replicas,
    refuse_resumed_finetuning,
    refuse_synchronised_layers,
    refuse_unsupported,
    require_optimizer,
    requiring_one_optimizer,
    warn_of_short_warmup,
)
from tests.distributed import tasks


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2))


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def trainer(**options: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 1.0}, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "norm"}, {"gradient_clip_val": 0.0}],
    ids=str,
)
def test_fine(options: dict[str, Any]) -> None:
    refuse_unsupported(Module(), trainer(**options), whole=False)


def test_manual_optimization() -> None:
    run = trainer()
    run.state.fn = TrainerFn.FITTING
    with pytest.raises(ConfigurationError, match=r"Manual uses manual optimization.*automatic_optimization = True"):
        refuse_unsupported(Manual(), run, whole=False)
    refuse_unsupported(Manual(), run, whole=True)
    run.state.fn = TrainerFn.VALIDATING
    refuse_unsupported(Manual(), run, whole=False)


class Normed(Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)


def test_an_epoch_more_for_some_stages() -> None:
    run = trainer(callbacks=[StochasticWeightAveraging(swa_lrs=0.1)])
    refuse_unsupported(Module(), run, whole=False)
    with pytest.raises(ConfigurationError, match=r"StochasticWeightAveraging gives.*stages of Normed.*Use WeightAveraging"):
        refuse_unsupported(Normed(), run, whole=False)


def test_layers_in_which_replicas_wait_for_each_other() -> None:
    strategy = ls.SentinelStrategy(2, 2)
    run = L.Trainer(strategy=strategy, accelerator="cpu", devices=4, sync_batchnorm=True, logger=False, barebones=True)
    with pytest.raises(ConfigurationError, match=r"sync_batchnorm=True\) would let replicas wait.*GroupNorm"):
        refuse_synchronised_layers(run.strategy._layer_sync is not None, virtual=False)
    refuse_synchronised_layers(True, virtual=True)
    refuse_synchronised_layers(False, virtual=False)


def test_names_of_parameters_that_other_stages_have() -> None:
    run = trainer(callbacks=[BackboneFinetuning()])
    run.state.fn = TrainerFn.VALIDATING
    refuse_resumed_finetuning(run, Mesh(2, 1))
    run.state.fn = TrainerFn.FITTING
    refuse_resumed_finetuning(run, Mesh(1, 2))
    with pytest.raises(ConfigurationError, match=r"BackboneFinetuning cannot go on from a checkpoint.*load_from_checkpoint"):
        refuse_resumed_finetuning(run, Mesh(2, 1))


def test_a_step_that_is_left_out() -> None:
    class Trained(Module):
        validation_step = test_step = None

    refuse_unsupported(Trained(), trainer(), whole=False)


HALF = MixedPrecision("16-mixed", "cpu")


@pytest.mark.parametrize("precision", [DoublePrecision(), HalfPrecision("16-true")], ids=lambda p: p.precision)
def test_precision(precision: Precision) -> None:
    kind = type(precision).__name__
    with pytest.raises(ConfigurationError, match=rf"{kind}\(precision='{precision.precision}'\).*one of '32-true', 'bf16-mixed'"):
        check_precision(precision, None, virtual=False)


@pytest.mark.parametrize("precision", [Precision(), MixedPrecision("bf16-mixed", "cpu"), HalfPrecision("bf16-true")])
@pytest.mark.parametrize("virtual", [False, True])
def test_precisions_that_are_verified(precision: Precision, virtual: bool) -> None:
    check_precision(precision, Verification(), virtual)


def test_overflow_is_no_attack() -> None:
    check_precision(HALF, None, virtual=False)
    for verification, virtual in ((Verification(), False), (None, True)):
        with pytest.raises(
            ConfigurationError, match=r"precision='16-mixed'\) needs .*verification=None.*Use precision='bf16-mixed'"
        ):
            check_precision(HALF, verification, virtual)


class TestOptimizers:
    """Through Lightning's own reading of ``configure_optimizers``."""

    @staticmethod
    def made(monkeypatch: pytest.MonkeyPatch, configure: Callable[[L.LightningModule], Any]) -> tuple[Module, list[Optimizer]]:
        module = Module()
        monkeypatch.setattr(module, "configure_optimizers", lambda: configure(module))
        module.trainer = run = trainer()
        run.strategy.connect(module)
        run.strategy._lightning_module = module
        return module, _init_optimizers_and_lr_schedulers(module)[0]

    @pytest.mark.parametrize("listed", [False, True])
    def test_one(self, monkeypatch: pytest.MonkeyPatch, listed: bool) -> None:
        def configure(module: L.LightningModule) -> Any:
            optimizer = torch.optim.SGD(module.parameters())
            return [optimizer] if listed else optimizer

        with requiring_one_optimizer(Module(), whole=False):
            module, optimizers = self.made(monkeypatch, configure)
        require_optimizer(module, optimizers)

    def test_two(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with (
            pytest.raises(
                ConfigurationError, match=r"Module\.configure_optimizers returned more than one.*several parameter groups"
            ),
            requiring_one_optimizer(Module(), whole=False),
        ):
            self.made(monkeypatch, lambda module: [torch.optim.SGD(module.parameters()) for _ in range(2)])

    @pytest.mark.filterwarnings("ignore:.*configure_optimizers.*returned .None.")
    def test_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module, optimizers = self.made(monkeypatch, lambda _: None)
        for made in (optimizers, []):
            with pytest.raises(ConfigurationError, match=r"Module\.configure_optimizers returned no optimizer.*Return a"):
                require_optimizer(module, made)

    def test_one_that_evaluates_the_loss_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module, optimizers = self.made(monkeypatch, lambda module: torch.optim.LBFGS(module.parameters()))
        with pytest.raises(ConfigurationError, match=r"LBFGS\.step\(\) asks for a closure.*torch\.optim\.AdamW"):
            require_optimizer(module, optimizers)

    @pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("multiple optimizers")], ids=repr)
    def test_other_errors_pass(self, error: Exception) -> None:
        with pytest.raises(type(error)) as raised, requiring_one_optimizer(Module(), whole=False):
            raise error
        assert raised.value is error


def test_audits_need_a_second_replica() -> None:
    with pytest.raises(ConfigurationError, match=r"audit_rate=0.1\) needs at least 2 replicas.*this mesh has 1"):
        check_replicas(Mesh(stages=4, replicas=1), Verification(), Response(audit_rate=0.1))
    check_replicas(Mesh(stages=4, replicas=2), Verification(), Response(audit_rate=0.1))


@pytest.mark.parametrize(
    ("mesh", "why"), [((4, 1), "With replicas=1 there is nobody.*mesh of 4 x 1.*replicas=2"), ((1, 3), "stages=1 nothing.*1 x 3")]
)
def test_a_mesh_that_the_default_can_hardly_protect_is_announced(
    mesh: tuple[int, int], why: str, recwarn: pytest.WarningsRecorder
) -> None:
    check_replicas(Mesh(*mesh), None, Response())
    check_replicas(Mesh(2, 2), Verification(), Response())
    check_replicas(Mesh(4, 1), Verification(), Response(audit_rate=None))
    assert not recwarn.list
    with pytest.warns(UserWarning, match=why):
        check_replicas(Mesh(*mesh), Verification(), Response())


@pytest.mark.parametrize(
    ("mesh", "response", "parts"),
    [
        ((1, 4), Response(), ["Nothing is verified: with one stage"]),
        ((3, 1), Response(), ["Flags decide", "stays out of the weights; nobody is banned"]),
        ((3, 2), Response(), ["1 % of all signals", "nobody can tell who lies, so nobody is banned"]),
        ((3, 4), Response(), ["1 % of all signals", "banned the second time, at most 1 of 4"]),
        ((3, 5), Response(audit_rate=0.2), ["20 % of all signals", "banned at once, at most 2 of 5"]),
        ((3, 5), Response(ban_after=None), ["done again without its sender; nobody is banned"]),
        ((3, 5), Response(audit_rate=None), ["Flags decide", "flagged in 5 steps in a row", "at most 2 of 5"]),
        ((3, 5), Response(on_flag="log", ban_after=None), ["1 % of all signals", "What does not match is reported"]),
        ((3, 1), Response(on_flag="log", ban_after=None), ["Flags decide: what is flagged is reported."]),
    ],
)
def test_what_a_mesh_can_find_and_what_follows_is_said(mesh: tuple[int, int], response: Response, parts: list[str]) -> None:
    said = protection(Mesh(*mesh), Verification(), response)
    assert all(part in said for part in parts), said
    assert protection(Mesh(*mesh), None, response) == "Nothing is verified."


@pytest.mark.parametrize(("steps", "warns"), [(5, True), (6, False)])
def test_a_warm_up_that_outlasts_the_run_is_announced(steps: int, warns: bool) -> None:
    strategy = ls.SentinelStrategy(stages=2, replicas=2, engine="virtual", verification=ls.Verification(warmup_steps=5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tasks.trainer(strategy, 1, steps).fit(tasks.Classifier("sgd"), tasks.loader(16))
    assert any("outlasts this run of 5 training batches" in str(one.message) for one in caught) == warns


@pytest.mark.parametrize(
    ("response", "until"),
    [
        (Response(), "flagged, and recomputed, more often"),
        (Response(audit_rate=None), "nothing is left out and nobody is banned, except"),
        (Response(on_flag="log", ban_after=None, audit_rate=None), "flagged more often"),
    ],
)
def test_a_warm_up_that_is_too_short_for_its_fences_is_announced(
    response: Response, until: str, recwarn: pytest.WarningsRecorder
) -> None:
    settings, mesh = Verification(warmup_steps=10), Mesh(2, 3)
    warn_of_short_warmup(Mesh(1, 3), 2, settings, response)
    warn_of_short_warmup(mesh, 2, Verification(warmup_steps=27), response)
    assert not recwarn.list
    says = rf"warmup_steps=10\) is short: fences see 30 signals.*0.01 takes 100.*{until}.*warmup_steps=27 or more"
    with pytest.warns(UserWarning, match=says):
        warn_of_short_warmup(mesh, 2, settings, response)


@pytest.mark.parametrize("features", [["gradients"], "temporal", ["input_output", "l3"]], ids=str)
def test_features_that_are_none_are_named_when_the_strategy_is_made(features: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Verification\.features"):
        ls.SentinelStrategy(stages=2, verification=ls.Verification(features=features))


def test_bans_and_aggregations_that_cannot_work_are_refused() -> None:
    mesh, banned = Mesh(stages=2, replicas=2), Response(banned=[Worker(1, 2)])
    with pytest.raises(ConfigurationError, match=r"worker \(stage 1, replica 2\) is not in the mesh"):
        check_replicas(mesh, Verification(), banned)
    with pytest.raises(ConfigurationError, match=r"has no effect with verification=None"):
        check_replicas(Mesh(2, 3), None, banned)
    check_replicas(Mesh(2, 3), Verification(), banned)
    with pytest.raises(ConfigurationError, match=r"aggregation='median'\) needs at least 3 replicas.*has 2"):
        check_replicas(mesh, Verification(), Response(aggregation="median"))
    check_replicas(Mesh(2, 3), None, Response(aggregation="median"))
    for rule, replicas, tolerated in (("median", 4, 2), ("krum", 6, 2), ("multi_krum", 4, 2), ("centred_clipping", 3, 2)):
        check_replicas(Mesh(2, replicas), None, Response(aggregation=rule, tolerated=1))
        with pytest.raises(ConfigurationError, match=rf"tolerated={tolerated}\) promises.*Use tolerated=1 or less"):
            check_replicas(Mesh(2, replicas), None, Response(aggregation=rule, tolerated=tolerated))
    check_replicas(Mesh(2, 7), None, Response(aggregation="krum", tolerated=2))
