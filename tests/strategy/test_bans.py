"""Bans from a file and from a checkpoint, and how they get there."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

import lightning_sentinel as ls
from lightning_sentinel.errors import ConfigurationError, MalformedMessageError, WorkerLostError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.processes.liveness import Roster
from lightning_sentinel.verification import Ledger
from lightning_sentinel.verification.bans import Ban, enter_bans, read_bans
from tests.distributed import tasks

MESH = Mesh(2, 2)
W = Worker(1, 0)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_SENTINEL_HOST", "here")
    return tmp_path / "kept" / "ledger.json"


# --- Runs on one machine


def fit(path: Path, steps: int, attacker: Worker | None = None, source: Path | None = None) -> tuple[ls.SentinelStrategy, Any]:
    strategy = ls.SentinelStrategy(
        2, 3, 2, ls.Verification(warmup_steps=10), ls.Response(ban_after=2, ledger=path), engine="virtual"
    )
    attacks = [] if attacker is None else [ls.AttackInjector("random", workers=[attacker])]
    trainer = tasks.trainer(strategy, 1, steps, attacks)
    trainer.fit(tasks.Classifier(), tasks.loader(12), ckpt_path=source)
    return strategy, trainer


def test_a_ban_is_in_the_file_and_the_next_run_starts_with_it(path: Path) -> None:
    first, _ = fit(path, 14, W)
    assert first.ledger.banned_at == {W: 11}
    (ban,) = read_bans(path)
    shown = "evidence/step-00000011-stage-1-replica-0.json"
    assert ban == Ban(W, 11, first.ledger.flags[W], "here", 1, Mesh(2, 3), evidence=shown)
    second, _ = fit(path, 1)
    assert second.ledger.banned_at == {W: 0}


def test_a_run_without_bans_leaves_no_file(path: Path) -> None:
    fit(path, 2)
    assert not path.exists()


def test_whoever_was_removed_from_the_file_is_in_again_whatever_the_checkpoint_says(path: Path, tmp_path: Path) -> None:
    strategy, trainer = fit(path, 14, W)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert strategy.ledger.banned == {W}
    path.write_text('{"banned": []}')
    again, _ = fit(path, 15, source=tmp_path / "last.ckpt")
    assert not again.ledger.banned and again.ledger.flags[W] == strategy.ledger.flags[W] > 0


def test_bans_of_a_checkpoint_go_into_a_file_that_is_not_there_yet(path: Path, tmp_path: Path) -> None:
    _, trainer = fit(path, 14, W)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    path.unlink()
    again, _ = fit(path, 15, source=tmp_path / "last.ckpt")
    assert again.ledger.banned_at == {W: 11}
    assert [ban.worker for ban in read_bans(path)] == [W]


def test_a_path_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"ledger.json'\) cannot be written: .*/file is no folder. Choose a path"):
        fit(tmp_path / "file" / "ledger.json", 1)


# --- Several machines


def served_by(hosts: str, mesh: Mesh) -> dict[Worker, str]:
    """A machine for each worker, by stage and replica."""
    return dict(zip(sorted(mesh.workers), hosts))


def strategy_on(hosts: str, rank: int = 0, **response: Any) -> ls.SentinelStrategy:
    """Of a mesh that these machines serve, as it is once ranks have met."""
    strategy = ls.SentinelStrategy(2, len(hosts) // 2, response=ls.Response(**response), engine="virtual")
    served = served_by(hosts, strategy.mesh)
    strategy._bans.read(strategy.mesh, rank, [served[worker] for worker in strategy.mesh.workers], (), lambda entries: entries)
    strategy._bans.take_over()
    strategy._run.step = 20
    return strategy


def saved(hosts: str) -> dict[str, Any]:
    """The ledger of a checkpoint in which (1, 0) was banned, as these machines served the mesh; without them as older ones are."""
    ledger = Ledger()
    ledger.hosts = served_by(hosts, MESH)
    ledger.flags[W] = 9
    ledger.ban(5, [W])
    state = json.loads(json.dumps(ledger.state_dict()))
    return state if hosts else {name: value for name, value in state.items() if name != "hosts"}


@pytest.mark.parametrize(
    ("then", "now", "banned", "flags", "told"),
    [
        ("aabb", "aabb", {W: 5}, 9, False),
        ("aaaa", "bbbb", {W: 5}, 9, False),
        ("", "aabb", {W: 5}, 9, False),
        ("abcd", "abed", {}, 0, True),
        ("abcd", "cbad", {Worker(0, 0): 20}, 0, True),
        ("abcd", "ab", {}, 0, True),
        ("abcd", "acbd", {Worker(0, 1): 20}, 0, True),
        ("", "ab", {}, 0, True),
    ],
    ids=["same", "one machine", "older", "another there", "elsewhere", "smaller", "swapped", "older and smaller"],
)
def test_on_resume_machines_decide(
    then: str, now: str, banned: dict[Worker, int], flags: int, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = strategy_on(now)
    sentences = strategy._bans.resume(saved(then), MESH, strategy.step)
    assert strategy.ledger.banned_at == banned
    assert strategy.ledger.total_flags == flags
    assert strategy.ledger.hosts == served_by(now, strategy.mesh)
    assert bool(sentences) == told
    if told:
        assert "Banned there were worker (stage 1, replica 0)" in sentences[0]


@pytest.mark.parametrize(("rank", "writes"), [(0, False), (1, False), (2, True), (3, False)])
def test_a_machine_that_is_banned_does_not_write_the_file(
    rank: int, writes: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = strategy_on("aabb", rank, ledger=path)
    strategy.ledger.ban(7, [Worker(1, 1)])
    strategy._bans.keep([Worker(1, 1)])
    assert path.exists() == writes
    if writes:
        assert read_bans(path) == [Ban(Worker(1, 1), 7, 0, "b", 2, MESH)]


def test_a_ban_that_cannot_be_written_is_in_force_all_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = strategy_on("abcd", 1, ledger=path)
    path.parent.write_text("in the way")
    strategy.ledger.ban(7, [W])
    with pytest.warns(
        UserWarning, match=r"worker \(stage 1, replica 0\) could not be entered in .*ledger.json .*Make the file writable"
    ):
        strategy._bans.keep([W])
    assert strategy.ledger.banned == {W}


@pytest.mark.parametrize(
    ("error", "entered"),
    [
        (MalformedMessageError("Rank 3 sent a malformed message.", rank=3), True),
        (MalformedMessageError("Whose is it?"), False),
        (WorkerLostError("The run cannot go on: rank 3 did not answer.", rank=3), False),
        (RuntimeError("Connection closed by peer"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=["malformed", "of unknown origin", "lost", "closed", "interrupted"],
)
def test_only_a_malformed_message_is_a_verdict(
    error: BaseException, entered: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, earlier = strategy_on("abcd", 1, ledger=path), Ban(W, 3, host="x", hosts=2)
    enter_bans(path, [earlier])
    strategy._processes._roster = Roster(MESH, 1, HashStore(), timedelta(seconds=5))
    strategy.on_exception(error)
    expected = [Ban(Worker(0, 1), 20, 0, "b", 4, MESH, "malformed message")] if entered else []
    assert read_bans(path) == [earlier, *expected]


def test_nothing_is_written_where_no_file_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    strategy = strategy_on("abcd")
    strategy.ledger.ban(7, [W])
    strategy._bans.keep([W])
    assert not list(tmp_path.iterdir())
