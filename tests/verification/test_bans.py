from __future__ import annotations

import fcntl
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.verification import Ledger
from lightning_sentinel.verification.bans import Ban, banned_hosts, bans_here, enter_bans, read_bans

MESH = Mesh(2, 2)
"""Ranks 0 .. 3 are (1, 0), (1, 1), (0, 0), (0, 1)."""
W = Worker(1, 0)


def ban(host: str | None = "b", hosts: int = 2, mesh: Mesh | None = MESH, worker: Worker = W) -> Ban:
    return Ban(worker, 7, 3, host, hosts, mesh)


@pytest.mark.parametrize(
    ("of", "mesh", "hosts", "expected"),
    [
        (ban(), MESH, "bbaa", [W]),
        (ban(), MESH, "ccaa", []),
        (ban(), MESH, "caac", []),
        (ban(), MESH, "acba", [Worker(0, 0)]),
        (ban(), MESH, "aabb", [Worker(0, 0), Worker(0, 1)]),
        (ban(), Mesh(2, 1), "aa", []),
        (ban(), Mesh(2, 1), "ba", [W]),
        (ban(), Mesh(2, 3), "bbcaaa", [W, Worker(1, 1)]),
        (ban(hosts=1), MESH, "bbbb", [W]),
        (ban(hosts=1), MESH, "xxxx", [W]),
        (ban(hosts=1), MESH, "abab", []),
        (ban(hosts=1), Mesh(2, 3), "bbbbbb", []),
        (ban(host=None, hosts=0), MESH, "bbaa", [W]),
        (ban(host=None, hosts=0), Mesh(2, 3), "bccaab", []),
        (ban(host=None, hosts=0, mesh=None), MESH, "bbaa", [W]),
        (ban(host=None, hosts=0, mesh=None, worker=Worker(5, 5)), MESH, "bbaa", []),
        (ban(), MESH, "", [W]),
        (ban(), Mesh(2, 3), "", []),
    ],
    ids=[
        "same place",
        "machine gone",
        "another machine at its place",
        "elsewhere",
        "elsewhere, with all its processes",
        "smaller mesh without it",
        "smaller mesh with it",
        "larger mesh with it",
        "one machine",
        "one machine of another name",
        "one machine then, several now",
        "one machine, larger mesh",
        "unknown machine",
        "unknown machine, larger mesh",
        "unknown mesh",
        "unknown mesh without that place",
        "machines unknown now",
        "machines unknown now, larger mesh",
    ],
)
def test_whom_a_ban_concerns_in_another_run(of: Ban, mesh: Mesh, hosts: str, expected: list[Worker]) -> None:
    assert bans_here([of], mesh, list(hosts)) == expected


@pytest.mark.parametrize(
    ("of", "hosts", "expected"),
    [
        (replace(ban("a", 1), key="eve"), "aaaa", [Worker(0, 1)]),  # not whoever has its place now
        (replace(ban("b", 2), key="eve"), "acac", [Worker(0, 1)]),  # another machine, the same key
        (replace(ban("b", 2), key="eve"), "abab", [Worker(0, 1)]),  # not the others of its machine
        (replace(ban("b", 2), key="carol"), "abab", [Worker(0, 1), Worker(1, 1)]),  # the machine has other keys now
        (replace(ban("b", 2), key="carol"), "acac", []),
        (ban("a", 1), "aaaa", [W]),  # no key then: its place
    ],
    ids=["one machine", "another machine", "its machine", "other keys", "gone", "no key then"],
)
def test_a_ban_follows_the_key(of: Ban, hosts: str, expected: list[Worker]) -> None:
    mesh = Mesh(2, 2)
    keys = ["alice" if worker != Worker(0, 1) else "eve" for worker in mesh.workers]
    assert bans_here([of], mesh, list(hosts), keys) == expected
    assert Ban.from_entry(of.entry()) == of


def test_only_machines_that_were_one_of_several_are_banned_as_a_whole() -> None:
    assert banned_hosts([ban("a", 1), ban("b", 2), ban("c", 5), ban(None, 0)]) == {"b", "c"}


def test_the_file_gives_back_what_was_entered_and_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "ledger.json"
    assert read_bans(path) == []
    entered = [ban(), ban("c"), ban(None, 0, None), ban("b", mesh=Mesh(2, 3))]
    enter_bans(path, entered[:2])
    enter_bans(path, [Ban(W, 99, host="b", hosts=2, mesh=MESH), *entered[2:]])
    assert read_bans(path) == entered, "the first entry stands"
    assert list(path.parent.iterdir()) == [path]
    assert Ledger.banned_in(path) == [W] * 4


def _enter(path: Path, writer: int) -> None:
    for number in range(10):
        enter_bans(path, [Ban(Worker(writer, number), 7, host=f"{writer}.{number}", hosts=9)])


def test_no_ban_is_lost_when_several_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    writers = [multiprocessing.get_context("fork").Process(target=_enter, args=(path, writer)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_bans(path)) == 40


def test_who_cannot_get_the_lock_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_sentinel.verification.bans._PATIENCE", 0.1)
    path = tmp_path / "ledger.json"
    with (tmp_path / "ledger.json.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process has held the lock"):
            enter_bans(path, [Ban(Worker(0, 0), 7)])
    assert read_bans(path) == []
    enter_bans(path, [Ban(Worker(0, 0), 7)])
    assert len(read_bans(path)) == 1 and list(tmp_path.iterdir()) == [path]


def test_what_somebody_removed_stays_removed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    enter_bans(path, [ban("a"), ban("b")])
    path.write_text(json.dumps({"banned": json.loads(path.read_text())["banned"][1:]}))
    enter_bans(path, [ban("c")])
    assert [each.host for each in read_bans(path)] == ["b", "c"]


def test_an_exported_ledger_is_read_too(tmp_path: Path) -> None:
    ledger, path = Ledger(), tmp_path / "ledger.json"
    ledger.hosts = dict(zip(MESH.workers, "bbaa"))
    ledger.ban(5, [W])
    ledger.export(path)
    assert read_bans(path) == [Ban(W, 5, host="b")]
    assert json.loads(path.read_text())["banned"][0]["host"] == "b"


@pytest.mark.parametrize("text", ["", "[]", '{"banned": 3}', '{"banned": [3]}', '{"banned": [{"stage": 1}]}', "\xff"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ledger.json"
    path.write_bytes(text.encode("latin-1"))
    for use in (read_bans, lambda path: enter_bans(path, [ban()])):
        with pytest.raises(ConfigurationError, match=r"ledger.json is not a ledger .*repair it"):
            use(path)
    assert path.read_bytes() == text.encode("latin-1")


def test_a_ledger_says_on_which_machine_the_banned_were() -> None:
    ledger, loaded = Ledger(), Ledger()
    ledger.hosts = dict(zip(MESH.workers, "bcaa"))
    ledger.flags[W] = 4
    ledger.ban(5, [W])
    state: dict[str, Any] = json.loads(json.dumps(ledger.state_dict()))
    loaded.load_state_dict(state)
    assert loaded == ledger
    assert loaded.bans(MESH) == [Ban(W, 5, 4, "b", 3, MESH)]
    loaded.load_state_dict({name: value for name, value in state.items() if name != "hosts"})
    assert loaded.bans(MESH) == [Ban(W, 5, 4, None, 0, MESH)]
