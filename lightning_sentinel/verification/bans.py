"""Bans that outlive a run: the file that keeps them, and the workers of a new mesh that they apply to.

In a mesh on one machine a ban applies to a worker's place, because all workers share the machine. In a mesh of several it applies
to the machine: whoever controls one of its processes controls them all, and another machine may have its place in the next run.
Where workers have keys a ban applies to the key, wherever it turns up; if it does not, to the machine, and never to the place.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker

__all__ = ["Ban", "banned_hosts", "banned_keys", "bans_here", "enter_bans", "read_bans"]

_PATIENCE = 30.0
"""Seconds to wait for the lock of another process."""


@dataclass(frozen=True)
class Ban:
    """A banned worker, with its machine and mesh.

    Args:
        worker: its stage and replica.
        step: number of the training batch.
        flags: how many of its signals were flagged.
        host: the machine that served it; ``None`` if unknown.
        hosts: how many machines served the mesh.
        mesh: the mesh that it was part of; ``None`` if unknown.
        reason: why, in a word or two.
        key: the worker's public key; ``None`` if it had none.
        evidence: file in the folder ``sentinel`` of the run's log directory that shows why; ``None`` if there is none.
    """

    worker: Worker
    step: int
    flags: int = 0
    host: str | None = None
    hosts: int = 0
    mesh: Mesh | None = None
    reason: str = "signals"
    key: str | None = None
    evidence: str | None = None

    @property
    def place(self) -> tuple[Worker, str | None, Mesh | None, str | None]:
        """What identifies a ban: a file keeps one per place and key."""
        return self.worker, self.host, self.mesh, self.key

    def entry(self) -> dict[str, Any]:
        """The ban as a JSON object."""
        return {
            "stage": self.worker.stage,
            "replica": self.worker.replica,
            "step": self.step,
            "flags": self.flags,
            "host": self.host,
            "hosts": self.hosts,
            "mesh": None if self.mesh is None else [self.mesh.stages, self.mesh.replicas],
            "reason": self.reason,
            "key": self.key,
            "evidence": self.evidence,
        }

    @classmethod
    def from_entry(cls, entry: Any) -> Ban:
        """The inverse of :meth:`entry`; also reads entries of :meth:`Ledger.export`."""
        host = entry.get("host")
        key = entry.get("key")
        evidence = entry.get("evidence")
        mesh = entry.get("mesh")
        return cls(
            Worker(int(entry["stage"]), int(entry["replica"])),
            int(entry["step"]),
            int(entry.get("flags", 0)),
            None if host is None else str(host),
            int(entry.get("hosts", 0)),
            None if mesh is None else Mesh(*map(int, mesh)),
            str(entry.get("reason", "signals")),
            None if key is None else str(key),
            None if evidence is None else str(evidence),
        )


def banned_hosts(bans: Iterable[Ban]) -> frozenset[str]:
    """The machines that are banned as a whole: those that served only a part of a mesh.

    Example:
        >>> one, some = Ban(Worker(1, 0), 7, host="a", hosts=1), Ban(Worker(1, 1), 9, host="b", hosts=3)
        >>> banned_hosts([one, some])
        frozenset({'b'})
    """
    return frozenset(ban.host for ban in bans if ban.host is not None and ban.hosts > 1)


def banned_keys(bans: Iterable[Ban]) -> frozenset[str]:
    """The keys of banned workers.

    Example:
        >>> sorted(banned_keys([Ban(Worker(1, 0), 7, key="ed25519:a"), Ban(Worker(1, 1), 9)]))
        ['ed25519:a']
    """
    return frozenset(ban.key for ban in bans if ban.key is not None)


def bans_here(bans: Iterable[Ban], mesh: Mesh, hosts: Sequence[str], keys: Sequence[str] = ()) -> list[Worker]:
    """The workers of this mesh that earlier bans apply to.

    Args:
        bans: of earlier runs.
        mesh: of this run.
        hosts: the machine of each rank; empty if unknown.
        keys: the public key of each rank; empty if workers have none.

    Returns:
        the workers to ban, in order: the one with the banned worker's key, or all of its machine, of several, if the key is gone.
        Without keys, then or now: if only places are known, or one machine serves the whole mesh then and now, the same places of
        the same mesh. Else the machine decides: the banned place if the machine still has it in the same mesh, all of its places
        if it has others, none if it is gone.

    Example:
        >>> ban = Ban(Worker(1, 1), 9, host="b", hosts=2, mesh=Mesh(2, 2))
        >>> bans_here([ban], Mesh(2, 2), ["b", "c", "a", "c"])
        [Worker(stage=1, replica=0)]
    """
    here: set[Worker] = set()
    for ban in bans:
        holders = {worker for worker, key in zip(mesh.workers, keys) if key == ban.key}
        if holders:
            here |= holders
            continue
        # Where workers have keys another one may have the place.
        named = ban.key is not None and bool(keys)
        same_mesh = not named and (ban.mesh is None or ban.mesh == mesh)
        if not hosts or ban.host is None:
            by_place = same_mesh
        elif ban.hosts <= 1:
            by_place = same_mesh and len(set(hosts)) == 1
        else:
            served = {worker for worker, host in zip(mesh.workers, hosts) if host == ban.host}
            by_place = same_mesh and ban.worker in served
            if not by_place:
                here |= served
        if by_place and ban.worker in mesh:
            here.add(ban.worker)
    return sorted(here)


def read_bans(path: Path | str) -> list[Ban]:
    """The bans in a file; none if there is no such file.

    Raises:
        ConfigurationError: if the file does not hold bans.
    """
    try:
        return [Ban.from_entry(entry) for entry in json.loads(Path(path).read_text())["banned"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{path} is not a ledger ({type(error).__name__}: {error}). Give Response(ledger=...) a file that an earlier run wrote,"
            " or one that does not exist yet; or repair it, if it was edited by hand."
        ) from error


def enter_bans(path: Path | str, bans: Iterable[Ban]) -> None:
    """Add bans to a file, which is replaced atomically; bans removed from it by hand stay removed.

    Several runs and machines may call it at once: each waits for the lock on a file beside it, which exists while it is held.

    Args:
        path: of the file; it and its folder are created if missing.
        bans: to add; the file keeps one per worker, machine and mesh.

    Raises:
        OSError: if the file cannot be written, or another process holds the lock for half a minute.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "ledger.json"
        >>> enter_bans(path, [Ban(Worker(1, 1), 9, host="b", hosts=2)])
        >>> enter_bans(path, [Ban(Worker(1, 1), 12, host="b", hosts=2), Ban(Worker(0, 1), 12, host="c", hosts=2)])
        >>> [(ban.host, ban.step) for ban in read_bans(path)]
        [('b', 9), ('c', 12)]
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f"{path.name}.lock")):
        kept = {ban.place: ban for ban in read_bans(path)}
        for ban in bans:
            kept.setdefault(ban.place, ban)
        # A unique name, because it need not be the same rank that writes every time.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as whole:
            whole.write(json.dumps({"banned": [ban.entry() for ban in kept.values()]}, indent=1) + "\n")
        Path(whole.name).replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock of the operating system, which releases it when the process dies.

    Raises:
        TimeoutError: if another process holds it for too long.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Unless the holder before has removed the file: then others lock a new one of that name.
            if path.exists() and os.fstat(file).st_ino == path.stat().st_ino:
                break
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(file)
                raise TimeoutError(f"another process has held the lock {path} for {_PATIENCE:g} s") from None
            time.sleep(0.02)
        except FileNotFoundError:
            pass  # removed between exists() and stat()
        os.close(file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)
