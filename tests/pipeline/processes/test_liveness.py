from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_sentinel.errors import ConfigurationError, MalformedMessageError, WorkerLostError
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline.processes.liveness import Roster, connect
from lightning_sentinel.pipeline.processes.lost_connections import is_lost_connection, sounds_lost
from lightning_sentinel.pipeline.stages.stage import run_layer

MESH = Mesh(stages=2, replicas=2)
TIMEOUT = timedelta(seconds=90)


def raise_in(error: BaseException, module: str) -> None:
    """Raise an error in a line of another Python module."""
    exec("raise error", {"__name__": module, "error": error})


LOST = RuntimeError("Connection closed by peer [127.0.0.1]:4711")


class TestIsLostConnection:
    @pytest.mark.parametrize(
        "message",
        [
            "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:38211",
            "Application timeout caused pair closure",
            "Timed out waiting 1800000ms for recv operation to complete",
            "Read from remote host: Connection reset by peer",
            "connect: Connection refused",
            "NCCL communicator was aborted on rank 1",
            "Broken pipe",
            "wait timeout after 300000ms, keys: /default_pg/0//cpu//0",
            "waitForInput: socket SocketImpl(fd=5) timed out after 300000ms",
            "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
            "Failed to send, sent 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        ],
    )
    def test_messages_of_torch(self, message: str) -> None:
        for error in (RuntimeError(message), dist.DistNetworkError(message)):
            with pytest.raises(RuntimeError) as raised:
                raise_in(error, "torch.distributed.distributed_c10d")
            assert sounds_lost(raised.value) and is_lost_connection(raised.value)
            with pytest.raises(RuntimeError) as raised:
                raise_in(error.with_traceback(None), "a_model_of_the_users")
            assert not is_lost_connection(raised.value)

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
            RuntimeError("CUDA out of memory"),
            RuntimeError(""),
            ValueError("connection closed"),
            ConfigurationError("a larger timeout helps"),
            KeyboardInterrupt(),
        ],
        ids=repr,
    )
    def test_other_errors(self, error: BaseException) -> None:
        assert not sounds_lost(error)


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


@pytest.fixture(autouse=True)
def _alone_and_impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes of a test are no test's of another, and those that nobody writes are not waited for."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("lightning_sentinel.pipeline.processes.liveness._MOMENT", timedelta(milliseconds=10))


def roster(rank: int, store: dist.Store | None) -> Roster:
    return Roster(MESH, rank, store, TIMEOUT)


def loss_seen_by(watcher: Roster, error: BaseException = LOST) -> WorkerLostError:
    with pytest.raises(WorkerLostError) as raised, watcher.watching():
        raise_in(error, "torch.distributed.distributed_c10d")
    # What the connection said is left out where somebody said what happened; and who would fail again is not to start again.
    assert raised.value.__cause__ is (None if raised.value.told else error)
    assert ("Start it again from the last checkpoint" in str(raised.value)) is not raised.value.told
    assert ("Mend that first" in str(raised.value)) is raised.value.told
    return raised.value


def all_met(store: dist.Store, ended: int, host: str | None = None, *, wait: bool = True) -> tuple[Roster, subprocess.Popen[bytes]]:
    """Rank 0, which has met the others; the process of rank ``ended`` ends right after."""
    child = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    rosters = [roster(rank, store) for rank in range(MESH.size)]
    dist.PrefixStore("sentinel", store).set(f"process/{ended}", f"{host or socket.gethostname()} {child.pid}")
    rosters[0].meet()
    assert child.stdin is not None
    child.stdin.close()
    if wait:
        child.wait()
    return rosters[0], child


class TestRoster:
    def test_errors_of_another_kind_pass(self, store: dist.Store) -> None:
        watcher = roster(0, store)
        # The second is the user's own, in whose step something else has timed out.
        for error in (RuntimeError("out of memory"), RuntimeError("socket timed out"), ValueError("timeout")):
            with pytest.raises(type(error)) as raised, watcher.watching():
                raise error
            assert raised.value is error

    def test_nothing_happens_without_an_error(self, store: dist.Store) -> None:
        with roster(0, store).watching():
            pass

    def test_a_suspect_is_named(self, store: dist.Store) -> None:
        watcher = roster(0, store)
        roster(2, store)
        error = loss_seen_by(watcher, WorkerLostError("Rank 2 does not answer", rank=2))
        assert "rank 2, worker (stage 0, replica 0)," in str(error)
        assert f"within {TIMEOUT}" in str(error)
        assert error.rank == 2

    def test_nobody_is_named_without_a_suspect(self, store: dist.Store) -> None:
        watcher = roster(0, store)
        roster(1, store)
        error = loss_seen_by(watcher)
        assert f"a worker did not answer within {TIMEOUT}" in str(error)
        assert error.rank is None

    def test_the_first_note_wins(self, store: dist.Store) -> None:
        first, second = roster(0, store), roster(1, store)
        loss_seen_by(first, WorkerLostError("Rank 2 does not answer", rank=2))
        error = loss_seen_by(second, WorkerLostError("Rank 0 does not answer", rank=0))
        assert "rank 2, worker (stage 0, replica 0)," in str(error)
        assert "rank 0" not in str(error)

    def test_the_first_failure_wins(self, store: dist.Store) -> None:
        first, second, third = (roster(rank, store) for rank in range(3))
        first.report_failure(ValueError("the cause\nand details"))
        second.report_failure(KeyError("in its wake"))
        text = str(loss_seen_by(third))
        assert "rank 0, worker (stage 1, replica 0), failed with ValueError: the cause." in text
        assert text.endswith("ValueError: the cause\nand details")
        assert "in its wake" not in text

    @pytest.mark.parametrize("suspect", [None, 2], ids=["no suspect", "a suspect"])
    def test_a_reported_failure_is_named(self, store: dist.Store, suspect: int | None) -> None:
        failing, watcher = roster(3, store), roster(0, store)
        failing.report_failure(PermissionError())
        error = loss_seen_by(watcher, LOST if suspect is None else WorkerLostError("no answer", rank=suspect))
        assert "rank 3, worker (stage 0, replica 1), failed with PermissionError" in str(error)
        assert "rank 2" not in str(error)

    def test_a_failure_is_told_with_its_place_and_the_users_own_frames(self, store: dist.Store) -> None:
        def raised_by_torch() -> None:
            torch.ones(2, 3) @ torch.ones(2, 3)

        with pytest.raises(RuntimeError) as caught:
            run_layer(lambda _: raised_by_torch(), torch.zeros(4, 2), False, "layer net.2 (Linear) of stage 1")
        roster(1, store).report_failure(caught.value)
        said = str(loss_seen_by(roster(0, store)))
        assert "failed in layer net.2 (Linear) of stage 1, which was given torch.float32 of shape (4, 2) with RuntimeError" in said
        frames = [line for line in said.splitlines() if line.startswith("  File ")]
        assert len(frames) == 3 and all("test_liveness" in frame for frame in frames)
        assert "torch.ones(2, 3) @ torch.ones(2, 3)" in said
        assert said.splitlines()[-1].startswith("in layer net.2" if sys.version_info >= (3, 11) else "RuntimeError")

    def test_what_a_rank_says_has_bounds(self, store: dist.Store) -> None:
        roster(1, store).report_failure(ValueError("x" * 100_000))
        assert len(str(loss_seen_by(roster(0, store)))) < 10_000

    def test_who_is_told_to_end_has_not_failed(self, store: dist.Store) -> None:
        roster(1, store).report_failure(SIGTERMException())
        assert "failed with SIGTERMException. Start it again" in str(loss_seen_by(roster(0, store)))

    def test_the_rank_of_the_error_is_the_one_that_is_named(self, store: dist.Store) -> None:
        """Rank 2 fell silent because rank 3 had failed: rank 2 is not the one that was lost."""
        roster(3, store).report_failure(ValueError("the cause"))
        error = loss_seen_by(roster(0, store), WorkerLostError("Rank 2 does not answer", rank=2))
        assert "rank 3" in str(error)
        assert error.rank in (3, None)

    def test_a_malformed_message_is_the_fault_of_its_sender(self, store: dist.Store) -> None:
        error = MalformedMessageError("Rank 3 sent a malformed message. Expected one. See that it goes.", rank=3)
        error.__cause__ = MalformedMessageError("Expected the gradient; what came is late.")
        roster(1, store).report_failure(error)
        seen = loss_seen_by(roster(0, store), WorkerLostError("Rank 1 does not answer", rank=1))
        text = "rank 3, worker (stage 0, replica 1), sent a malformed message: Expected the gradient; what came is late. Start"
        assert text in str(seen)
        assert seen.rank == 3

    def test_a_malformed_message_of_unknown_origin_is_a_failure_of_ones_own(self, store: dist.Store) -> None:
        roster(1, store).report_failure(MalformedMessageError("Whose is it?"))
        assert "rank 1, worker (stage 1, replica 1), failed with MalformedMessageError" in str(loss_seen_by(roster(0, store)))

    def test_several_that_have_ended_are_all_named(self, store: dist.Store) -> None:
        watcher, _ = all_met(store, ended=3)
        watcher._processes[1] = watcher._processes[3]
        text = str(loss_seen_by(watcher))
        assert "rank 1, worker (stage 1, replica 1), and rank 3, worker (stage 0, replica 1), did not answer" in text

    def test_a_loss_is_no_failure_of_ones_own(self, store: dist.Store) -> None:
        roster(0, store).report_failure(WorkerLostError("lost", rank=2))
        assert "failed with" not in str(loss_seen_by(roster(1, store)))

    @pytest.mark.parametrize("suspect", [None, 1])
    def test_a_process_that_has_ended_is_named(self, store: dist.Store, suspect: int | None) -> None:
        watcher, _ = all_met(store, ended=3)
        error = loss_seen_by(watcher, LOST if suspect is None else WorkerLostError("Rank 1 does not answer", rank=suspect))
        assert "rank 3, worker (stage 0, replica 1)," in str(error)
        assert "rank 1," not in str(error)
        assert error.rank == 3

    def test_as_long_as_it_runs_it_is_not(self, store: dist.Store) -> None:
        watcher, *_ = (roster(rank, store) for rank in range(MESH.size))
        watcher.meet()
        assert loss_seen_by(watcher).rank is None

    def test_a_zombie_is_named(self, store: dist.Store) -> None:
        watcher, child = all_met(store, ended=2, wait=False)
        # Ended and not yet waited for.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
        assert loss_seen_by(watcher).rank == 2
        child.wait()

    def test_what_a_machine_is_called_does_not_matter(self, store: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two names on one machine: its processes can be looked at all the same."""
        monkeypatch.setenv("LIGHTNING_SENTINEL_HOST", "a")
        roster(0, store)
        monkeypatch.setenv("LIGHTNING_SENTINEL_HOST", "b")
        watcher, _ = all_met(store, ended=3)
        assert watcher.hosts == ("b",) * MESH.size
        assert loss_seen_by(watcher).rank == 3

    def test_machines_are_known_by_their_names(self, store: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
        rosters = [roster(0, store)]
        for rank, name in enumerate(("b", " ", "rack 3"), 1):
            monkeypatch.setenv("LIGHTNING_SENTINEL_HOST", name)
            rosters.append(roster(rank, store))
        assert rosters[1].hosts == ()
        rosters[1].meet()
        assert rosters[1].hosts == (socket.gethostname(), "b", socket.gethostname(), "rack 3")

    def test_of_other_hosts_nothing_is_known(self, store: dist.Store) -> None:
        watcher, _ = all_met(store, ended=3, host="elsewhere.example")
        assert loss_seen_by(watcher).rank is None

    def test_of_processes_it_has_not_met_nothing_is_known(self, store: dist.Store) -> None:
        watcher = roster(0, store)
        dist.PrefixStore("sentinel", store).set("process/3", f"{socket.gethostname()} 999999999")
        assert loss_seen_by(watcher).rank is None

    def test_without_a_store_the_neighbour_is_named(self) -> None:
        watcher = roster(0, None)
        watcher.meet()
        watcher.report_failure(ValueError("nobody can read this"))
        error = loss_seen_by(watcher, WorkerLostError("Rank 1 does not answer", rank=1))
        assert "rank 1, worker (stage 1, replica 1)," in str(error)
        assert "a worker did not answer" in str(loss_seen_by(watcher))

    def test_a_name_that_somebody_is_about_to_write_down_is_waited_for(
        self, store: dist.Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightning_sentinel.pipeline.processes.liveness._MOMENT", timedelta(seconds=30))
        knowing = threading.Timer(0.2, roster(1, store).report_failure, [ValueError("the cause")])
        knowing.start()
        assert "failed with ValueError: the cause" in str(loss_seen_by(roster(0, store)))
        knowing.join()

    def test_a_store_that_is_gone_too_hides_nothing(self) -> None:
        class Gone(dist.Store):
            def set(self, *_: object) -> None:
                pass

            def compare_set(self, *_: object) -> bytes:
                raise dist.DistNetworkError("Failed to send, sent 0 bytes")

            def wait(self, *_: object) -> None:
                raise dist.DistNetworkError("Failed to recv, got 0 bytes")

        watcher = roster(0, Gone())
        watcher.report_failure(ValueError("nobody can read this"))
        error = loss_seen_by(watcher, WorkerLostError("Rank 1 does not answer", rank=1))
        assert "rank 1," in str(error)
        assert error.rank == 1
        assert "a worker did not answer" in str(loss_seen_by(watcher))


class Leaving(dist.Store):
    """A store whose host can end."""

    def __init__(self) -> None:
        super().__init__()
        self.gone, self._inner = False, dist.HashStore()

    def _ask(self, what: str, *arguments: Any) -> Any:
        if self.gone:
            raise dist.DistNetworkError("Failed to recv, got 0 bytes")
        return getattr(self._inner, what)(*arguments)

    def set(self, key: str, value: bytes) -> None:
        self._ask("set", key, value.decode())

    def get(self, key: str) -> bytes:
        return self._ask("get", key)

    def compare_set(self, key: str, old: bytes, new: bytes) -> bytes:
        return self._ask("compare_set", key, old.decode(), new.decode())

    def wait(self, *arguments: Any) -> None:
        self._ask("wait", *arguments)

    def check(self, keys: list[str]) -> bool:
        return self._ask("check", keys)


class TestTheStoreIsGone:
    @pytest.fixture
    def store(self) -> Leaving:
        return Leaving()

    @pytest.fixture
    def rosters(self, store: Leaving) -> list[Roster]:
        met = [roster(rank, store) for rank in range(MESH.size)]
        for each in met:
            each.meet()
        return met

    def test_what_was_written_before_is_still_read(self, store: Leaving, rosters: list[Roster]) -> None:
        rosters[0].report_failure(ValueError("the cause"))
        store.gone = True
        for watcher in rosters[1:]:
            seen = loss_seen_by(watcher, WorkerLostError("no answer", rank=0))
            assert "rank 0, worker (stage 1, replica 0), failed with ValueError: the cause" in str(seen)
        assert "failed with ValueError: the cause" in str(loss_seen_by(rosters[3])), "without a suspect"

    def test_the_first_note_after_that_wins_too(self, store: Leaving, rosters: list[Roster]) -> None:
        store.gone = True
        rosters[1].report_failure(ValueError("the cause"))
        rosters[2].report_failure(ValueError("in its wake"))
        assert "rank 1, worker (stage 1, replica 1), failed with ValueError: the cause" in str(loss_seen_by(rosters[3]))

    def test_whoever_has_read_it_hands_it_on(self, store: Leaving, rosters: list[Roster], tmp_path: Path) -> None:
        """On another host than the one that wrote it."""
        rosters[0].report_failure(ValueError("the cause"))
        (written,) = tmp_path.glob("lightning-sentinel-*")
        written.unlink()
        loss_seen_by(rosters[1])
        store.gone = True
        assert "the cause" in str(loss_seen_by(rosters[2]))

    def test_a_note_that_cannot_be_written_is_used_all_the_same(self, rosters: list[Roster], tmp_path: Path) -> None:
        tmp_path.rmdir()
        assert loss_seen_by(rosters[1], WorkerLostError("no answer", rank=2)).rank == 2

    def test_runs_have_files_of_their_own(self, rosters: list[Roster], tmp_path: Path) -> None:
        rosters[0].report_failure(ValueError("the cause"))
        second = dist.HashStore()
        others = [roster(rank, second) for rank in range(MESH.size)]
        for each in others:
            each.meet()
        assert "the cause" not in str(loss_seen_by(others[1], WorkerLostError("no answer", rank=2)))
        assert len(list(tmp_path.glob("lightning-sentinel-*"))) == 2


class TestConnect:
    @pytest.fixture(autouse=True)
    def _running(self, tmp_path: Path) -> Iterator[None]:
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    def test_somebody_elses_group_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lightning_sentinel.pipeline.processes.liveness._start", None)
        monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("connected again"))
        assert connect("gloo", address="127.0.0.1", port=1, rank=0, world_size=1, timeout=TIMEOUT) is None
