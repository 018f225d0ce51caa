"""Bans that outlive a run: taken over from a file, a checkpoint or the user, and kept for later runs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch.distributed import Store

from lightning_sentinel.config import Response
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.processes.admission import agree_on_admission
from lightning_sentinel.trust.evidence import Evidence
from lightning_sentinel.trust.evidence_files import file_name
from lightning_sentinel.trust.identity import PublicKey
from lightning_sentinel.verification import Ledger
from lightning_sentinel.verification.bans import Ban, bans_here, enter_bans, read_bans

__all__ = ["BanKeeper"]


class BanKeeper:
    """Takes bans over from earlier runs, and keeps them for later ones.

    Args:
        response: which workers are banned from the start, and in which file bans are kept.
        ledger: flags and bans of this run.
    """

    def __init__(self, response: Response, ledger: Ledger) -> None:
        self._response = response
        self._ledger = ledger
        self._mesh = Mesh(1, 1)
        self._rank = 0
        self._hosts: Sequence[str] = ()
        """The machine of each rank; empty if they are not known."""
        self._keys: Sequence[str] = ()
        """The public key of each rank; empty if they have none."""
        self.evidence: dict[Worker, Evidence] = {}
        """What shows why workers were banned in this run, as far as it can be shown."""
        self._filed: list[Ban] | None = None
        """Bans in the file at the start of the run; ``None`` without a file."""

    def admit(
        self,
        store: Store,
        rank: int,
        world_size: int,
        stages: int | None,
        replicas: int | None,
        key: PublicKey | None,
    ) -> tuple[int, ...]:
        """The started ranks that form the mesh, in order; the same on all ranks.

        Args:
            store: the store that all ranks share.
            rank: the rank of this process.
            world_size: number of started processes.
            stages: number of stages, as the user gave it.
            replicas: number of replicas, as the user gave it.
            key: of this process, if it has one.
        """
        path = self._response.ledger
        if path is None:
            return tuple(range(world_size))
        return agree_on_admission(store, rank, world_size, path, stages, replicas, None if key is None else str(key))

    def read(self, mesh: Mesh, rank: int, hosts: Sequence[str], keys: Sequence[PublicKey], broadcast: Callable[[Any], Any]) -> None:
        """Read the file of bans, if there is one. All ranks read it, so that all report its errors; what rank zero read counts.

        Args:
            mesh: all workers.
            rank: the rank of this process.
            hosts: the machine of each rank; empty if they are not known.
            keys: of each rank; empty if they have none.
            broadcast: gives all ranks the value of rank zero.

        Raises:
            ConfigurationError: if the file could not be written later.
        """
        self._mesh = mesh
        self._rank = rank
        self._hosts = hosts
        self._keys = tuple(map(str, keys))
        self._ledger.hosts = dict(zip(mesh.workers, hosts))
        self._ledger.keys = dict(zip(mesh.workers, self._keys))
        if self._response.ledger is None:
            return
        path = Path(self._response.ledger)
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ConfigurationError(
                f"Response(ledger={str(path)!r}) cannot be written: {folder} is "
                + ("read-only." if folder.is_dir() else "no folder.")
                + " Choose a path that all machines can read and write, such as one beside the checkpoints."
            )
        entries = [ban.entry() for ban in read_bans(path)] if path.exists() else None
        entries = broadcast(entries)
        self._filed = None if entries is None else [Ban.from_entry(entry) for entry in entries]

    def take_over(self) -> None:
        """Enter the bans that the user names and those in the file into the ledger."""
        self._ledger.ban(0, [Worker.of(worker, "Response.banned") for worker in self._response.banned])
        self._ledger.ban(0, bans_here(self._filed or [], self._mesh, self._hosts, self._keys))

    def resume(self, state: Mapping[str, Any], written_on: Mesh, step: int) -> list[str]:
        """Take over flags and bans from a checkpoint.

        Args:
            state: the state of the checkpoint's ledger.
            written_on: the mesh that the checkpoint was written on.
            step: training batches so far.

        Returns:
            sentences that tell the user what differs now.
        """
        before = Ledger()
        now = self._ledger
        before.load_state_dict(state)
        imported = now.banned
        hosts = now.hosts
        keys = now.keys
        told = []
        # The file has later bans than the checkpoint; and bans that are no longer in it were removed by the user.
        here = bans_here(before.bans(written_on), self._mesh, self._hosts, self._keys) if self._filed is None else []
        one_machine = len(set(before.hosts.values())) == len(set(hosts.values())) == 1
        if written_on == self._mesh and (not before.hosts or not hosts or before.hosts == hosts or one_machine):
            now.load_state_dict(state)
            now.hosts = hosts
            now.keys = keys
            now.banned_at = {worker: at for worker, at in before.banned_at.items() if worker in imported or worker in here}
        elif before.banned:
            told.append(_told(before, here, sorted(imported)))
        now.ban(step, {*imported, *here})
        self.keep(here)
        return told

    def keep(self, workers: Collection[Worker], evidence: Mapping[Worker, Evidence] = MappingProxyType({})) -> None:
        """Enter the bans of these workers in the file. The first rank whose machine has no banned worker writes it.

        Args:
            workers: that were banned.
            evidence: what shows why, as far as it can be shown.
        """
        self.evidence.update(evidence)
        self._ledger.evidence.update({worker: file_name(one) for worker, one in evidence.items()})
        banned = {self._ledger.hosts.get(worker) for worker in self._ledger.banned}
        writer = next((rank for rank, host in enumerate(self._hosts) if host not in banned), 0)
        if workers and self._rank == writer:
            self._enter([ban for ban in self._ledger.bans(self._mesh) if ban.worker in workers])

    def keep_malformed(self, worker: Worker, step: int) -> None:
        """Ban the sender of a malformed message that ends the run.

        The rank that received the message enters the ban: torchrun may end rank zero before it hears of it.
        """
        self._ledger.ban(step, [worker])
        (ban,) = (ban for ban in self._ledger.bans(self._mesh) if ban.worker == worker)
        self._enter([replace(ban, reason="malformed message")])

    def _enter(self, bans: Sequence[Ban]) -> None:
        if self._response.ledger is None:
            return
        try:
            enter_bans(self._response.ledger, bans)
        except OSError as error:
            # The ban is in force in this run all the same, so the run can go on.
            warnings.warn(
                f"{', '.join(str(ban.worker) for ban in bans)} could not be entered in {self._response.ledger}"
                f" ({type(error).__name__}: {error}), so a restart will not leave its machine out. Make the file writable.",
                stacklevel=2,
            )


def _told(before: Ledger, here: Sequence[Worker], imported: Sequence[Worker]) -> str:
    places = [f"{worker}" + (f" on {before.hosts[worker]!r}" if worker in before.hosts else "") for worker in sorted(before.banned)]
    banned = ", ".join(map(str, sorted({*here, *imported}))) or "nobody"
    return (
        f"Banned there were {', '.join(places)}; here those places may be other machines', so banned are: {banned}. See that no"
        " machine is among these that should not be, or name its places in Response(banned=[...])."
    )
