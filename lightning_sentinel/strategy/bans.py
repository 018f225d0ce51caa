"""The part of the strategy that is about bans: those of a step, and those which outlive a run, in a file or a checkpoint."""

from __future__ import annotations

import os
import warnings
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from torch.distributed import Store
from typing_extensions import override

from lightning_sentinel.errors import ConfigurationError, MalformedMessageError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.processes.admission import agree_on_admission
from lightning_sentinel.pipeline.processes.hosts import host_name
from lightning_sentinel.pipeline.recovery.guard import Guard, Ruling
from lightning_sentinel.strategy.announcements import Announcements, announce_detections, keep_latest
from lightning_sentinel.strategy.processes import ProcessStrategy
from lightning_sentinel.verification import Detection, Ledger, SignalTable
from lightning_sentinel.verification.bans import Ban, bans_here, enter_bans, read_bans
from lightning_sentinel.wiring import Wiring

__all__ = ["LastingBans"]


class LastingBans(ProcessStrategy):
    """Takes bans over from earlier runs, and keeps them for later ones.

    Attributes:
        step: training batches so far.
        ledger: flags and bans.
    """

    step: int
    ledger: Ledger
    _filed: list[Ban] | None
    detections: list[Detection]
    table: SignalTable | None
    wiring: Wiring | None
    _guard: Guard | None
    _announcements: Announcements

    @property
    @abstractmethod
    def _trainer(self) -> L.Trainer:
        """Of the run."""

    @property
    @abstractmethod
    def mesh(self) -> Mesh:
        """Who serves what."""

    @override
    def _admit(self, store: Store) -> tuple[int, ...]:
        path = self.response.ledger
        if path is None:
            return super()._admit(store)
        return agree_on_admission(store, self.global_rank, self.world_size, path, self.stages, self.replicas)

    @property
    def _hosts(self) -> Sequence[str]:
        """The machine of each rank; empty if they are not known."""
        assert self._roster is not None
        return (host_name(),) * self.mesh.size if self._virtual else self._roster.hosts

    def _read_bans(self) -> None:
        """Read the file, if there is one. All do, so that all say what is wrong with it; what rank zero read counts."""
        if self.response.ledger is None:
            return
        path = Path(self.response.ledger)
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ConfigurationError(
                f"Response(ledger={str(path)!r}) cannot be written: {folder} is "
                + ("read-only." if folder.is_dir() else "no folder.")
                + " Choose a path that all machines can read and write, such as one beside the checkpoints."
            )
        entries = [ban.entry() for ban in read_bans(path)] if path.exists() else None
        entries = self.broadcast(entries)
        self._filed = None if entries is None else [Ban.from_entry(entry) for entry in entries]

    def _take_over_bans(self) -> None:
        """Those that the user names, and those in the file."""
        self.ledger.ban(0, [Worker.of(worker, "Response.banned") for worker in self.response.banned])
        self.ledger.ban(0, bans_here(self._filed or [], self.mesh, self._hosts))

    def _resume_bans(self, state: Mapping[str, Any], written_on: Mesh) -> list[str]:
        """Take over flags and bans from a checkpoint.

        Args:
            state: of its ledger.
            written_on: the mesh that it was written on.

        Returns:
            sentences on what is another now.
        """
        before, now, told = Ledger(), self.ledger, []
        before.load_state_dict(state)
        imported, hosts = now.banned, now.hosts
        # The file has later bans than the checkpoint; and those that are no longer in it were taken out by somebody.
        here = bans_here(before.bans(written_on), self.mesh, self._hosts) if self._filed is None else []
        one_machine = len(set(before.hosts.values())) == len(set(hosts.values())) == 1
        if written_on == self.mesh and (not before.hosts or not hosts or before.hosts == hosts or one_machine):
            now.load_state_dict(state)
            now.hosts = hosts
            now.banned_at = {worker: step for worker, step in before.banned_at.items() if worker in imported or worker in here}
        elif before.banned:
            told.append(_told(before, here, sorted(imported)))
        now.ban(self.step, {*imported, *here})
        self._keep_bans(here)
        return told

    def _take_in_ruling(self, ruling: Ruling) -> None:
        """Keep what was found in a step, and tell whoever listens."""
        self.table, self.wiring = ruling.verdict.table, ruling.plan.wiring
        keep_latest(self.detections, ruling.verdict.detections)
        self._keep_bans(ruling.banned)
        announce_detections(self._trainer, ruling.verdict.detections)
        absent = ruling.plan.absent.union(ruling.banned, ruling.excluded)
        self._announcements.tell(self._trainer, ruling, self.ledger, len(Wiring.of(self.mesh, absent).lanes))

    def _keep_bans(self, workers: Collection[Worker]) -> None:
        """Enter bans in the file, from the first rank whose machine has none; the others know of them, too."""
        banned = {self.ledger.hosts.get(worker) for worker in self.ledger.banned}
        writer = next((rank for rank, host in enumerate(self._hosts) if host not in banned), 0)
        if workers and self.global_rank == writer:
            self._enter([ban for ban in self.ledger.bans(self.mesh) if ban.worker in workers])

    def _enter(self, bans: Sequence[Ban]) -> None:
        if self.response.ledger is None:
            return
        try:
            enter_bans(self.response.ledger, bans)
        except OSError as error:
            # The ban is in force all the same, and the run is not worse for it.
            warnings.warn(
                f"{', '.join(str(ban.worker) for ban in bans)} could not be entered in {self.response.ledger}"
                f" ({type(error).__name__}: {error}), so a restart will not leave its machine out. Make the file writable.",
                stacklevel=2,
            )

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self._roster is None:
            return
        self._roster.report_failure(exception)
        if isinstance(exception, MalformedMessageError) and exception.rank is not None:
            # Entered by who received it: torchrun may end rank zero before it hears of it.
            worker = self.mesh.worker(exception.rank)
            self.ledger.ban(self.step, [worker])
            (ban,) = (ban for ban in self.ledger.bans(self.mesh) if ban.worker == worker)
            self._enter([replace(ban, reason="malformed message")])


def _told(before: Ledger, here: Sequence[Worker], imported: Sequence[Worker]) -> str:
    places = [f"{worker}" + (f" on {before.hosts[worker]!r}" if worker in before.hosts else "") for worker in sorted(before.banned)]
    banned = ", ".join(map(str, sorted({*here, *imported}))) or "nobody"
    return (
        f"Banned there were {', '.join(places)}; here those places may be other machines', so banned are: {banned}. See that no"
        " machine is among these that should not be, or name its places in Response(banned=[...])."
    )
