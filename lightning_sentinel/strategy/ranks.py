"""The part of the strategy that every parallel strategy of Lightning has: devices, ranks, a launcher and collectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.strategies.strategy import TBroadcast
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.distributed import Store
from typing_extensions import override

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.processes.renumbering import RenumberedEnvironment
from lightning_sentinel.strategy.bans import BanKeeper
from lightning_sentinel.strategy.readable import ReadableStrategy
from lightning_sentinel.strategy.refusals import check_replicas, refuse_launch
from lightning_sentinel.strategy.run_state import RunState
from lightning_sentinel.trust.evidence import Evidence

__all__ = ["RankedStrategy"]


class RankedStrategy(ReadableStrategy, ParallelStrategy):
    """A strategy with a process for each worker, or with all workers in one process.

    Args:
        run: the state of the run.
        bans: knows which started processes are left out.
        arguments: the arguments of ``ParallelStrategy``.
    """

    def __init__(self, run: RunState, bans: BanKeeper, **arguments: Any) -> None:
        ReadableStrategy.__init__(self, run)
        ParallelStrategy.__init__(self, **arguments)
        self._bans = bans
        self._chosen_accelerator = self._accelerator
        self._number_of_nodes = 1
        self._has_trainer = False

    @property
    def mesh(self) -> Mesh:
        """The mesh of workers; known once the Trainer has been made."""
        return self._settings.mesh(self.world_size)

    @property
    def worker(self) -> Worker:
        """The worker that this process is."""
        return self.mesh.worker(self.global_rank)

    @property
    def evidence(self) -> Mapping[Worker, Evidence]:
        """What shows why workers were banned, of each ban of this run: what was signed, or a record. The same on all ranks.

        ``SentinelMonitor`` writes it to files, which ``lightning-sentinel verify-evidence`` checks.
        """
        return self._bans.evidence

    @property
    @override
    def accelerator(self) -> Accelerator | None:
        """The Trainer's accelerator. Not kept in `_accelerator`, which another Trainer would take for the user's choice."""
        return self._chosen_accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        self._chosen_accelerator = accelerator

    @property
    def is_distributed(self) -> bool:
        """Read by Lightning's data connector, which injects distributed samplers only where this is true."""
        return not self._settings.virtual

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_nodes(self) -> int:
        """Read and set by Lightning's accelerator connector."""
        return self._number_of_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._number_of_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """Processes on this machine; read by Lightning's launchers."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    # The environment of a virtual mesh may name any ranks, or none, as in a job step of SLURM; so it is not asked.

    @property
    @override
    def global_rank(self) -> int:
        return 0 if self._settings.virtual else super().global_rank

    @property
    @override
    def local_rank(self) -> int:
        return 0 if self._settings.virtual else super().local_rank

    @property
    @override
    def node_rank(self) -> int:
        return 0 if self._settings.virtual else super().node_rank

    @property
    @override
    def world_size(self) -> int:
        return self.num_nodes * self.num_processes if self._settings.virtual else super().world_size

    def set_world_ranks(self) -> None:
        """Called by Lightning as soon as it knows the devices: tell the environment ranks and world size."""
        if self.cluster_environment is not None and not self._settings.virtual:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        for guard in (rank_zero_only, fabric_rank_zero_only):
            guard.rank = self.global_rank  # type: ignore[attr-defined]
        self._processes.number(self.global_rank, self.world_size, self.root_device)

    @override
    def _configure_launcher(self) -> None:
        """Lightning's hook once the Trainer knows its devices: choose what starts the processes, unless the mesh is impossible."""
        check_replicas(self.mesh, self.verification, self.response)
        refuse_launch(type(self).__name__, self._settings.virtual, self.world_size, self._has_trainer)
        self._has_trainer = True
        if not self._settings.virtual:
            assert self.cluster_environment is not None
            self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    @override
    def setup_environment(self) -> None:
        """Lightning's hook before the user's ``setup`` hooks: connect the processes."""
        super().setup_environment()
        self.set_world_ranks()
        if not self._settings.virtual:
            self._connect()

    def _connect(self) -> None:
        """Connect the processes; those that are left out stay in this method until the run ends."""

        def admit(store: Store) -> tuple[int, ...]:
            return self._bans.admit(store, self.global_rank, self.world_size, self.stages, self.replicas, self._processes.own_key)

        environment = self.cluster_environment
        assert environment is not None and self.parallel_devices is not None
        self.cluster_environment = self._processes.connect(environment, self.parallel_devices, admit)
        if isinstance(self.cluster_environment, RenumberedEnvironment):
            if self.cluster_environment is not environment:
                self.set_world_ranks()
                self._processes.wait_if_left_out(self.world_size)
            check_replicas(self.mesh, self.verification, self.response)

    # ---------------------------------------------------------------------------------------------------------- collectives

    @override
    def barrier(self, name: str | None = None) -> None:
        """Called by Lightning and by users: wait for all ranks."""
        self._processes.barrier()

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        """Called by Lightning and by users: give all ranks one rank's object."""
        shared: TBroadcast = self._processes.broadcast(obj, src)
        return shared

    @override
    def reduce(self, tensor: Tensor | Any, group: Any | None = None, reduce_op: Any = "mean") -> Tensor | Any:
        """Called by Lightning for logged values: reduce a tensor over the ranks; anything else stays as it is."""
        return self._processes.reduce(tensor, group, reduce_op) if isinstance(tensor, Tensor) else tensor

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Called by ``LightningModule.all_gather``."""
        return self._processes.all_gather(tensor, group, sync_grads)

    @override
    def model_to_device(self) -> None:
        """Called by the set-up."""
        assert self.lightning_module is not None
        self.lightning_module.to(self.root_device)
