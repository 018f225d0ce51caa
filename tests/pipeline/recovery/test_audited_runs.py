"""Runs with audits, from end to end: the whole mesh in one process, liars found by recomputation, steps done again without them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchmetrics
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

import lightning_sentinel as ls
from lightning_sentinel.attacks import AttackContext
from lightning_sentinel.wiring import Wiring
from tests.distributed import tasks
from tests.pipeline.recovery.audited import (
    ATTACKS,
    BATCH,
    LIARS,
    MICRO_BATCHES,
    REPLICAS,
    SIGNALS,
    START,
    Run,
    assert_same_weights,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


@pytest.fixture(scope="module")
def clean() -> Run:
    torch.manual_seed(5)
    return Run()


@pytest.fixture(scope="module")
def loud() -> Run:
    torch.manual_seed(5)
    return Run(ATTACKS["loud"], LIARS)


@pytest.mark.parametrize("name", ATTACKS)
def test_liars_are_banned_in_their_first_step_and_no_weight_has_seen_what_they_sent(name: str, clean: Run, loud: Run) -> None:
    run = loud if name == "loud" else Run(ATTACKS[name], LIARS)
    assert run.ledger.banned_at == dict.fromkeys(LIARS, START)
    assert_same_weights(clean, run)
    assert run.attempts.steps == [*range(START), START, START, *range(START + 1, START + 3)]
    # Their work is dealt to the others, so that nothing of the data is lost.
    assert run.strategy.wiring == Wiring.of(run.strategy.mesh, set(LIARS), MICRO_BATCHES)
    confirmed = {(d.worker, d.step) for d in run.strategy.detections if d.confirmed}
    assert confirmed == {(liar, START) for liar in LIARS}


def test_metrics_are_logged_once_for_a_step_that_is_done_twice(clean: Run, loud: Run) -> None:
    for name in ("train_loss", "train_loss_step", "train_loss_epoch", "train_accuracy"):
        if name in clean.trainer.callback_metrics:
            torch.testing.assert_close(
                loud.trainer.callback_metrics[name], clean.trainer.callback_metrics[name], rtol=1e-5, atol=1e-5
            )
    assert loud.strategy.step == clean.strategy.step == START + 3 == loud.trainer.global_step
    assert float(loud.trainer.callback_metrics["sentinel/audits"]) == loud.ledger.audits
    assert float(loud.trainer.callback_metrics["sentinel/banned"]) == len(LIARS)


def test_what_was_learned_is_that_of_the_clean_run(clean: Run, loud: Run) -> None:
    state, attacked = (run.strategy._run.guard.state_dict() for run in (clean, loud))
    assert state.keys() == attacked.keys()
    # All but what is known of single workers: some have done a banned one's work.
    single = "/last", "/drift", "/recent", ".workers", ".deviations", ".before", ".scale", ".usual"
    for name, value in ((name, value) for name, value in state.items() if not name.endswith(single)):
        torch.testing.assert_close(attacked[name], value, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_a_rate_of_one_audits_every_signal_of_a_step_once(clean: Run) -> None:
    assert all(audited.all() for audited in clean.attempts.audited)
    assert clean.ledger.audits == (START + 3) * SIGNALS
    assert not clean.ledger.banned and not clean.ledger.total_flags


def test_a_rate_of_one_audits_every_signal_of_every_attempt() -> None:
    run = Run(ATTACKS["hardly noticeable"], [ls.Worker(1, 0)])
    assert run.attempts.steps.count(START) == 2
    again = run.attempts.audited[START + 1]
    assert again.all()


def test_a_liar_behind_a_liar_is_found_in_the_same_step(clean: Run) -> None:
    # What is behind a lie tells nothing; the step that is done again without the first liar does.
    liars = [ls.Worker(0, 1), ls.Worker(1, 1), ls.Worker(1, 2)]
    run = Run(ATTACKS["hardly noticeable"], liars)
    assert run.attempts.steps.count(START) == 3
    # With one of five banned, a second of the stage is banned when it is found again.
    assert run.ledger.banned_at == {liars[0]: START, liars[1]: START + 1, liars[2]: START}
    assert_same_weights(clean, run)


def test_a_lower_rate_finds_liars_soon() -> None:
    run = Run(ATTACKS["hardly noticeable"], LIARS, rate=0.05, steps=START + 10)
    assert run.ledger.banned == set(LIARS)
    assert run.ledger.audits < 0.7 * (START + 10) * SIGNALS


def test_a_run_that_only_reports_bans_nobody_and_does_nothing_again() -> None:
    run = Run(ATTACKS["loud"], LIARS, response={"on_flag": "log", "ban_after": None})
    assert not run.ledger.banned and run.attempts.steps == list(range(START + 3))
    assert {d.worker for d in run.strategy.detections if d.confirmed} == set(LIARS)
    assert {d.step for d in run.strategy.detections} == set(range(START, START + 3))
    without = Run(ATTACKS["loud"], LIARS, rate=None, response={"on_flag": "log", "ban_after": None})
    assert_same_weights(without, run, tolerance=0.0)


def test_an_odd_batch_is_exonerated_and_bans_nobody() -> None:
    class Odd(tasks.Classifier):
        """In one step the data of one replica is much larger than usual."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, labels = batch
            if self.trainer.strategy.step >= warmup + 4:  # type: ignore[attr-defined]
                inputs = torch.where(self.first[: len(inputs), None, None], 30.0, 1.0) * inputs
            return super().training_step((inputs, labels), batch_idx)

        first = torch.tensor([True] + [False] * (BATCH - 1))

    warmup = 20
    run = Run(module=Odd("sgd"), rate=1e-6, warmup=warmup, steps=warmup + 5)
    assert not run.ledger.banned and run.ledger.total_flags == 0
    assert run.ledger.exonerated.total() == len(run.strategy.detections) > 0
    assert {(d.audited, d.confirmed) for d in run.strategy.detections} == {(True, False)}
    assert run.attempts.steps == list(range(warmup + 5))


def test_a_whole_stage_of_liars_costs_batches_and_not_the_run() -> None:
    liars = [ls.Worker(1, replica) for replica in range(REPLICAS)]
    with pytest.warns(UserWarning) as told:
        run = Run(ATTACKS["loud"], liars)
    untouched = Run(steps=START)
    assert_same_weights(untouched, run, tolerance=0.0)
    assert len(run.ledger.banned) == 2 and run.trainer.global_step == START + 3
    sentences = [str(one.message) for one in told]
    assert sum(f"Step {START} could not be done again" in sentence for sentence in sentences) == 1
    assert sum("would be banned at step" in sentence for sentence in sentences) == 1


def test_jurors_that_lie_have_nobody_else_banned_and_cover_for_nobody(clean: Run, capsys: pytest.CaptureFixture[str]) -> None:
    accuse = Run("false_votes", LIARS)
    # They are banned in the third step in which most refute them, the last one of this run, which is not done again.
    assert accuse.ledger.banned_at == dict.fromkeys(LIARS, START + 2) and accuse.attempts.steps == [*range(START + 3)]
    assert_same_weights(clean, accuse, tolerance=0.0)
    says = f"Banned {LIARS[0]} at step {START + 2}: in 3 steps it said of others the opposite of what most of its stage recomputed"
    assert says in capsys.readouterr().out
    forgiving = Run("false_votes", LIARS, response={"false_accusations": None})
    assert not forgiving.ledger.banned and forgiving.ledger.muted == dict.fromkeys(LIARS, START)
    assert_same_weights(clean, forgiving, tolerance=0.0)
    cover = Run(ls.attacks.get("several", attacks=[ATTACKS["hardly noticeable"], "false_votes"]), LIARS)
    assert cover.ledger.banned == set(LIARS)
    assert_same_weights(clean, cover)


# --- What a step that is done again finds as it was


class Dropout(tasks.Classifier):
    """Draws random numbers in every stage."""

    def __init__(self) -> None:
        super().__init__("adamw")
        layers = [layer for block in self.net for layer in (block, nn.Dropout(0.3))]
        self.net = nn.Sequential(*layers[:-1])


class Normalised(tasks.Classifier):
    """Keeps statistics. A bias before a BatchNorm has a gradient of rounding errors, which Adam would blow up."""

    def __init__(self) -> None:
        super().__init__("sgd")
        layers = list(self.net)
        for place in (4, 2, 1):
            layers.insert(place, OverTokens(16))
        self.net = nn.Sequential(*layers)


class OverTokens(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("make", [Dropout, Normalised])
def test_random_numbers_and_statistics_are_those_of_a_run_without_liars(make: Any) -> None:
    runs = [Run(attack, LIARS, module=make()) for attack in (None, ATTACKS["loud"])]
    assert runs[1].attempts.steps.count(START) == 2 and runs[1].ledger.banned == set(LIARS)
    assert_same_weights(*runs)
    if make is Normalised:
        counts = {name: int(value) for name, value in runs[1].weights.items() if name.endswith("num_batches_tracked")}
        assert len(counts) == 3 and set(counts.values()) == {(START + 3) * MICRO_BATCHES}


class Counting(tasks.Classifier):
    """Updates a torchmetrics object in its training step."""

    def __init__(self) -> None:
        super().__init__("sgd")
        self.samples = torchmetrics.SumMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.samples.update(len(batch[0]))
        return loss


def test_metrics_count_a_step_that_is_done_again_once() -> None:
    runs = [Run(attack, LIARS, module=Counting()) for attack in (None, ATTACKS["loud"])]
    assert runs[1].attempts.steps.count(START) == 2
    assert [run.module.samples.compute() for run in runs] == [(START + 3) * BATCH] * 2


class Talking(tasks.Classifier):
    """Keeps things, and tells loggers by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.seen, self.many, self.told = 0, [], list(range(70_000)), []
        self.register_buffer("total", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        self.total += 1.0
        self.seen.append(batch_idx)
        self.many.append(batch_idx)
        self.logger.log_metrics({"direct": float(batch_idx)}, step=self.trainer.global_step)
        return super().training_step(batch, batch_idx)

    def on_sentinel_detection(self, trainer: L.Trainer, pl_module: L.LightningModule, detection: ls.Detection) -> None:
        self.told.append(detection)


class Remembering(DummyLogger):
    """Keeps what it is told directly."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "direct" in metrics:
            self.told.append((step, metrics))


def test_what_steps_keep_and_tell_loggers_counts_once_in_a_step_that_is_done_again() -> None:
    loggers = [Remembering(), Remembering()]
    honest, attacked = (
        Run(attack, LIARS, module=Talking(), logger=logger) for attack, logger in zip((None, ATTACKS["loud"]), loggers)
    )
    assert attacked.attempts.steps.count(START) == 2
    assert loggers[0].told == loggers[1].told and len(loggers[0].told) == honest.module.steps > 0
    for name in ("steps", "seen", "many", "total"):
        assert getattr(attacked.module, name) == getattr(honest.module, name), name
    # What listeners keep about the liars is not undone.
    assert {d.worker for d in attacked.module.told} == set(LIARS)


@pytest.fixture(scope="module")
def accumulated() -> Run:
    torch.manual_seed(5)
    return Run(steps=4, accumulate_grad_batches=2)


@pytest.mark.parametrize("factor", [50.0, math.nan])
@pytest.mark.parametrize("first_lie", [START, START + 1])
def test_gradients_of_earlier_batches_survive_a_batch_that_is_done_again(first_lie: int, factor: float, accumulated: Run) -> None:
    # Batches are accumulated in pairs: 2 and 3, 4 and 5. A redo in the second of a pair keeps the first one's gradients. NaN makes
    # the gradients useless too, for which the batch is done again before it is for the liars.
    def lies(signal: Tensor, context: AttackContext) -> Tensor:
        return factor * signal if context.step >= first_lie else signal

    run = Run(lies, LIARS, steps=4, accumulate_grad_batches=2)
    assert run.ledger.banned_at == dict.fromkeys(LIARS, first_lie)
    assert run.attempts.steps == sorted([*range(8), first_lie])
    assert_same_weights(accumulated, run)


# --- Checkpoints


@pytest.mark.parametrize(
    ("rate", "first_lie", "warmup"),
    [(0.13, 3, 100), (0.13, 4, 100), (0.13, 9, 100), (1.0, 9, 100), (0.13, 9, 6)],
)
def test_a_run_that_is_resumed_is_the_run_in_one_go(rate: float, first_lie: int, warmup: int, tmp_path: Path) -> None:
    # Epochs have four steps, and the first run two of them.
    def lies(signal: Tensor, context: AttackContext) -> Tensor:
        return 50 * signal if context.step >= first_lie else signal

    def run(epochs: int, source: Path | None = None) -> Run:
        return Run(lies, LIARS, rate=rate, warmup=warmup, steps=-1, batches=4, max_epochs=epochs, ckpt_path=source)

    whole, first = run(3), run(2)
    first.trainer.save_checkpoint(tmp_path / "first.ckpt")
    second = run(3, tmp_path / "first.ckpt")
    assert whole.strategy.step == second.strategy.step == 12
    assert set(whole.ledger.banned_at) == set(LIARS)
    assert whole.ledger == second.ledger
    attempts = [*first.attempts.audited, *second.attempts.audited]
    assert len(attempts) == len(whole.attempts.audited)
    assert all(torch.equal(one, other) for one, other in zip(whole.attempts.audited, attempts))
    assert_same_weights(whole, second, tolerance=0.0)
    states = [one.strategy._run.guard.state_dict() for one in (whole, second)]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=0, equal_nan=True, msg=name)
