"""Decides which of the started processes form the mesh.

When a run has ended, torchrun restarts it on all machines that are left, also those of banned workers. So before the process group
is formed, every process tells its machine and the machines that its ledger (the file of bans) bans, and all decide from the same
data. A process that is left out keeps running, for two reasons. A restart may need it: torchrun then restarts it with the others.
And a torchrun agent whose processes have all ended closes the rendezvous for all machines five minutes later (torch 2.13), which
would make a restart impossible.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from torch.distributed import Store

from lightning_sentinel.errors import ConfigurationError, MalformedMessageError, MeshExhaustedError, WorkerLostError
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline.processes.hosts import host_name
from lightning_sentinel.pipeline.processes.liveness import notes
from lightning_sentinel.verification.bans import banned_hosts, banned_keys, read_bans

__all__ = ["Admission", "Candidate", "admit", "agree_on_admission", "announce_end", "outvoted", "stand_by"]

_OVER = "over"
_BETWEEN_LOOKS = 0.5
"""Seconds between looks into the store."""


class Candidate(NamedTuple):
    """A process that was started.

    Args:
        host: name of its machine.
        banned: the machines and the public keys that its ledger bans.
        key: its public key, if it has one; that it is its own is proven once the mesh's processes have met.
    """

    host: str
    banned: tuple[str, ...]
    key: str | None = None

    @property
    def names(self) -> frozenset[str]:
        """The names by which it may be banned."""
        return frozenset({self.host} if self.key is None else {self.host, self.key})


class Admission(NamedTuple):
    """The processes that form the mesh.

    Args:
        mesh: the mesh.
        ranks: the original ranks of its processes, in order.
        banned: machines and keys that are left out.
    """

    mesh: Mesh
    ranks: tuple[int, ...]
    banned: frozenset[str]


def outvoted(candidates: Sequence[Candidate]) -> frozenset[str]:
    """The machines and keys that most other machines ban; if all machines read the same ledger, those that it bans.

    Each machine has one vote, that of its lowest rank, and none about itself or its keys unless it is alone. So a banned machine
    can neither admit itself nor exclude others.

    Example:
        >>> outvoted([Candidate("a", ("b",)), Candidate("b", ("a", "c")), Candidate("c", ("b",))])
        frozenset({'b'})
    """
    ballots: dict[str, tuple[str, ...]] = {}
    names: dict[str, set[str]] = {}
    for candidate in candidates:
        ballots.setdefault(candidate.host, candidate.banned)
        names.setdefault(candidate.host, set()).update(candidate.names)
    here = set().union(*names.values())
    others = max(len(ballots) - 1, 1)
    votes = Counter(
        name for voter, banned in ballots.items() for name in set(banned) & here if name not in names[voter] or len(ballots) == 1
    )
    return frozenset(name for name, number in votes.items() if 2 * number > others)


def admit(candidates: Sequence[Candidate], ledger: Path | str, stages: int | None, replicas: int | None) -> Admission:
    """Choose the processes of the mesh: the first ones that are not banned, as many as fill the largest mesh.

    Args:
        candidates: all started processes, by rank.
        ledger: path of the ledger, for messages.
        stages: number of stages, if given.
        replicas: number of replicas, if given.

    Raises:
        MeshExhaustedError: if, without the banned ones, there are too few processes for any mesh.
        ConfigurationError: if none is banned, and there are too few for any mesh.

    Example:
        >>> started = [Candidate(host, ("b",)) for host in "aabbccd"]
        >>> admit(started, "ledger.json", stages=2, replicas=None)[:2]
        (Mesh(stages=2, replicas=2), (0, 1, 4, 5))
    """
    banned = outvoted(candidates)
    left = [rank for rank, candidate in enumerate(candidates) if not candidate.names & banned]
    if banned:
        who = (
            f"{len(left)} of the {len(candidates)} processes are left, because {ledger} bans {', '.join(map(repr, sorted(banned)))}"
            ", on which the others are"
        )
        remedy = f"Start on more machines, or remove the entries of machines that you trust again from {ledger}."
        if not left:
            raise MeshExhaustedError(f"No process can take part: {who}. {remedy}")
        try:
            mesh = Mesh.largest(len(left), stages, replicas)
        except ConfigurationError as error:
            raise MeshExhaustedError(f"Not enough processes can take part: {who}. {error} {remedy}") from error
    else:
        mesh = Mesh.largest(len(left), stages, replicas)
    return Admission(mesh, tuple(left[: mesh.size]), banned)


def agree_on_admission(
    store: Store,
    rank: int,
    world_size: int,
    ledger: Path | str,
    stages: int | None,
    replicas: int | None,
    key: str | None = None,
) -> tuple[int, ...]:
    """Choose the processes of the mesh, the same on all ranks; print a message on a rank that is left out.

    Args:
        store: of this start alone; its timeout limits the wait for other processes.
        rank: with which this process was started.
        world_size: number of started processes.
        ledger: path of the ledger.
        stages: number of stages, if given.
        replicas: number of replicas, if given.
        key: public key of this process, if it has one.

    Returns:
        the original ranks of the mesh's processes, in order.

    Raises:
        MeshExhaustedError: if too few processes are left.
        ConfigurationError: if ``ledger`` is not a ledger, or if rank zero is banned and its process hosts the store.
        MalformedMessageError: if a process's entry is not its machine, a list of banned machines and keys, and its key.
    """
    filed = read_bans(ledger)
    own = banned_hosts(filed) | banned_keys(filed)
    store.set(f"started/{rank}", json.dumps([host_name(), sorted(own), key]))
    candidates = []
    for other in range(world_size):
        candidates.append(_candidate(store.get(f"started/{other}"), other))
    admission = admit(candidates, ledger, stages, replicas)
    if candidates[0].names & admission.banned and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ConfigurationError(
            f"The run was started from {candidates[0].host!r}, where its processes would meet, and {ledger} bans that host. Start"
            " it from another machine, with that one's address, or remove its entries from the file."
        )
    overruled = sorted(own & frozenset().union(*(candidate.names for candidate in candidates)) - admission.banned)
    if overruled:
        warnings.warn(
            f"Here {ledger} bans {', '.join(map(repr, overruled))}, and on most machines it does not, so they take part. Give all"
            " machines the same file.",
            stacklevel=2,
        )
    if rank not in admission.ranks:
        print(_why_left_out(candidates[rank], rank, len(candidates), admission, ledger), flush=True)
    return admission.ranks


def _candidate(said: bytes, rank: int) -> Candidate:
    try:
        host, banned, key = json.loads(said)
        texts = isinstance(banned, list) and all(isinstance(one, str) for one in banned)
        if isinstance(host, str) and texts and (key is None or isinstance(key, str)):
            return Candidate(host, tuple(banned), key)
    except (ValueError, TypeError, RecursionError):
        pass
    raise MalformedMessageError(f"Rank {rank} does not say where it is and whom it bans, but {said[:80]!r}.", rank=rank)


def _why_left_out(candidate: Candidate, rank: int, started: int, admission: Admission, ledger: Path | str) -> str:
    if candidate.names & admission.banned:
        by_host = candidate.host in admission.banned
        what = f"host {candidate.host!r}" if by_host else f"key {candidate.key}"
        kind = "host" if by_host else "key"
        why = f"{ledger} bans its {what}. To let it in again remove the {kind}'s entries from the file, and restart"
    else:
        mesh = admission.mesh
        why = (
            f"{mesh.stages} stages x {mesh.replicas} replicas need {mesh.size} of the {started} processes. It takes part as soon"
            " as a restart finds enough to fill another pipeline"
        )
    return f"Rank {rank} is left out: {why}. It waits for the end of the run."


def announce_end(store: Store) -> None:
    """When this process ends without failure, release the processes that stand by. To be called on rank zero of the mesh."""

    def announce() -> None:
        with suppress(RuntimeError):  # the store is gone, which releases them as well
            if getattr(sys, "last_value", None) is None and not notes(store).check(["failure"]):
                store.set(_OVER, "")

    atexit.register(announce)


def stand_by(store: Store, timeout: timedelta) -> None:
    """Wait, in a process that was left out, for the end of the run, however long it takes. A torchrun restart ends the wait.

    Args:
        store: of this start alone.
        timeout: how long to wait for a restart after the run has failed.

    Raises:
        SystemExit: with code 0, when the run has ended or the store is gone.
        WorkerLostError: if the run has failed and was not restarted.
    """
    failed: float | None = None
    try:
        while not store.check([_OVER]):
            if failed is None and notes(store).check(["failure"]):
                failed = time.monotonic()
            if failed is not None and time.monotonic() > failed + timeout.total_seconds():
                note, _, trace = notes(store).get("failure").decode().split(" ", 1)[-1].partition("\n")
                raise WorkerLostError(
                    f"The run in which this process had no part has failed, and was not started again within {timeout}: {note}."
                    f" {'Mend that first.' if trace else 'Start it again from the last checkpoint.'}"
                )
            time.sleep(_BETWEEN_LOOKS)
    except WorkerLostError:
        raise
    except RuntimeError:
        pass  # the store has ended, and with it the run
    raise SystemExit(0)
