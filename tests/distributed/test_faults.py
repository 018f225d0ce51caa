"""The faults of docs/reliability.md, in real processes; test_failures.py has the others."""

from __future__ import annotations

import itertools
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
from lightning_sentinel.trust.verify_evidence import verify_evidence
from tests.distributed import tasks, world

MESH = Mesh(stages=2, replicas=2)
PATIENCE = timedelta(seconds=10)
SHORT = timedelta(seconds=4)
"""Where it is waited for."""
BATCH = 2
"""When it happens."""

STRAY: list[Any] = []
"""What must live until it was sent."""

Send = Callable[[Tensor, Tensor, int, MessageId, int], None]


def strategy(**options: Any) -> ls.SentinelStrategy:
    return ls.SentinelStrategy(**{"stages": 2, "replicas": 2, "micro_batches": 2, "timeout": PATIENCE} | options)


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
    threading.Event().wait(5 * SHORT.total_seconds())
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
BAN_AFTER = 3
FLAGS = ls.Response(audit_rate=None, ban_after=BAN_AFTER)
# Fences that take no more values than there are in so short a warm-up.
VERIFICATION = ls.Verification(warmup_steps=WARMUP, false_positive_rate=0.05, seed=0)
BEGIN = WARMUP + 2
"""The first batch of which something is sent wrongly, where the run is to go on."""


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return warmed_up(tmp_path_factory.mktemp("warm"))


def warmed_up(directory: Path, stages: int = 2) -> Path:
    """A checkpoint of a clean run at the end of the warm-up, from which all cases go on: of the virtual mesh, which is cheaper."""
    path = directory / "warm.ckpt"
    ours = strategy(stages=stages, engine="virtual", verification=VERIFICATION, response=FLAGS)
    run = tasks.trainer(ours, 1, WARMUP)
    run.fit(tasks.Classifier(), tasks.loader(12))
    run.save_checkpoint(path)
    return path


MALFORMED: list[dict[str, tuple[Any, int]]] = [
    {"activation: another shape": (send_other_shape, 3), "gradient: another shape": (send_other_shape, 1)},
    {"activation: another dtype": (send_other_dtype, 3), "gradient: another dtype": (send_other_dtype, 1)},
    {"activation: late, to rank zero": (send_late, 2), "gradient: late, from rank zero": (send_late, 0)},
    {"activation: fewer elements than announced": (send_too_little, 3), "gradient: early": (send_early, 1)},
    {"gradient: fewer elements than announced": (send_too_little, 1)},
    # The last, because what is sent a second time in the last step that it is listened to stays on the wire.
    {"gradient: twice": (send_twice, 1)},
]
"""Of each run who sends what: the second begins after the first, of the other stage, is banned."""


def begins(runs: dict[str, Any]) -> dict[str, int]:
    return {what: BEGIN + (BAN_AFTER + 1) * number for number, what in enumerate(runs)}


def fit_malformed(warm: Path) -> list[Any]:
    """Of each run who was banned and when, what was found of whom, whether the weights are finite, and what was said."""
    found = []
    for cases in MALFORMED:
        senders = [Sends(how, sender, begins(cases)[what]) for what, (how, sender) in cases.items()]
        ours, module = strategy(verification=VERIFICATION, response=FLAGS), tasks.Classifier()
        run = tasks.trainer(ours, 4, max(begins(cases).values()) + BAN_AFTER + 1, senders)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run.fit(module, tasks.loader(6, 2), ckpt_path=warm)
        told = [str(one.message) for one in said if "counts as a signal that is not finite" in str(one.message)]
        features = {(one.worker, one.feature) for one in ours.detections}
        shown = {worker: verify_evidence(one) for worker, one in ours.evidence.items()}
        said_of = {worker: (findings.holds, findings.proves, findings.verdict) for worker, findings in shown.items()}
        found.append((dict(ours.ledger.banned_at), features, finite(module), told, said_of))
    return found


def finite(module: L.LightningModule) -> bool:
    return all(bool(value.isfinite().all()) for value in module.state_dict().values())


def test_a_malformed_message_is_what_its_sender_answers_for(warm: Path) -> None:
    everyone = world.run(fit_malformed, 4, warm, timeout=100)
    for number, cases in enumerate(MALFORMED):
        heard: set[int] = set()
        for rank, found in enumerate(everyone):
            banned, features, sound, told, said_of = found[number]
            assert set(said_of) == set(banned)
            for holds, proves, verdict in said_of.values():
                # Of flags there is a record, in which receivers have signed what they reported.
                assert holds and not proves and "workers signed the rows in it, and nobody recomputed" in verdict, verdict
            assert set(banned) == {MESH.worker(sender) for _, sender in cases.values()}, (cases, banned)
            assert sound, cases
            for what, (_, sender) in cases.items():
                worker = MESH.worker(sender)
                assert banned[worker] <= begins(cases)[what] + BAN_AFTER - 1, (what, banned)
                assert (worker, "non_finite") in features, what
                # Whoever serves its lane of those of the other stage: where one is out of line by chance workers are shuffled.
                receives = rank // 2 != sender // 2
                lines = [line for line in told if f"Rank {sender} sent" in line]
                assert len(lines) <= receives, (what, told)
                heard |= {sender} if lines else set()
            assert all(any(f"Rank {sender} sent" in line for _, sender in cases.values()) for line in told), told
        assert heard == {sender for _, sender in cases.values()}, cases


def fit_audited(warm: Path, engine: str, *callbacks: L.Callback) -> dict[str, Any]:
    ours = strategy(engine=engine, verification=VERIFICATION, response=ls.Response(audit_rate=0.05))
    module, virtual = tasks.Classifier(), engine == "virtual"
    data = tasks.loader(12) if virtual else tasks.loader(6, 2)
    tasks.trainer(ours, 1 if virtual else 4, WARMUP + 8, callbacks).fit(module, data, ckpt_path=warm)
    return {"banned": dict(ours.ledger.banned_at), "contradicted": ours.ledger.contradicted, "weights": tasks.local_weights(module)}


def fit_contradicting(warm: Path) -> list[dict[str, Any]]:
    """One worker sends messages that nobody can take; and it says that it sent other signals than it did."""
    equivocator = ls.AttackInjector({"name": "equivocate", "side": "sender"}, workers=[MESH.worker(1)], start_step=BEGIN)
    return [fit_audited(warm, "process", one) for one in (Sends(send_other_shape, 1, BEGIN), equivocator)]


def test_with_audits_malformed_messages_and_false_words_about_them_cost_nothing(warm: Path) -> None:
    """Their step is done again without its sender, whose work is done by others: the weights are those of a clean run.

    Of two workers nobody can tell which one is wrong, so nobody is banned.
    """
    clean, seen = fit_audited(warm, "virtual"), set[str]()
    assert clean["banned"] == {}
    for found in itertools.chain(*world.run(fit_contradicting, 4, warm)):
        assert found["banned"] == {}
        # One neighbour after the other says something else than this worker does.
        assert set(found["contradicted"][MESH.worker(1)]) == {MESH.worker(2), MESH.worker(3)}
        for name, value in found["weights"].items():
            seen.add(name)
            torch.testing.assert_close(value, clean["weights"][name], atol=1e-6, rtol=1e-5)
    assert seen == set(clean["weights"])


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
    results, failures = world.outcomes(fit_sending, 4, send_slowly, 1, {"timeout": SHORT}, timeout=50, answers=3)
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


def test_bad_signals_do_not_reach_the_weights(warm: Path) -> None:
    """On the virtual mesh; between processes a malformed message counts as one that is not finite, and a taint is lost of zeros."""
    for attack in (nan, infinite, zeros):
        for worker in (ls.Worker(0, 1), ls.Worker(1, 1)):
            what = f"{attack.__name__} by {worker}"
            ours, module = strategy(engine="virtual", verification=VERIFICATION, response=FLAGS), tasks.Classifier()
            injector = ls.AttackInjector(attack, workers=[worker], start_step=BEGIN)
            tasks.trainer(ours, 1, BEGIN + BAN_AFTER + 2, [injector]).fit(module, tasks.loader(12), ckpt_path=warm)
            banned = ours.ledger.banned_at
            assert set(banned) == {worker}, what
            assert banned[worker] <= BEGIN + BAN_AFTER, what
            assert finite(module), what


class Watches(L.Callback):
    """What the verifiers of the second boundary saw, step by step: tainted and flagged micro-batches."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        ours: Any = trainer.strategy
        at = ours.mesh.boundaries.index(Boundary(1, Direction.ACTIVATION))
        self.seen.append((int(ours.table.tainted[at].sum()), int(ours.table.flagged[at].sum())))


def fit_losing_taints(warm: Path) -> tuple[Any, bool, list[tuple[int, int]]]:
    ours, module = strategy(stages=3, verification=VERIFICATION, response=ls.Response(audit_rate=None)), tasks.Classifier()
    attack = ls.AttackInjector(zeros, workers=[ls.Worker(0, 1)], direction="activation", start_step=WARMUP)
    watches = Watches()
    run = tasks.trainer(ours, 6, WARMUP + 10, [attack, Sends(send_untainted, by=3, since=WARMUP), watches])
    run.fit(module, tasks.loader(6, 2), ckpt_path=warm)
    return dict(ours.ledger.banned_at), finite(module), watches.seen[:5]


def test_a_lost_taint_does_not_hide_the_liar(tmp_path: Path) -> None:
    for banned, sound, seen in world.run(fit_losing_taints, 6, warmed_up(tmp_path, stages=3), timeout=80):
        assert set(banned) == {ls.Worker(0, 1)}
        # A little later than after five steps where the other of the stage is out of line by chance.
        assert banned[ls.Worker(0, 1)] <= WARMUP + 8
        assert sound
        # Who takes no taint away is behind the liar now and then, because while it is a suspect workers are shuffled.
        assert seen[0] == (0, 2) and all(tainted + flagged >= 2 for tainted, flagged in seen), "both micro-batches of each step"
