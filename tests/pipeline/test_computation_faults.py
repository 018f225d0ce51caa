"""A worker whose layers compute something else: what it spoils is left out, and the rest is that of a run without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric

import lightning_sentinel as ls
from lightning_sentinel.verification.contributions import WEIGHT_GRADIENT
from tests.distributed import fault_tasks, tasks

MARK = 1e4


def virtual(stages: int, replicas: int, **options: Any) -> ls.SentinelStrategy:
    return ls.SentinelStrategy(stages, replicas, micro_batches=2, engine="virtual", **options)


class Without(tasks.Classifier):
    """Leaves samples out of some batches, as a plain run can."""

    def __init__(self, keep: dict[int, Any]) -> None:
        super().__init__("adamw")
        self.keep = keep

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        kept = self.keep.get(batch_idx, slice(None))
        return super().training_step([part[kept] for part in batch], batch_idx)


class Breaks(nn.Module):
    """Returns NaN for samples that carry a mark, as an overflow does, and something else for the others."""

    def forward(self, x: Tensor) -> Tensor:
        marked = (x.abs() >= MARK).any(dim=-1).any(dim=-1)
        return torch.where(marked[:, None, None], torch.nan, x)


class Breaking(tasks.Classifier):
    """The first sample of a replica carries the mark in one batch."""

    def __init__(self, replicas: int, marked: tuple[int, ...] = (0,)) -> None:
        super().__init__("adamw")
        self.net.insert(0, Breaks())
        self.marked = [row * replicas + 1 for row in marked]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == fault_tasks.START:
            batch[0][self.marked] = MARK


def plain(module: tasks.Classifier, **options: Any) -> dict[str, Tensor]:
    tasks.trainer("auto", 1, fault_tasks.STEPS, **options).fit(module, tasks.loader(8))
    return tasks.local_weights(module)


def assert_close(weights: dict[str, Tensor], expected: dict[str, Tensor], rename: Any = lambda name: name) -> None:
    for name, value in expected.items():
        assert (weights[rename(name)] - value).abs().max() <= 1e-5, name


@pytest.mark.parametrize("direction", ["activation", "both"])
def test_a_layer_that_returns_nan_in_one_step_is_left_out_of_every_stage(direction: Any) -> None:
    expected = plain(Without({fault_tasks.START: slice(0, None, 2)}))
    strategy, module = virtual(2, 2, response=ls.Response(audit_rate=None)), tasks.Classifier("adamw")
    injector = ls.AttackInjector("non_finite", workers=[(0, 1)], start_step=fault_tasks.START, direction=direction)
    run = tasks.trainer(strategy, 1, fault_tasks.STEPS, [injector])
    run.fit(module, tasks.loader(8))
    assert_close(tasks.local_weights(module), expected)
    assert strategy.ledger.flags[ls.Worker(0, 1)] == 2 and not strategy.ledger.banned
    assert float(run.callback_metrics["train_loss_step"]) > 0


@pytest.mark.parametrize("rate", [None, 1.0])
def test_a_module_that_returns_nan_by_itself_for_some_samples(rate: float | None) -> None:
    """The first micro-batch of replica 1: samples 1 and 3 of eight."""
    keep = torch.tensor([0, 2, 4, 5, 6, 7])
    expected = plain(Without({fault_tasks.START: keep}))
    strategy, module = virtual(3, 2, response=ls.Response(audit_rate=rate)), Breaking(2)
    tasks.trainer(strategy, 1, fault_tasks.STEPS).fit(module, tasks.loader(8))
    found = tasks.local_weights(module)
    assert fault_tasks.finite(found)
    assert all(one.feature != WEIGHT_GRADIENT for one in strategy.detections), "what was sent is not finite, either"
    if rate is None:
        # Whoever recomputes it gets NaN, too: then only what is not finite is left out, at the stages where it is.
        assert_close(found, expected, lambda name: f"net.{int(name.split('.')[1]) + 1}.{name.split('.', 2)[2]}")
    assert not strategy.ledger.banned


def test_a_step_in_which_nothing_is_left_does_nothing() -> None:
    strategy, module = virtual(2, 1, response=ls.Response(audit_rate=None)), tasks.Classifier("adamw")
    losses: list[float] = []

    class Losses(tasks.L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))

    before = tasks.local_weights(module)
    injector = ls.AttackInjector({"name": "non_finite", "steps": None}, workers=[(0, 0)], start_step=0, direction="activation")
    with pytest.warns(UserWarning, match="Some stage had no honest gradient"):
        tasks.trainer(strategy, 1, 2, [injector, Losses()]).fit(module, tasks.loader(8))
    assert_close(tasks.local_weights(module), before)
    assert all(map(fault_tasks.is_number, losses)) and strategy.step == 2


@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.05}])
def test_weight_gradients_that_are_not_finite_are_left_out_of_their_stage_and_told(clip: dict[str, Any]) -> None:
    """The other stages count the micro-batches, so a parameter of theirs gets what a plain run gives it, for one step."""
    strategy, module = virtual(2, 4, response=ls.Response(gradient_audit_rate=None)), tasks.Classifier("sgd")
    injector = ls.AttackInjector("gradient_contribution", workers=[(1, 2)], start_step=0)
    run = tasks.trainer(strategy, 1, 3, [injector], **clip)
    run.fit(module, tasks.loader(16))
    assert fault_tasks.finite(tasks.local_weights(module)) and not strategy.ledger.banned
    assert {(one.worker, one.feature) for one in strategy.detections} == {(ls.Worker(1, 2), WEIGHT_GRADIENT)}
    assert strategy.ledger.flags == {ls.Worker(1, 2): 6}
    assert fault_tasks.is_number(float(run.callback_metrics["train_loss_step"]))


def test_a_training_that_diverges_everywhere_is_nobodys_fault() -> None:
    strategy, module = virtual(2, 3), tasks.Classifier("sgd")
    workers = [(1, replica) for replica in range(3)]
    with pytest.warns(UserWarning, match="More than half the workers"):
        tasks.trainer(strategy, 1, 2, [ls.AttackInjector("gradient_contribution", workers=workers, start_step=0)]).fit(
            module, tasks.loader(12)
        )
    assert not strategy.detections and fault_tasks.finite(tasks.local_weights(module))


@pytest.mark.parametrize(
    "attack", [{"name": "non_finite", "steps": None}, "bad_rows", {"name": "bit_flip", "bit": 2, "count": 4}, "wrong_address"]
)
@pytest.mark.parametrize("direction", ["activation", "gradient"])
def test_audits_find_whose_layers_compute_something_else(attack: Any, direction: Any) -> None:
    expected = plain(tasks.Classifier("adamw"))
    strategy, module = virtual(3, 4, response=ls.Response(audit_rate=1.0)), tasks.Classifier("adamw")
    injector = ls.AttackInjector(attack, workers=[(1, 1)], start_step=2, direction=direction)
    tasks.trainer(strategy, 1, fault_tasks.STEPS, [injector]).fit(module, tasks.loader(8))
    assert strategy.ledger.banned == {ls.Worker(1, 1)}
    assert_close(tasks.local_weights(module), expected)


@pytest.mark.parametrize(
    ("attack", "seen"),
    [
        ({"name": "bit_flip", "bit": 0, "phase": "forward"}, {"activation", "gradient", "weights"}),
        ({"name": "bit_flip", "bit": 0, "phase": "backward_input"}, {"gradient", "weights"}),
        ({"name": "bit_flip", "bit": 0, "phase": "backward_weight"}, {"weights"}),
        ({"name": "gradient_contribution", "factor": 2.0}, {"weights"}),
        ("gradient_steering", {"weights"}),
        ("own_weights", {"activation", "gradient", "weights"}),
        ("sign", {"activation", "gradient"}),
    ],
)
@pytest.mark.parametrize("rate", [None, 1.0])
def test_a_witness_is_told_what_was_made_and_what_should_have_been(attack: Any, seen: set[str], rate: float | None) -> None:
    """Whether or not there are audits, which compare the same signals."""
    told: dict[str, set[tuple[ls.Worker, int, int]]] = {}
    strategy, module = virtual(3, 3, response=ls.Response(audit_rate=rate, ban_after=None)), tasks.Classifier("sgd")

    def witness(worker: ls.Worker, made: str, step: int, micro_batch: int, found: Tensor, honest: Tensor) -> None:
        assert found.shape == honest.shape and found.dtype == honest.dtype
        if not torch.equal(found, honest):
            told.setdefault(made, set()).add((worker, step, micro_batch))

    class Witnesses(tasks.L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            strategy.adversary.witness = witness

    injector = ls.AttackInjector(attack, workers=[(1, 1)], start_step=1)
    tasks.trainer(strategy, 1, 3, [injector, Witnesses()]).fit(module, tasks.loader(6))
    assert set(told) == seen
    assert all(places <= {(ls.Worker(1, 1), step, slot) for step in (1, 2) for slot in (0, 1)} for places in told.values())


def test_audits_find_who_corrupts_weight_gradients() -> None:
    fault_tasks.check_corrupted(fault_tasks.corrupted(3, 4, "virtual"), 3, 4)


def test_audits_find_a_processor_that_multiplies_wrongly_for_weight_gradients_alone() -> None:
    """Its step is done again without it: the weights are those of a run in which nobody is broken."""
    broken = ls.AttackInjector({"name": "bit_flip", "bit": 1, "phase": "backward_weight"}, workers=[(1, 1)], start_step=1)
    weights = []
    for injectors in ([broken], []):
        strategy, module = virtual(3, 5, response=ls.Response(gradient_audit_rate=1.0)), tasks.Classifier("adamw")
        tasks.trainer(strategy, 1, 3, injectors).fit(module, tasks.loader(10))
        assert strategy.ledger.banned_at == ({ls.Worker(1, 1): 1} if injectors else {})
        found = {(one.step, one.worker, one.feature) for one in strategy.detections if one.confirmed}
        assert found == ({(1, ls.Worker(1, 1), WEIGHT_GRADIENT)} if injectors else set())
        weights.append(tasks.local_weights(module))
    assert_close(*weights)


class Counts(tasks.Classifier):
    """Has a BatchNorm in the last stage, and metrics that add up and that keep what they saw."""

    def __init__(self) -> None:
        super().__init__("sgd")
        self.net.insert(6, nn.BatchNorm1d(16))
        self.mean, self.seen = MeanMetric(), CatMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.mean.update(batch[1].float())
        self.seen.update(batch[1].float())
        return loss


def test_statistics_and_metrics_do_not_see_what_is_left_out() -> None:
    """One worker of the first stage sends NaN: the last stage works on a stand-in, which must not count."""
    module, alone = Counts(), Counts()
    strategy = virtual(2, 2, response=ls.Response(audit_rate=None))
    injector = ls.AttackInjector({"name": "non_finite"}, workers=[(0, 1)], start_step=1, direction="activation")
    tasks.trainer(strategy, 1, 3, [injector]).fit(module, tasks.loader(8))
    tasks.trainer(virtual(2, 2), 1, 3).fit(alone, tasks.loader(8))
    labels = tasks.tokens().tensors[1][:24].float()
    kept = torch.cat((labels[:8], labels[8:16:2], labels[16:24]))
    assert sorted(module.seen.compute().tolist()) == sorted(kept.tolist())
    assert float(module.mean.compute()) == pytest.approx(float(kept.mean()))
    # From the step on in which a worker fails replicas go one by one: of that step the other's two count, and then all four.
    assert int(alone.net[6].num_batches_tracked) == 2 + 2 + 2
    assert int(module.net[6].num_batches_tracked) == 2 + 2 + 4
    assert all(bool(buffer.isfinite().all()) for buffer in module.buffers())
