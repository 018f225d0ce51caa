"""The faults of docs/reliability.md, in real processes; test_failures.py has the others."""

from __future__ import annotations

import os
import signal as signals
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import lightning_sentinel as ls
from lightning_sentinel.mesh import Boundary, Direction, Mesh
from lightning_sentinel.pipeline.messages.headers import MessageId, encode
from tests.distributed import tasks, world

MESH = Mesh(stages=2, replicas=2)
PATIENCE = timedelta(seconds=10)
BATCH = 2
"""When it happens."""

STRAY: list[Any] = []
"""What must live until it was sent."""

Send = Callable[[Tensor, Tensor, int, MessageId, int], None]


def strategy(**options: Any) -> ls.SentinelStrategy:
    return ls.SentinelStrategy(stages=2, replicas=2, micro_batches=2, timeout=PATIENCE, **options)


# ------------------------------------------------------------------------------------------------------------ what is sent wrongly


def as_messages(send: Send, *what: Any) -> list[Tensor]:
    """As the transport of this rank would send it: header and elements in one, or one behind the other."""
    return send.__self__._messages(*what)  # type: ignore[attr-defined]


def send_other_shape(send: Send, signal: Tensor, tainted: Tensor, rank: int, message_id: MessageId, number: int) -> None:
    send(signal[..., :-1], tainted, rank, message_id, number)


def send_huge_shape(send: Send, signal: Tensor, tainted: Tensor, rank: int, message_id: MessageId, number: int) -> None:
    dist.send(encode(message_id, (2**31, 2**31), signal.dtype), rank)


def send_other_dtype(send: Send, signal: Tensor, tainted: Tensor, rank: int, message_id: MessageId, number: int) -> None:
    send(signal.double(), tainted, rank, message_id, number)


def send_twice(send: Send, signal: Tensor, tainted: Tensor, rank: int, message_id: MessageId, number: int) -> None:
    # Without waiting until it is taken: nobody takes the second of the last step that is listened to.
    for _ in range(2):
        STRAY.extend((dist.isend(one, rank), one) for one in as_messages(send, signal, tainted, rank, message_id, number))


def send_early(send: Send, signal: Tensor, tainted: Tensor, rank: int, message_id: MessageId, number: int) -> None:
    send(signal, tainted, rank, replace(message_id, slot=message_id.slot + 1), number)


def send_late(send: Send, signal: Tensor, tainted: Tensor, rank: int, message_id: MessageId, number: int) -> None:
    send(signal, tainted, rank, replace(message_id, step=message_id.step - 1), number)


def send_too_little(send: Send, signal: Tensor, tainted: Tensor, rank: int, message_id: MessageId, number: int) -> None:
    *header, elements = as_messages(send, signal, tainted, rank, message_id, number)
    for one in (*header, elements[: -4 * signal.element_size() if elements.dtype == torch.uint8 else -4].clone()):
        dist.send(one, rank)


def send_too_much(send: Send, signal: Tensor, tainted: Tensor, rank: int, message_id: MessageId, number: int) -> None:
    *header, elements = as_messages(send, signal, tainted, rank, message_id, number)
    for one in (*header, torch.cat((elements, torch.zeros(10 * elements.numel(), dtype=elements.dtype)))):
        dist.send(one, rank)


def send_slowly(send: Send, signal: Tensor, tainted: Tensor, rank: int, message_id: MessageId, number: int) -> None:
    threading.Event().wait(3 * PATIENCE.total_seconds())
    send(signal, tainted, rank, message_id, number)


def send_untainted(send: Send, signal: Tensor, tainted: Tensor, rank: int, message_id: MessageId, number: int) -> None:
    send(signal, torch.zeros_like(tainted), rank, message_id, number)


class Sends(L.Callback):
    """From one batch on, one rank sends wrongly."""

    def __init__(self, how: Any, by: int, since: int = BATCH) -> None:
        self.how, self.by, self.since = how, by, since

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.strategy.step == self.since and trainer.global_rank == self.by:
            transport = trainer.strategy._run.engine._boundaries._transport
            transport.send = partial(self.how, transport.send)


def fit(*callbacks: L.Callback, **options: Any) -> None:
    tasks.trainer(strategy(**options), 4, 6, callbacks).fit(tasks.Classifier(), tasks.loader(4, 2))


def fit_sending(how: Any, by: int, options: dict[str, Any]) -> None:
    fit(Sends(how, by), **options)


WARMUP = 16
BAN_AFTER = 5
FLAGS = ls.Response(audit_rate=None)
# Fences that take no more values than there are in so short a warm-up.
VERIFICATION = ls.Verification(warmup_steps=WARMUP, false_positive_rate=0.05, seed=0)
BEGIN = WARMUP + 2
"""The first batch of which something is sent wrongly, where the run is to go on."""

MALFORMED = {
    "gradient: another shape": (send_other_shape, 1),
    "activation: another shape": (send_other_shape, 3),
    "gradient: another dtype": (send_other_dtype, 1),
    "activation: another dtype": (send_other_dtype, 3),
    "gradient: early": (send_early, 1),
    "gradient: late, from rank zero": (send_late, 0),
    "activation: late, to rank zero": (send_late, 2),
    "gradient: fewer elements than announced": (send_too_little, 1),
    "activation: fewer elements than announced": (send_too_little, 3),
    # The last, because what is sent a second time in the last step that it is listened to stays on the wire.
    "gradient: twice": (send_twice, 1),
}


def warmed_up(directory: Path) -> Path:
    """A checkpoint of a clean run at the end of the warm-up, from which all cases go on."""
    path = directory / "warm.ckpt"
    run = tasks.trainer(strategy(verification=VERIFICATION, response=FLAGS), 4, WARMUP)
    run.fit(tasks.Classifier(), tasks.loader(6, 2))
    run.save_checkpoint(path)
    return path


def fit_on(warm: Path, *callbacks: L.Callback) -> tuple[dict[ls.Worker, int], set[str], bool]:
    """Who was banned and when, what was found, and whether the weights are finite."""
    ours, module = strategy(verification=VERIFICATION, response=FLAGS), tasks.Classifier()
    tasks.trainer(ours, 4, WARMUP + 9, callbacks).fit(module, tasks.loader(6, 2), ckpt_path=warm)
    finite = all(bool(value.isfinite().all()) for value in module.state_dict().values())
    return dict(ours.ledger.banned_at), {one.feature for one in ours.detections}, finite


def fit_malformed(directory: Path) -> dict[str, Any]:
    found, warm = {}, warmed_up(directory)
    for what, (how, sender) in MALFORMED.items():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            result = fit_on(warm, Sends(how, sender, BEGIN))
        told = [str(one.message) for one in said if "counts as a signal that is not finite" in str(one.message)]
        found[what] = *result, told
    return found


def test_a_malformed_message_is_what_its_sender_answers_for(tmp_path: Path) -> None:
    everyone = world.run(fit_malformed, 4, tmp_path, timeout=100)
    for rank, found in enumerate(everyone):
        for what, (_, sender) in MALFORMED.items():
            banned, features, finite, told = found[what]
            assert set(banned) == {MESH.worker(sender)}, (what, banned)
            assert max(banned.values()) <= BEGIN + BAN_AFTER - 1, (what, banned)
            assert "non_finite" in features, what
            assert finite, what
            # Whoever serves its lane of those of the other stage: where one is out of line by chance workers are shuffled.
            receives = rank // 2 != sender // 2
            assert len(told) <= receives, (what, told)
            assert all(f"Rank {sender} sent" in line for line in told), told
    for what in MALFORMED:
        assert any(found[what][3] for found in everyone), what


def fit_audited_to_the_end(how: Any) -> dict[str, Any]:
    response = ls.Response(audit_rate=0.05)
    ours, module = strategy(verification=VERIFICATION, response=response), tasks.Classifier()
    callbacks = [Sends(how, 1, BEGIN)] if how is not None else []
    tasks.trainer(ours, 4, WARMUP + 8, callbacks).fit(module, tasks.loader(6, 2))
    return {"banned": dict(ours.ledger.banned_at), "weights": tasks.local_weights(module)}


def fit_audited() -> dict[str, Any]:
    return {"clean": fit_audited_to_the_end(None), "malformed": fit_audited_to_the_end(send_other_shape)}


def test_with_audits_a_malformed_message_costs_nothing() -> None:
    """Its step is done again without its sender, whose work is done by others: the weights are those of a clean run.

    Of two workers nobody can tell which one is wrong, so nobody is banned.
    """
    for found in world.run(fit_audited, 4, timeout=60):
        assert found["clean"]["banned"] == {}
        assert found["malformed"]["banned"] == {}
        for name, value in found["clean"]["weights"].items():
            torch.testing.assert_close(found["malformed"]["weights"][name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("how", "sender", "receiver", "why", "options"),
    [
        (send_huge_shape, 1, 3, "announces shape (2147483648, 2147483648)", {}),
        (send_huge_shape, 3, 1, "announces sizes [2147483648, 2147483648], and there is memory for", {}),
        # Rank zero takes the store with it, in which the others read what happened.
        (send_huge_shape, 2, 0, "announces sizes [2147483648, 2147483648], and there is memory for", {}),
        (send_late, 1, 3, "is a duplicate or late: the gradient of step 2, micro-batch 0", {"verification": None}),
    ],
    ids=["huge gradient", "huge activation", "to rank zero", "in a plain pipeline"],
)
def test_a_message_that_cannot_be_taken_ends_the_run(how: Any, sender: int, receiver: int, why: str, options: Any) -> None:
    results, failures = world.outcomes(fit_sending, 4, how, sender, options, timeout=40)
    assert not results
    assert set(failures) == {0, 1, 2, 3}
    guilty = f"rank {sender}, {MESH.worker(sender)}, sent a malformed message"
    for rank, failure in failures.items():
        assert why in failure.message, failure.message
        if rank == receiver:
            assert failure.kind == "MalformedMessageError"
            assert f"Rank {sender} sent a malformed message" in failure.message
        else:
            assert failure.kind == "WorkerLostError"
            assert guilty in failure.message, failure.message


def test_a_longer_message_ends_its_receiver() -> None:
    """No Python code can catch that gloo aborts, so the others can name the victim only."""
    results, failures = world.outcomes(fit_sending, 4, send_too_much, 1, {}, timeout=40, answers=3)
    assert not results
    assert set(failures) == {0, 1, 2}
    for failure in failures.values():
        assert failure.kind == "WorkerLostError"
        assert "rank 3, worker (stage 0, replica 1)" in failure.message, failure.message


def test_a_slow_sender_is_named() -> None:
    results, failures = world.outcomes(fit_sending, 4, send_slowly, 1, {}, timeout=50, answers=3)
    assert not results
    assert set(failures) == {0, 2, 3}
    for failure in failures.values():
        assert failure.kind == "WorkerLostError"
        assert "rank 1, worker (stage 1, replica 1)" in failure.message, failure.message
        assert "a larger SentinelStrategy(timeout=...) helps" in failure.message


# ------------------------------------------------------------------------------------------------------------- who plans otherwise


class PlansOtherwise(L.Callback):
    """One rank alone draws other random numbers from one batch on."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == BATCH and trainer.global_rank == 2:
            trainer.strategy._run.seed += 1  # type: ignore[attr-defined]


def fit_planning_otherwise() -> None:
    fit(PlansOtherwise())


def test_a_rank_with_another_plan_is_named_by_all() -> None:
    results, failures = world.outcomes(fit_planning_otherwise, 4, timeout=40)
    assert not results and set(failures) == {0, 1, 2, 3}
    for failure in failures.values():
        assert failure.kind == "PlanMismatchError"
        assert f"Ranks disagree on who does what in training_step {BATCH}: another plan than most have rank 2" in failure.message


# ------------------------------------------------------------------------------------------------------------------ who is killed


class Kills(L.Callback):
    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == BATCH and trainer.global_rank in self.ranks:
            os.kill(os.getpid(), signals.SIGKILL)


def fit_and_kill(*ranks: int) -> None:
    fit(Kills(ranks))


@pytest.mark.parametrize("killed", [(0,), (2, 3)])
def test_killed_ranks_are_named(killed: tuple[int, ...]) -> None:
    results, failures = world.outcomes(fit_and_kill, 4, *killed, timeout=40, answers=4 - len(killed))
    assert not results
    assert set(failures) == {0, 1, 2, 3} - set(killed)
    for failure in failures.values():
        assert failure.kind == "WorkerLostError"
        assert any(f"rank {rank}, worker" in failure.message for rank in killed), failure.message
        assert not any(f"rank {rank}, worker" in failure.message for rank in failures), failure.message
    assert len({failure.message for failure in failures.values()}) == 1, "ranks disagree"


# ------------------------------------------------------------------------------------------------------- signals that are no good


def nan(signal: Tensor, context: Any) -> Tensor:
    return torch.full_like(signal, torch.nan)


def infinite(signal: Tensor, context: Any) -> Tensor:
    return torch.full_like(signal, torch.inf)


def zeros(signal: Tensor, context: Any) -> Tensor:
    return torch.zeros_like(signal)


def fit_attacked(directory: Path) -> dict[str, Any]:
    found, warm = {}, warmed_up(directory)
    for attack in (nan, infinite, zeros):
        for worker in (ls.Worker(0, 1), ls.Worker(1, 1)):
            injector = ls.AttackInjector(attack, workers=[worker], start_step=WARMUP + 2)
            banned, _, finite = fit_on(warm, injector)
            found[f"{attack.__name__} by {worker}"] = worker, banned, finite
    return found


def test_bad_signals_do_not_reach_the_weights(tmp_path: Path) -> None:
    for found in world.run(fit_attacked, 4, tmp_path, timeout=80):
        for what, (worker, banned, finite) in found.items():
            assert set(banned) == {worker}, what
            assert banned[worker] <= WARMUP + 2 + 5, what
            assert finite, what


class Watches(L.Callback):
    """What the verifiers of the second boundary saw, step by step: tainted and flagged micro-batches."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        ours: Any = trainer.strategy
        at = ours.mesh.boundaries.index(Boundary(1, Direction.ACTIVATION))
        self.seen.append((int(ours.table.tainted[at].sum()), int(ours.table.flagged[at].sum())))


def fit_losing_taints() -> tuple[Any, bool, list[tuple[int, int]]]:
    ours, module = (
        ls.SentinelStrategy(3, 2, 2, VERIFICATION, FLAGS, timeout=PATIENCE),
        tasks.Classifier(),
    )
    attack = ls.AttackInjector(zeros, workers=[ls.Worker(0, 1)], direction="activation", start_step=WARMUP)
    watches = Watches()
    tasks.trainer(ours, 6, WARMUP + 10, [attack, Sends(send_untainted, by=3), watches]).fit(module, tasks.loader(6, 2))
    finite = all(bool(value.isfinite().all()) for value in module.state_dict().values())
    return dict(ours.ledger.banned_at), finite, watches.seen[WARMUP : WARMUP + 5]


def test_a_lost_taint_does_not_hide_the_liar() -> None:
    for banned, finite, seen in world.run(fit_losing_taints, 6, timeout=80):
        assert set(banned) == {ls.Worker(0, 1)}
        # A little later than after five steps where the other of the stage is out of line by chance.
        assert banned[ls.Worker(0, 1)] <= WARMUP + 8
        assert finite
        # Who takes no taint away is behind the liar now and then, because while it is a suspect workers are shuffled.
        assert seen[0] == (0, 2) and all(tainted + flagged >= 2 for tainted, flagged in seen), "both micro-batches of each step"
