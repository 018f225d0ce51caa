"""Bans that outlive a run: a file of them, and whom they concern in a mesh of other machines.

In a mesh that one machine serves a ban is about a place, because the machine is the same for everybody. In a mesh of several it is
about the machine: who controls one of its processes controls them all, and its place may be another machine's in the next run.
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

__all__ = ["Ban", "banned_hosts", "bans_here", "enter_bans", "read_bans"]

_PATIENCE = 30.0
"""Seconds to wait for others that write."""


@dataclass(frozen=True)
class Ban:
    """A worker that was banned, and where it was.

    Args:
        worker: its place.
        step: number of the training batch.
        flags: how many of its signals were flagged.
        host: the machine that served it; ``None`` if that is not known.
        hosts: how many machines served the mesh.
        mesh: in which it had its place; ``None`` if that is not known.
        reason: why, in a word or two.
    """

    worker: Worker
    step: int
    flags: int = 0
    host: str | None = None
    hosts: int = 0
    mesh: Mesh | None = None
    reason: str = "signals"

    @property
    def place(self) -> tuple[Worker, str | None, Mesh | None]:
        """What makes it another ban than another."""
        return self.worker, self.host, self.mesh

    def entry(self) -> dict[str, Any]:
        """As it is in the file."""
        return {
            "stage": self.worker.stage,
            "replica": self.worker.replica,
            "step": self.step,
            "flags": self.flags,
            "host": self.host,
            "hosts": self.hosts,
            "mesh": None if self.mesh is None else [self.mesh.stages, self.mesh.replicas],
            "reason": self.reason,
        }

    @classmethod
    def from_entry(cls, entry: Any) -> Ban:
        """The inverse of :meth:`entry`; takes those that :meth:`Ledger.export` writes, too."""
        host, mesh = entry.get("host"), entry.get("mesh")
        return cls(
            Worker(int(entry["stage"]), int(entry["replica"])),
            int(entry["step"]),
            int(entry.get("flags", 0)),
            None if host is None else str(host),
            int(entry.get("hosts", 0)),
            None if mesh is None else Mesh(*map(int, mesh)),
            str(entry.get("reason", "signals")),
        )


def banned_hosts(bans: Iterable[Ban]) -> frozenset[str]:
    """The machines that are banned as a whole: those that served a part of a mesh.

    Example:
        >>> one, some = Ban(Worker(1, 0), 7, host="a", hosts=1), Ban(Worker(1, 1), 9, host="b", hosts=3)
        >>> banned_hosts([one, some])
        frozenset({'b'})
    """
    return frozenset(ban.host for ban in bans if ban.host is not None and ban.hosts > 1)


def bans_here(bans: Iterable[Ban], mesh: Mesh, hosts: Sequence[str]) -> list[Worker]:
    """Whom earlier bans concern in this mesh.

    Args:
        bans: of earlier runs.
        mesh: of this one.
        hosts: the machine of each rank; empty if they are not known.

    Returns:
        the workers to ban, in order. Where only places are known, or one machine served everybody and one does now, the same places
        of the same mesh. Else the machines decide: one that still has the place in the same mesh is banned there, one that is
        elsewhere in the mesh in all its places, and one that is gone nowhere.

    Example:
        >>> ban = Ban(Worker(1, 1), 9, host="b", hosts=2, mesh=Mesh(2, 2))
        >>> bans_here([ban], Mesh(2, 2), ["b", "c", "a", "c"])
        [Worker(stage=1, replica=0)]
    """
    here: set[Worker] = set()
    for ban in bans:
        same_mesh = ban.mesh is None or ban.mesh == mesh
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
        ConfigurationError: if the file is something else.
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
    """Add bans to a file, which is replaced as a whole; those that somebody removed from it stay removed.

    Several runs and machines may do so at once: each waits for the lock on a file beside it, which is there for as long.

    Args:
        path: of the file; it and its folder are made if they do not exist.
        bans: to add. Those of the same worker of the same machine and mesh are in it once.

    Raises:
        OSError: if it cannot be written, or another holds the lock for half a minute.

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
        # A name of its own, because it need not be the same rank that writes every time.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as whole:
            whole.write(json.dumps({"banned": [ban.entry() for ban in kept.values()]}, indent=1) + "\n")
        Path(whole.name).replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock of the operating system, which lets it go with a process that dies.

    Raises:
        TimeoutError: if another holds it for too long.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it before has removed it: then others lock another file of that name.
            if path.exists() and os.fstat(file).st_ino == path.stat().st_ino:
                break
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(file)
                raise TimeoutError(f"another process has held the lock {path} for {_PATIENCE:g} s") from None
            time.sleep(0.02)
        except FileNotFoundError:
            pass  # removed between the two looks
        os.close(file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)
