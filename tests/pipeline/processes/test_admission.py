"""Who forms the mesh, decided by pure functions and then by threads with a store."""

from __future__ import annotations

import json
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.distributed import DistNetworkError, HashStore

from lightning_sentinel.errors import ConfigurationError, MalformedMessageError, MeshExhaustedError, WorkerLostError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.processes import admission
from lightning_sentinel.pipeline.processes.admission import Candidate, admit, agree_on_admission, announce_end, outvoted, stand_by
from lightning_sentinel.pipeline.processes.liveness import notes
from lightning_sentinel.pipeline.processes.renumbering import RenumberedEnvironment
from lightning_sentinel.verification.bans import Ban, enter_bans

FILE = "ledger.json"


def started(hosts: str, banned: str) -> list[Candidate]:
    """All of which read the same file."""
    return [Candidate(host, tuple(banned)) for host in hosts]


@pytest.mark.parametrize(
    ("ballots", "expected"),
    [
        ("a: b:", ""),
        ("a:c b:c c:c", "c"),
        ("a:c b:c c:", "c"),
        ("a:c b:c c:ab", "c"),
        ("a:b b:", "b"),
        ("a:x b:x", ""),
        ("a:b b: c:", ""),
        ("a: b: c:ab", ""),
        ("a:b a: b:", "b"),
        ("a:a", "a"),
        ("a:", ""),
        ("a:b", ""),
    ],
)
def test_a_machine_is_banned_by_most_of_the_others(ballots: str, expected: str) -> None:
    """A ballot is a machine and whom it bans."""
    candidates = [Candidate(text[0], tuple(text[2:])) for text in ballots.split()]
    assert outvoted(candidates) == frozenset(expected)


def test_a_key_is_banned_by_most_machines_but_its_own_wherever_it_is() -> None:
    candidates = [Candidate("a", ("eve",)), Candidate("b", ("eve",), "eve"), Candidate("c", ("eve",)), Candidate("d", (), "bob")]
    assert outvoted(candidates) == {"eve"}
    assert outvoted([Candidate("a", ()), Candidate("b", ("bob",), "eve"), Candidate("c", (), "bob")]) == frozenset()
    assert outvoted([Candidate("a", ("eve",), "eve"), Candidate("a", ("eve",), "bob")]) == {"eve"}
    assert admit(candidates, FILE, stages=3, replicas=None).ranks == (0, 2, 3)


@pytest.mark.parametrize(
    ("hosts", "banned", "stages", "replicas", "ranks", "mesh"),
    [
        ("aabb", "", 2, None, (0, 1, 2, 3), Mesh(2, 2)),
        ("aabb", "", None, None, (0, 1, 2, 3), Mesh(2, 2)),
        ("aabbcc", "c", 2, None, (0, 1, 2, 3), Mesh(2, 2)),
        ("aabbcc", "a", 2, None, (2, 3, 4, 5), Mesh(2, 2)),
        ("abcd", "c", 2, None, (0, 1), Mesh(2, 1)),
        ("abcd", "a", 2, None, (1, 2), Mesh(2, 1)),
        ("abcdef", "b", None, None, (0, 2, 3, 4, 5), Mesh(5, 1)),
        ("abcdef", "b", None, 2, (0, 2, 3, 4), Mesh(2, 2)),
        ("abcdefg", "b", 2, 2, (0, 2, 3, 4), Mesh(2, 2)),
        ("abc", "", 2, None, (0, 1), Mesh(2, 1)),
    ],
)
def test_the_first_that_are_not_banned_form_the_largest_mesh(
    hosts: str, banned: str, stages: int | None, replicas: int | None, ranks: tuple[int, ...], mesh: Mesh
) -> None:
    found = admit(started(hosts, banned), FILE, stages, replicas)
    assert (found.ranks, found.mesh) == (ranks, mesh)
    assert Mesh.largest(len(ranks), stages, replicas) == mesh, "whoever asks later finds the same"


@pytest.mark.parametrize(
    ("hosts", "banned", "stages", "replicas", "message"),
    [
        (
            "aab",
            "a",
            2,
            None,
            r"1 of the 3 processes are left, because ledger.json bans 'a'.*Start on more machines, or remove the",
        ),
        ("aabb", "b", 2, 2, r"2 of the 4 .*bans 'b'.*needs at least 4 processes, and there are 2.*leave replicas out"),
        ("aa", "a", None, None, r"No process can take part: 0 of the 2"),
    ],
)
def test_too_few_are_an_error_that_names_the_banned(hosts: str, banned: str, stages: Any, replicas: Any, message: str) -> None:
    with pytest.raises(MeshExhaustedError, match=message):
        admit(started(hosts, banned), FILE, stages, replicas)


def test_too_few_without_a_ban_are_a_wrong_setting() -> None:
    with pytest.raises(ConfigurationError, match=r"needs at least 4 processes, and there are 3\. Start more, or use fewer stages"):
        admit(started("abc", ""), FILE, 4, None)


# --- Between processes


def agree(hosts: str, path: Path, monkeypatch: pytest.MonkeyPatch, stages: int | None = 2) -> list[Any]:
    """What each rank is told: the ranks of the mesh, or an error."""
    store, here, found = HashStore(), threading.local(), [None] * len(hosts)
    monkeypatch.setattr(admission, "host_name", lambda: here.host)

    def rank(number: int) -> None:
        here.host = hosts[number]
        try:
            found[number] = agree_on_admission(store, number, len(hosts), path, stages, None)  # type: ignore[call-overload]
        except Exception as error:
            found[number] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    path = tmp_path / FILE
    enter_bans(path, [Ban(Worker(1, 0), 3, host="b", hosts=3), Ban(Worker(1, 1), 3, host="c", hosts=1)])
    return path


def test_all_decide_the_same_and_who_is_left_out_is_told_why(
    ledger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert agree("abcd", ledger, monkeypatch) == [(0, 2)] * 4
    told = sorted(capsys.readouterr().out.splitlines())
    assert len(told) == 2
    assert told[0].startswith(f"Rank 1 is left out: {ledger} bans its host 'b'. To let it in again remove the host's entries")
    assert told[1].startswith("Rank 3 is left out: 2 stages x 1 replicas need 2 of the 4 processes.")


def test_without_a_file_all_take_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert agree("abba", tmp_path / "none.json", monkeypatch) == [(0, 1, 2, 3)] * 4
    assert not capsys.readouterr().out


def test_who_is_overruled_says_so(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    for rank, host in ((1, "b"), (2, "c")):
        store.set(f"started/{rank}", json.dumps([host, [], None]))
    monkeypatch.setattr(admission, "host_name", lambda: "a")
    with pytest.warns(
        UserWarning, match=r"ledger.json bans 'b', and on most machines it does not.*Give all machines the same file"
    ):
        assert agree_on_admission(store, 0, 3, ledger, 3, None) == (0, 1, 2)


def test_a_banned_machine_cannot_be_where_the_others_meet(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    for error in agree("bacd", ledger, monkeypatch):
        assert isinstance(error, ConfigurationError)
        assert "The run was started from 'b'" in str(error) and "Start it from another machine" in str(error)


def test_a_file_that_is_no_ledger_is_said_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / FILE
    path.write_text(json.dumps([]))
    assert all(isinstance(error, ConfigurationError) for error in agree("ab", path, monkeypatch))


# --- Those that are left out


def wait(store: Any, timeout: float = 30) -> None:
    stand_by(store, timedelta(seconds=timeout))


@pytest.mark.parametrize("said", ["", "3", "[1, []]", '["a", "b"]', '["a", [1]]', "[" * 100_000])
def test_who_does_not_say_where_it_is_is_named(said: str, tmp_path: Path) -> None:
    store = HashStore()
    store.set("started/1", said)
    with pytest.raises(MalformedMessageError, match="Rank 1 does not say where it is") as error:
        agree_on_admission(store, 0, 2, tmp_path / "ledger.json", None, None)
    assert error.value.rank == 1


def test_the_end_of_the_run_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    store, at_exit = HashStore(), []
    monkeypatch.setattr("atexit.register", at_exit.append)
    announce_end(store)
    (announce,) = at_exit
    waiting = threading.Timer(0.1, announce)
    waiting.start()
    with pytest.raises(SystemExit) as raised:
        wait(store)
    assert raised.value.code == 0
    waiting.join()


@pytest.mark.parametrize("how", ["its error", "another's"])
def test_a_failure_does_not_because_a_restart_may_follow(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    store, at_exit = HashStore(), []
    monkeypatch.setattr("atexit.register", at_exit.append)
    announce_end(store)
    if how == "its error":
        monkeypatch.setattr("sys.last_value", ValueError(), raising=False)
    else:
        notes(store).set("failure", "3 rank 3 failed with ValueError: the cause")
    at_exit[0]()
    assert not store.check(["over"])


def test_a_run_that_failed_and_is_not_started_again_is_an_error() -> None:
    store = HashStore()
    notes(store).set("failure", "3 rank 3 failed with ValueError: the cause")
    with pytest.raises(
        WorkerLostError, match=r"not started again within 0:00:00.1.*: rank 3 failed with ValueError: the cause\. Start"
    ):
        wait(store, 0.1)


def test_so_does_the_end_of_the_store() -> None:
    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise DistNetworkError("Failed to recv, got 0 bytes")

    with pytest.raises(SystemExit) as raised:
        wait(Gone())
    assert raised.value.code == 0


# --- Ranks


def test_those_in_the_mesh_are_numbered_from_zero_and_the_others_beyond() -> None:
    ranks, found = (0, 2, 5), []
    for rank in range(6):
        environment = LightningEnvironment()
        environment.set_world_size(6)
        environment.set_global_rank(rank)
        mesh = RenumberedEnvironment(environment, ranks)
        # Lightning tells every environment what it knows of the devices.
        mesh.set_global_rank(rank)
        mesh.set_world_size(6)
        assert mesh.world_size() == 3
        assert (mesh.local_rank(), mesh.node_rank()) == (environment.local_rank(), environment.node_rank())
        found.append(mesh.global_rank())
    assert [found[rank] for rank in ranks] == [0, 1, 2]
    assert all(found[rank] >= 3 for rank in (1, 3, 4)) and len(set(found)) == 6
