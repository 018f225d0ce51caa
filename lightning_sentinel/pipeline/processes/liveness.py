"""Processes that stop answering: how it is noticed, and who is named.

A rank that dies shows on its peers as a closed connection, and on *their* peers as theirs; a rank that hangs shows as a timeout.
So the first rank to notice writes down in the rendezvous store whom it lost, and those that fail in its wake read the name there. A
rank that ends with an error of its own writes that down as well.

The store goes with rank zero, which may be the one that failed, or the first to leave. So the note is also a file on each host
where somebody has written or read it. It stays there, a line in the directory of temporary files, because nobody knows who leaves
last.
"""

from __future__ import annotations

import os
import re
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

__all__ = ["Roster", "Start", "agree_on_round", "connect", "is_lost_connection", "notes", "sounds_lost"]

_LOST = re.compile(r"gloo|nccl|connection (was likely )?(closed|reset|refused)|timed? ?out|socket|broken pipe", re.IGNORECASE)
_WAITING = ("torch.distributed.", "lightning_sentinel.")
_MOMENT = timedelta(seconds=2)
_MOST_FRAMES = 8
_MOST_OF_A_NOTE = 4000
_PACKAGE = str(Path(__file__).resolve().parents[2])
_start: Start | None = None


class Start(NamedTuple):
    """What the processes of a start have in common.

    Args:
        store: of this start alone.
        ranks: who forms the mesh, in its order, by the ranks that they were started with.
    """

    store: Store
    ranks: tuple[int, ...]


def sounds_lost(error: BaseException) -> bool:
    """Whether an error of a call into ``torch.distributed`` means that a peer is gone; the backends raise ``RuntimeError``."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error, wherever it comes from, means that a peer is gone.

    Words do not tell by themselves, because a user's own code may say that something "timed out". So its last line in Python has to
    be in ``torch.distributed``, or in this package, which waits for peers.
    """
    return sounds_lost(error) and _raised_by(error).startswith(_WAITING)


def _raised_by(error: BaseException) -> str:
    """The Python module where an error was raised."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__", ""))


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
    """Start ``torch.distributed``, unless it runs already.

    Args:
        backend: of the process group.
        address: of the rendezvous.
        port: of the rendezvous.
        rank: that this process was started with.
        world_size: how many were started.
        timeout: how long they wait for each other.
        admit: decides who of them forms the mesh, the same on all; ``None`` if all do. Who is not in it stays out of the group.

    Returns:
        what they have in common; ``None`` if somebody else started it.
    """
    global _start
    if not dist.is_initialized():
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
        shared, _, _ = next(rendezvous("env://", rank=rank, world_size=world_size, timeout=timeout))
        store = PrefixStore(agree_on_round(shared, rank, world_size, timeout), shared)
        ranks = tuple(range(world_size)) if admit is None else admit(store)
        if rank in ranks:
            default = PrefixStore("default", store)
            place = ranks.index(rank)
            dist.init_process_group(backend, store=default, rank=place, world_size=len(ranks), timeout=timeout)
        _start = Start(store, ranks)
    return _start


def agree_on_round(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that all ranks of this start have in common, and no earlier start had.

    Under torchrun the store outlives a restart, and with it the addresses of processes that are gone (torch 2.13 takes the store to
    be a new one, which it is not where the rendezvous shares it). So ranks greet each other by names of their own; rank zero says
    whom it sees, until everybody has found itself there.

    Args:
        store: of the rendezvous.
        rank: this process's.
        world_size: how many there are.
        timeout: how long they wait for each other.

    Raises:
        WorkerLostError: if somebody does not turn up.
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
    """The part of a start's store in which rosters write; who ends with an error leaves a note under ``failure``."""
    return PrefixStore("sentinel", store)


class Roster:
    """Knows which process serves which worker, and finds out who is missing.

    Args:
        mesh: all workers.
        rank: this process's.
        store: shared notes; ``None`` names only direct neighbours.
        timeout: how long peers are waited for, to be named in messages.

    Attributes:
        hosts: the name of each rank's machine, from :meth:`meet` on; empty if there is no store.
    """

    def __init__(self, mesh: Mesh, rank: int, store: Store | None, timeout: timedelta) -> None:
        self._mesh = mesh
        self._rank = rank
        self._timeout = timeout
        self._store = None if store is None else notes(store)
        self.hosts: tuple[str, ...] = ()
        if self._store is not None:
            self._store.set(f"host/{rank}", host_name())
            # The machine as it is, whatever it is called: only there can its processes be looked at.
            self._store.set(f"process/{rank}", f"{socket.gethostname()} {os.getpid()}")
        self._processes: dict[int, tuple[str, int]] = {}
        self._file: Path | None = None

    def meet(self) -> None:
        """Learn which process serves which rank, while the store's host is known to be there."""
        if self._store is not None:
            # A name that others on the host cannot foresee.
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
            # What the connection said explains nothing more where it is known what its other end said.
            raise found from (None if found.told else error)

    def report_failure(self, error: BaseException) -> None:
        """Write down that this rank ends with an error, so that its peers can say why.

        A malformed message is the fault of the rank that sent it, not of the one that refused it.
        """
        if isinstance(error, MalformedMessageError) and error.rank is not None:
            reason = _first_line(error.__cause__ or error)
            self._note(error.rank, f"{self._describe(error.rank)} sent a malformed message: {reason}")
        elif not isinstance(error, WorkerLostError):
            where = "".join(f" {place}" for place in places(error)[:1])
            why = f": {line}" if (line := _first_line(error)) else ""
            said = f"{self._describe(self._rank)} failed{where} with {type(error).__name__}{why}"
            # Who was told to end has nothing to mend.
            trace = f"\n{_trace(error)}" if isinstance(error, Exception) else ""
            self._note(self._rank, f"{said[:_MOST_OF_A_NOTE]}{trace[:_MOST_OF_A_NOTE]}")

    def _named(self, suspect: int | None) -> WorkerLostError:
        gone = self._gone()
        note = None
        # A process that ends closes its connections first. And who waited for the lost rank itself knows which it is, and may be
        # about to write that down.
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
            # It would fail there again.
            text = f"The run cannot go on: {text}. Mend that first; this is where it happened on rank {rank}:\n{trace}"
        else:
            text = f"The run cannot go on: {text}. Start it again from the last checkpoint."
        return WorkerLostError(text, rank=rank, told=bool(trace))

    def _describe(self, rank: int) -> str:
        return f"rank {rank}, {self._mesh.worker(rank)},"

    def _gone(self) -> list[int]:
        return [rank for rank in range(self._mesh.size) if rank != self._rank and self._is_gone(rank)]

    def _is_gone(self, rank: int) -> bool:
        """Whether a process of this host has ended or is stopped; of other hosts nothing is known."""
        host, pid = self._processes.get(rank, ("", 0))
        if host != socket.gethostname():
            return False
        try:
            return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD, psutil.STATUS_STOPPED)
        except psutil.NoSuchProcess:
            return True

    def _note(self, rank: int, text: str) -> tuple[int, str]:
        """Write a note on ``rank`` unless there is one, and return the one that stands: the first is nearest to the cause."""
        note = f"{rank} {text}".encode()
        try:
            if self._store is not None:
                note = self._store.compare_set("failure", "", note.decode())
        except RuntimeError:
            pass  # the store went with its host
        return _parsed(self._signal_cache(note))

    def _read(self) -> tuple[int, str] | None:
        try:
            if self._store is not None and self._store.check(["failure"]):
                return _parsed(self._signal_cache(self._store.get("failure")))
        except RuntimeError:
            pass  # the store is gone
        return _parsed(self._file.read_bytes()) if self._file is not None and self._file.exists() else None

    def _signal_cache(self, note: bytes) -> bytes:
        """Write a note to this host's file unless there is one, and return the one that stands."""
        if self._file is None:
            return note
        try:
            with tempfile.NamedTemporaryFile(dir=self._file.parent) as whole:
                whole.write(note)
                whole.flush()
                # Fails if the name is taken, and shows nobody half a note.
                os.link(whole.name, self._file)
        except FileExistsError:
            return self._file.read_bytes()
        except OSError:
            pass  # a disk that is full must not hide what happened
        return note


def _trace(error: BaseException) -> str:
    """The user's own frames of a traceback and the one that raised, and the error with its notes."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames[:-1] if "site-packages" not in frame.filename and not frame.filename.startswith(_PACKAGE)]
    lines = traceback.format_list([*own, *frames[-1:]][-_MOST_FRAMES:]) + traceback.format_exception_only(error)
    return "".join(lines).rstrip()


def _first_line(error: BaseException) -> str:
    """Without its full stop, because it becomes a part of a sentence."""
    return (str(error).splitlines() or [""])[0].rstrip(".")


def _parsed(note: bytes) -> tuple[int, str]:
    rank, text = note.decode().split(" ", 1)
    return int(rank), text
