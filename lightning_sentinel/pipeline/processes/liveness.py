"""Detects processes that stop answering, and reports the rank that caused the failure.

When a rank dies, its peers see a closed connection and fail; then *their* peers see one too. A rank that hangs shows as a timeout.
So the first rank to notice writes a note into the rendezvous store that names the lost rank, and the ranks that fail after it read
the note. A rank that ends with an error of its own writes a note as well.

The store ends with rank zero, which may be the rank that failed, or the first to exit. So each host on which a rank has written or
read the note keeps it as a file too. This one line in the directory of temporary files is never removed, because no process knows
whether it is the last.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import psutil
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, rendezvous

from lightning_sentinel.errors import MalformedMessageError, WorkerLostError, places
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.pipeline.processes.hosts import host_name
from lightning_sentinel.pipeline.processes.lost_connections import is_lost_connection
from lightning_sentinel.pipeline.processes.torch_wire import TorchWire
from lightning_sentinel.pipeline.processes.wire import install, is_connected

__all__ = ["Roster", "Start", "agree_on_round", "connect", "notes"]

_MOMENT = timedelta(seconds=2)
_MOST_FRAMES = 8
_MOST_OF_A_NOTE = 4000
_PACKAGE = str(Path(__file__).resolve().parents[2])
_start: Start | None = None


class Start(NamedTuple):
    """The data that all processes of one start share.

    Args:
        store: of this start alone.
        ranks: the original ranks of the mesh's processes, in the mesh's order.
    """

    store: Store
    ranks: tuple[int, ...]


def connect(
    backend: str,
    *,
    address: str,
    port: int,
    rank: int,
    world_size: int,
    timeout: timedelta,
    admit: Callable[[Store], tuple[int, ...]] | None = None,
) -> Start | None:
    """Initialize ``torch.distributed``, unless it is initialized already, and install the wire over it, unless there is one.

    Args:
        backend: of the process group.
        address: of the rendezvous.
        port: of the rendezvous.
        rank: with which this process was started.
        world_size: number of started processes.
        timeout: how long processes wait for each other.
        admit: returns the ranks that form the mesh, the same on all; ``None`` admits all. Other ranks do not join the group.

    Returns:
        the data that all processes share; ``None`` if other code initialized ``torch.distributed``.
    """
    global _start
    if not dist.is_initialized():
        os.environ["MASTER_ADDR"] = address
        os.environ["MASTER_PORT"] = str(port)
        shared, _, _ = next(rendezvous("env://", rank=rank, world_size=world_size, timeout=timeout))
        store = PrefixStore(agree_on_round(shared, rank, world_size, timeout), shared)
        ranks = tuple(range(world_size)) if admit is None else admit(store)
        if rank in ranks:
            default = PrefixStore("default", store)
            place = ranks.index(rank)
            dist.init_process_group(backend, store=default, rank=place, world_size=len(ranks), timeout=timeout)
        _start = Start(store, ranks)
    if dist.is_initialized() and not is_connected():
        install(TorchWire(timeout))
    return _start


def agree_on_round(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Agree on an id that all ranks of this start share, and no earlier start had.

    Under torchrun the store outlives a restart, and with it the addresses of processes that are gone (torch 2.13 assumes a new
    store, which is wrong if the rendezvous shares it). So each rank writes a random id, and rank zero publishes the ids that it
    sees, until every rank has found its own among them.

    Args:
        store: of the rendezvous.
        rank: of this process.
        world_size: number of ranks.
        timeout: how long ranks wait for each other.

    Raises:
        WorkerLostError: if a rank does not turn up.
    """
    me = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    others = range(1, world_size)
    store.set(f"hello/{rank}", me)
    while time.monotonic() < deadline:
        if rank == 0:
            hellos = [f"hello/{r}" for r in range(world_size)]
            if store.check(hellos):
                seen = ",".join(store.get(hello).decode() for hello in hellos)
                name = uuid.uuid5(uuid.NAMESPACE_OID, seen).hex
                store.set("seen", seen)
                if not others or store.check([f"{name}/ready/{r}" for r in others]):
                    store.set(f"{name}/go", "")
                    return name
        elif store.check(["seen"]):
            seen = store.get("seen").decode()
            name = uuid.uuid5(uuid.NAMESPACE_OID, seen).hex
            if me in seen.split(","):
                store.set(f"{name}/ready/{rank}", "")
                if store.check([f"{name}/go"]):
                    return name
        time.sleep(0.02)
    missing = [r for r in range(world_size) if not store.check([f"hello/{r}"])]
    raise WorkerLostError(
        f"The run cannot start: within {timeout} rank {rank} did not come together with {world_size - 1} others"
        + (f"; never heard of {missing}." if missing else ".")
        + " See that all of them were started, with the same address and port."
    )


def notes(store: Store) -> Store:
    """The prefix of a start's store that rosters use. The note on a failed rank is under ``failure``."""
    return PrefixStore("sentinel", store)


class Roster:
    """Knows which process serves which worker, and finds out which rank is lost.

    Args:
        mesh: all workers.
        rank: of this process.
        store: of this start; ``None`` limits reports to direct neighbours.
        timeout: how long a rank waits for its peers, for messages.

    Attributes:
        hosts: the name of each rank's machine, from :meth:`meet` on; empty without a store.
    """

    def __init__(self, mesh: Mesh, rank: int, store: Store | None, timeout: timedelta) -> None:
        self._mesh = mesh
        self._rank = rank
        self._timeout = timeout
        self._store = None if store is None else notes(store)
        self.hosts: tuple[str, ...] = ()
        if self._store is not None:
            self._store.set(f"host/{rank}", host_name())
            # The real host name, not LIGHTNING_SENTINEL_HOST: processes can be looked at only on their own machine.
            self._store.set(f"process/{rank}", f"{socket.gethostname()} {os.getpid()}")
        self._processes: dict[int, tuple[str, int]] = {}
        self._file: Path | None = None

    def meet(self) -> None:
        """Read every rank's host and process id from the store, while the process that hosts the store is certainly alive."""
        if self._store is not None:
            # A file name that other users of the host cannot guess.
            name = self._store.compare_set("name", "", secrets.token_hex(16)).decode()
            self._file = Path(tempfile.gettempdir()) / f"lightning-sentinel-{name}"
            for rank in range(self._mesh.size):
                host, pid = self._store.get(f"process/{rank}").decode().rsplit(" ", 1)
                self._processes[rank] = (host, int(pid))
            self.hosts = tuple(self._store.get(f"host/{rank}").decode() for rank in range(self._mesh.size))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Turn the loss of a peer into a ``WorkerLostError`` that names it."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, WorkerLostError) and not is_lost_connection(error):
                raise
            found = self._named(error.rank if isinstance(error, WorkerLostError) else None)
            # If the note has the peer's own traceback, the connection's error adds nothing.
            raise found from (None if found.told else error)

    def report_failure(self, error: BaseException) -> None:
        """Write a note that this rank ends with an error, so that its peers can report the cause.

        For a malformed message, the note names the rank that sent it, not the rank that refused it.
        """
        if isinstance(error, MalformedMessageError) and error.rank is not None:
            reason = _first_line(error.__cause__ or error)
            self._note(error.rank, f"{self._describe(error.rank)} sent a malformed message: {reason}")
        elif not isinstance(error, WorkerLostError):
            where = "".join(f" {place}" for place in places(error)[:1])
            why = f": {line}" if (line := _first_line(error)) else ""
            said = f"{self._describe(self._rank)} failed{where} with {type(error).__name__}{why}"
            # KeyboardInterrupt and SystemExit are no errors to fix, so the note needs no traceback.
            trace = f"\n{_trace(error)}" if isinstance(error, Exception) else ""
            self._note(self._rank, f"{said[:_MOST_OF_A_NOTE]}{trace[:_MOST_OF_A_NOTE]}")

    def _named(self, suspect: int | None) -> WorkerLostError:
        gone = self._gone()
        note = None
        # Wait a moment: a process closes its connections before it is gone. And the rank that waited for the lost rank itself knows
        # which it is, and may be about to write the note.
        deadline = time.monotonic() + _MOMENT.total_seconds()
        while not gone and suspect is None and note is None and time.monotonic() < deadline:
            time.sleep(0.02)
            gone = self._gone()
            note = self._read()
        gone = gone or ([suspect] if suspect is not None else [])
        silence = (
            f"did not answer within {self._timeout}, or its process ended; if it was only slow, a larger"
            " SentinelStrategy(timeout=...) helps"
        )
        if gone:
            lost = " and ".join(self._describe(rank) for rank in gone)
            rank: int | None
            rank, text = self._note(gone[0], f"{lost} {silence}")
        else:
            rank, text = note or (None, f"a worker {silence}")
        text, _, trace = text.partition("\n")
        if trace:
            # A restarted run would fail there again.
            text = f"The run cannot go on: {text}. Mend that first; this is where it happened on rank {rank}:\n{trace}"
        else:
            text = f"The run cannot go on: {text}. Start it again from the last checkpoint."
        return WorkerLostError(text, rank=rank, told=bool(trace))

    def _describe(self, rank: int) -> str:
        return f"rank {rank}, {self._mesh.worker(rank)},"

    def _gone(self) -> list[int]:
        return [rank for rank in range(self._mesh.size) if rank != self._rank and self._is_gone(rank)]

    def _is_gone(self, rank: int) -> bool:
        """Whether a process on this host has ended or is stopped; ``False`` for processes on other hosts."""
        host, pid = self._processes.get(rank, ("", 0))
        if host != socket.gethostname():
            return False
        try:
            return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD, psutil.STATUS_STOPPED)
        except psutil.NoSuchProcess:
            return True

    def _note(self, rank: int, text: str) -> tuple[int, str]:
        """Write a note on ``rank`` unless there is one already, and return the valid note: the first is nearest to the cause."""
        note = f"{rank} {text}".encode()
        try:
            if self._store is not None:
                note = self._store.compare_set("failure", "", note.decode())
        except RuntimeError:
            pass  # the process that hosted the store is gone
        return _parsed(self._kept_note(note))

    def _read(self) -> tuple[int, str] | None:
        try:
            if self._store is not None and self._store.check(["failure"]):
                return _parsed(self._kept_note(self._store.get("failure")))
        except RuntimeError:
            pass  # the store is gone
        return _parsed(self._file.read_bytes()) if self._file is not None and self._file.exists() else None

    def _kept_note(self, note: bytes) -> bytes:
        """Write a note to this host's file unless there is one already, and return the valid note."""
        if self._file is None:
            return note
        try:
            with tempfile.NamedTemporaryFile(dir=self._file.parent) as whole:
                whole.write(note)
                whole.flush()
                # Atomic: fails if the file exists, and no other process can read half a note.
                os.link(whole.name, self._file)
        except FileExistsError:
            return self._file.read_bytes()
        except OSError:
            pass  # a full disk must not hide the failure itself
        return note


def _trace(error: BaseException) -> str:
    """A traceback's frames of user code and the frame that raised, then the error with its notes."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames[:-1] if "site-packages" not in frame.filename and not frame.filename.startswith(_PACKAGE)]
    lines = traceback.format_list([*own, *frames[-1:]][-_MOST_FRAMES:]) + traceback.format_exception_only(error)
    return "".join(lines).rstrip()


def _first_line(error: BaseException) -> str:
    """First line of an error's message, without the full stop, because it becomes part of a sentence."""
    return (str(error).splitlines() or [""])[0].rstrip(".")


def _parsed(note: bytes) -> tuple[int, str]:
    rank, text = note.decode().split(" ", 1)
    return int(rank), text
