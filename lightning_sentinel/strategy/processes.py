"""The part of the strategy that launches and connects the processes, and runs collectives over all of them.

A virtual mesh has one process, and needs none of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.distributed import _sync_ddp_if_available
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.strategies.strategy import TBroadcast
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.distributed import Store
from typing_extensions import override

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.processes import wire
from lightning_sentinel.pipeline.processes.admission import announce_end, stand_by
from lightning_sentinel.pipeline.processes.liveness import Roster, Start, connect
from lightning_sentinel.pipeline.processes.renumbering import RenumberedEnvironment
from lightning_sentinel.strategy.settings import ReadableSettings

__all__ = ["ProcessStrategy"]


_VIRTUAL_MESH = Mesh(stages=2, replicas=4)
"""The defaults of ``stages`` and ``replicas`` on a virtual mesh."""


class ProcessStrategy(ReadableSettings):
    """Runs one process per device, launched by Lightning or from outside (torchrun, SLURM).

    Args:
        arguments: the arguments of ``ParallelStrategy``.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._num_nodes = 1
        self._has_trainer = False
        self._chosen_accelerator = self._accelerator
        self._store: Store | None = None
        self._roster: Roster | None = None

    @property
    def mesh(self) -> Mesh:
        """The mesh of workers; known once the Trainer has been made."""
        if self._virtual:
            return Mesh(
                _VIRTUAL_MESH.stages if self.stages is None else self.stages,
                _VIRTUAL_MESH.replicas if self.replicas is None else self.replicas,
            )
        # With a ledger, some of the started ranks may be left out.
        mesh = Mesh.for_world if self.response.ledger is None else Mesh.largest
        return mesh(self.world_size, self.stages, self.replicas)

    @property
    def worker(self) -> Worker:
        """The worker that this process is."""
        return self.mesh.worker(self.global_rank)

    @property
    def _trainer(self) -> L.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

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
        # Lightning injects distributed samplers only for strategies where this is true.
        return not self._virtual

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_nodes(self) -> int:
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    # The environment of a virtual mesh may name any ranks, or none, as in a job step of SLURM; so it is not asked.

    @property
    @override
    def global_rank(self) -> int:
        return 0 if self._virtual else super().global_rank

    @property
    @override
    def local_rank(self) -> int:
        return 0 if self._virtual else super().local_rank

    @property
    @override
    def node_rank(self) -> int:
        return 0 if self._virtual else super().node_rank

    @property
    @override
    def world_size(self) -> int:
        return self.num_nodes * self.num_processes if self._virtual else super().world_size

    def set_world_ranks(self) -> None:
        """Tell the environment ranks and world size; called by Lightning as soon as it knows the devices."""
        if self.cluster_environment is not None and not self._virtual:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        for guard in (rank_zero_only, fabric_rank_zero_only):
            guard.rank = self.global_rank  # type: ignore[attr-defined]

    @override
    def _configure_launcher(self) -> None:
        """Lightning's hook once the Trainer knows its devices: choose what starts the processes."""
        assert self.cluster_environment is not None
        if self._has_trainer:
            raise ConfigurationError(
                f"This {type(self).__name__} belongs to another Trainer already. It keeps who is banned, what was detected and what"
                " was learned of one run's workers, so make a new one for every Trainer."
            )
        self._has_trainer = True
        if self._virtual:
            return
        if _IS_INTERACTIVE:
            raise ConfigurationError(
                f"{type(self).__name__} starts a process for each worker by running the script again, and in a notebook or an"
                " interactive session there is none. Use Trainer(strategy='sentinel_virtual', devices=1) or"
                " SentinelStrategy(engine='virtual'), which have the whole mesh in this process, or write a script."
            )
        self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self.set_world_ranks()
        if self._virtual:
            return
        assert self.cluster_environment is not None
        start = connect(
            self._backend(),
            address=self.cluster_environment.main_address,
            port=self.cluster_environment.main_port,
            rank=self.global_rank,
            world_size=self.world_size,
            timeout=self.timeout,
            admit=self._admit,
        )
        if start is not None:
            self._store = start.store
            self._renumber(start)

    def _admit(self, store: Store) -> tuple[int, ...]:
        """The started ranks that form the mesh, in order; all of them, unless a subclass decides otherwise."""
        return tuple(range(self.world_size))

    def _renumber(self, start: Start) -> None:
        """Renumber the processes of the mesh, if some are left out; those stay in this method until the run ends."""
        environment = self.cluster_environment
        assert environment is not None
        if isinstance(environment, RenumberedEnvironment) or start.ranks == tuple(range(self.world_size)):
            return
        self.cluster_environment = RenumberedEnvironment(environment, start.ranks)
        self.set_world_ranks()
        if self.global_rank >= self.world_size:
            stand_by(start.store, self.timeout)
        if self.is_global_zero:
            announce_end(start.store)

    def _backend(self) -> str:
        assert self.parallel_devices is not None
        return wire.backend_for(self.root_device, self.parallel_devices, self.transport)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Turn the loss of a peer into an error that names it, wherever ranks wait for each other."""
        with self._roster.watching() if self._roster is not None else nullcontext():
            yield

    @override
    def barrier(self, name: str | None = None) -> None:
        if wire.is_connected():
            with self._watching():
                wire.barrier()

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        if not wire.is_connected():
            return obj
        with self._watching():
            shared: TBroadcast = wire.broadcast_object(obj, src)
        return shared

    @override
    def reduce(self, tensor: Tensor | Any, group: Any | None = None, reduce_op: Any = "mean") -> Tensor | Any:
        if not isinstance(tensor, Tensor):
            return tensor
        with self._watching():
            return _sync_ddp_if_available(self._on_wire(tensor), group, reduce_op=reduce_op).to(tensor.device)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        with self._watching():
            return super().all_gather(self._on_wire(tensor), group, sync_grads).to(tensor.device)

    def _on_wire(self, tensor: Tensor) -> Tensor:
        """A tensor, on the device from which the backend sends it."""
        return tensor.to(wire.device_of_wire(tensor.device)) if wire.is_connected() else tensor

    @override
    def model_to_device(self) -> None:
        assert self.lightning_module is not None
        self.lightning_module.to(self.root_device)
