"""Under torchrun with restarts a run goes on from its last checkpoint on the machines that are left and not banned."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sentinel.verification import Ledger
from tests.distributed import starting, world

IN_ALL = 48
"""Samples."""
BATCH = 6
"""Samples of a replica's batch."""


def run(directory: Path, hosts: str, least: int, processes: int, *arguments: str) -> dict[str, tuple[int | None, str]]:
    """Run the script on machines of these names, of which so many must be there, with so many processes each.

    Returns:
        the exit code of each machine's agent, and what it and its processes said.
    """
    options = ["--max-restarts=3", f"--nnodes={least}:{len(hosts)}", f"--nproc-per-node={processes}"]
    options += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{world.free_port()}", "--rdzv-id=elastic"]
    times = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=8,join_timeout=150"
    script = [str(world.ROOT / "tests" / "distributed" / "elastic_script.py"), str(directory), *arguments]
    agents: dict[str, starting.Process] = {}
    try:
        for host in hosts:
            # The store must outlive the machine that is lost, so it is that of the first.
            command = ["torchrun", *options, "--rdzv-conf", f"{times},is_host={int(host == hosts[0])}", *script]
            environment = starting.clean_environment() | {"LIGHTNING_SENTINEL_HOST": host}
            agents[host] = starting.start(command, environment, directory, directory / f"{host}.out")
        codes = {host: starting.wait(agent, 150) for host, agent in agents.items()}
    finally:
        for agent in agents.values():
            starting.stop(agent)
    return {host: (code, (directory / f"{host}.out").read_text()) for host, code in codes.items()}


def steps(replicas: int) -> int:
    """Of an epoch."""
    return -(-IN_ALL // replicas // BATCH)


def check_end(directory: Path, said: str, first: int, then: int) -> None:
    """The first epoch was that of ``first`` replicas, and the second of ``then``, after a start from the first's checkpoint."""
    assert (directory / "failed").exists()
    assert f"The checkpoint was written on 2 stages x {first} replicas. This run has 2 x {then}." in said
    assert f"ends at epoch 2 on Mesh(stages=2, replicas={then})" in said
    saved: dict[str, Any] = torch.load(directory / "last.ckpt", weights_only=True)
    assert saved["epoch"] == 1 and saved["global_step"] == steps(first) + steps(then)


@pytest.mark.timeout(170)
def test_a_run_that_loses_a_machine_goes_on_from_its_last_checkpoint_on_a_smaller_mesh(tmp_path: Path) -> None:
    agents = run(tmp_path, "ab", 1, 2, "machine", "b")
    code, said = agents["a"]
    assert code == 0, said[-4000:]
    assert agents["b"][0] == -signal.SIGKILL
    assert "begins with 4 processes from nothing" in said
    assert "begins with 2 processes from the last checkpoint" in said
    check_end(tmp_path, said, 2, 1)


@pytest.mark.timeout(170)
def test_a_restart_leaves_the_machine_of_a_banned_worker_out(tmp_path: Path) -> None:
    ledger = tmp_path / "kept" / "ledger.json"
    agents = run(tmp_path, "abcd", 4, 1, "process", "b", "--liar", "c", "--ledger", str(ledger))
    said = "".join(text for _, text in agents.values())
    assert [code for code, _ in agents.values()] == [0] * 4, said[-4000:]
    assert said.count("begins with 4 processes from nothing") == said.count("begins with 4 processes from the last checkpoint") == 4
    assert said.count("Banned worker (stage ") == 1
    check_end(tmp_path, said, 2, 1)
    waits = "It waits for the end of the run."
    assert f"is left out: {ledger} bans its host 'c'. To let it in again remove" in agents["c"][1] and waits in agents["c"][1]
    spare = "is left out: 2 stages x 1 replicas need 2 of the 4 processes."
    assert sorted(host for host, (_, text) in agents.items() if waits in text) == sorted(
        {"c", *(host for host, (_, text) in agents.items() if spare in text)}
    )
    assert said.count(spare) == 1 and spare not in agents["c"][1]
    (entry,) = json.loads(ledger.read_text())["banned"]
    assert (entry["host"], entry["hosts"], entry["step"], entry["mesh"]) == ("c", 4, 2, [2, 2])
    after = Ledger()
    after.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["lightning_sentinel"]["ledger"])
    assert not after.banned and len(after.hosts) == 2 and "c" not in after.hosts.values()


@pytest.mark.timeout(170)
def test_a_restart_leaves_the_sender_of_a_malformed_message_out(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.json"
    agents = run(tmp_path, "ab", 2, 2, "message", "b", "--ledger", str(ledger))
    said = "".join(text for _, text in agents.values())
    assert [code for code, _ in agents.values()] == [0, 0], said[-4000:]
    assert "MalformedMessageError" in said
    assert "begins with 4 processes from the last checkpoint" in said
    check_end(tmp_path, said, 2, 1)
    assert agents["b"][1].count(f"is left out: {ledger} bans its host 'b'") == 2
    (entry,) = json.loads(ledger.read_text())["banned"]
    assert (entry["host"], entry["reason"], entry["flags"]) == ("b", "malformed message", 0)
