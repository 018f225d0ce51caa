"""The processes of a run: connected, numbered by their place on the mesh, and watched wherever they wait for each other.

A virtual mesh has one process, which waits for no other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import _all_gather_ddp_if_available, _sync_ddp_if_available
from torch import Tensor
from torch.distributed import Store

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.checkpoints.resumption import data_generators, set_data_generators
from lightning_sentinel.pipeline.messages.tensor_trees import broadcast_tree
from lightning_sentinel.pipeline.processes.admission import announce_end, stand_by
from lightning_sentinel.pipeline.processes.hosts import host_name
from lightning_sentinel.pipeline.processes.keys import exchange_keys, make_credentials
from lightning_sentinel.pipeline.processes.liveness import Roster, connect
from lightning_sentinel.pipeline.processes.renumbering import RenumberedEnvironment
from lightning_sentinel.pipeline.processes.torch_wire import backend_for
from lightning_sentinel.pipeline.processes.wire import is_connected, world
from lightning_sentinel.strategy.settings import StrategySettings
from lightning_sentinel.trust.credentials import Credentials
from lightning_sentinel.trust.identity import Identity, PublicKey
from lightning_sentinel.trust.known_workers import read_known_workers

__all__ = ["Processes"]


class Processes:
    """This process among those of the run, and the collectives of all of them.

    Args:
        settings: the strategy's settings.
    """

    def __init__(self, settings: StrategySettings) -> None:
        self.settings = settings
        self._store: Store | None = None
        self._roster: Roster | None = None
        self.rank = 0
        self.world_size = 1
        self.device = torch.device("cpu")
        """The device of this process."""
        self._identity: Identity | None = None
        self._known: Collection[PublicKey] | None = None
        self._keys: tuple[PublicKey, ...] = ()
        """The key of each rank, once the processes have met; none if nothing is signed."""

    @property
    def mesh(self) -> Mesh:
        """All workers."""
        return self.settings.mesh(self.world_size)

    @property
    def worker(self) -> Worker:
        """The worker that this process is."""
        return self.mesh.worker(self.rank)

    @property
    def has_met(self) -> bool:
        """Whether the processes of a run have been connected."""
        return self._roster is not None

    def number(self, rank: int, world_size: int, device: torch.device) -> None:
        """Tell this process its place; to be called whenever the environment has changed."""
        self.rank = rank
        self.world_size = world_size
        self.device = device

    def identify(self) -> None:
        """Read or draw this process's key, and read the list of known workers, before any process waits for another.

        Raises:
            ConfigurationError: if one of the files is not what it should be.
            MissingExtraError: if something is to be signed and the package ``cryptography`` is not installed.
        """
        settings = self.settings
        if settings.signs and self._identity is None:
            path = settings.key_file
            self._identity = Identity.draw() if path is None else Identity.kept(path.replace("{rank}", str(self.rank)))
        if settings.known_workers is not None:
            self._known = read_known_workers(settings.known_workers)

    @property
    def own_key(self) -> PublicKey | None:
        """The public key by which later runs will know this process; ``None`` if it has none that is kept."""
        return None if self._identity is None or self.settings.key_file is None else self._identity.public

    @property
    def keys(self) -> tuple[PublicKey, ...]:
        """The key of each rank, once the processes have met; none if the ranks have none that are kept."""
        return () if self.settings.key_file is None else self._keys

    def credentials(self) -> Credentials:
        """What this process signs with from now on; a collective of all ranks."""
        with self.watching():
            return make_credentials(world(), self._identity, self._keys, self.mesh.workers)

    # ----------------------------------------------------------------------------------------------------------- connecting

    def connect(
        self,
        environment: ClusterEnvironment,
        devices: Sequence[torch.device],
        admit: Callable[[Store], tuple[int, ...]],
    ) -> ClusterEnvironment:
        """Connect the processes.

        Args:
            environment: started the processes.
            devices: the devices of this machine.
            admit: returns the started ranks that form the mesh, in order.

        Returns:
            the environment, or one that numbers the processes anew if some of them are left out.
        """
        start = connect(
            backend_for(self.device, devices, self.settings.transport),
            address=environment.main_address,
            port=environment.main_port,
            rank=self.rank,
            world_size=self.world_size,
            timeout=self.settings.timeout,
            admit=admit,
        )
        if start is None:
            return environment
        self._store = start.store
        if isinstance(environment, RenumberedEnvironment) or start.ranks == tuple(range(self.world_size)):
            return environment
        return RenumberedEnvironment(environment, start.ranks)

    def wait_if_left_out(self, placed: int) -> None:
        """Keep a process that is left out here until the run ends, and let rank zero tell such processes of the end.

        Args:
            placed: number of processes that form the mesh.
        """
        assert self._store is not None, "processes are renumbered when they connect"
        if self.rank >= placed:
            stand_by(self._store, self.settings.timeout)
        if self.rank == 0:
            announce_end(self._store)

    def meet(self) -> tuple[str, ...]:
        """Wait for all processes of the mesh. Returns the machine of each rank."""
        self._roster = roster = Roster(self.mesh, self.rank, self._store, self.settings.timeout)
        with self.watching():
            roster.meet()
            if not self.settings.virtual:
                self._keys = exchange_keys(world(), self._identity, self._known, self.settings.key_file is not None)
        return (host_name(),) * self.mesh.size if self.settings.virtual else roster.hosts

    def report_failure(self, exception: BaseException) -> None:
        """Tell the other processes why this one ends."""
        if self._roster is not None:
            self._roster.report_failure(exception)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Turn the loss of a peer into an error that names it, wherever ranks wait for each other."""
        with nullcontext() if self._roster is None else self._roster.watching():
            yield

    # ---------------------------------------------------------------------------------------------------------- collectives

    def barrier(self) -> None:
        if is_connected():
            with self.watching():
                world().barrier()

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The value of one rank, on all ranks."""
        if not is_connected():
            return value
        with self.watching():
            return world().broadcast_object(value, source)

    def reduce(self, tensor: Tensor, group: Any | None, operation: Any) -> Tensor:
        """Reduce a tensor over the ranks; the result is on the tensor's device, whatever device the backend sends from."""
        with self.watching():
            return _sync_ddp_if_available(_on_wire(tensor), group, reduce_op=operation).to(tensor.device)

    def all_gather(self, tensor: Tensor, group: Any | None, with_gradients: bool) -> Tensor:
        with self.watching():
            return _all_gather_ddp_if_available(_on_wire(tensor), group, with_gradients).to(tensor.device)

    def share_generators(self) -> None:
        """Give all ranks rank zero's states of the random number generators."""
        if self.settings.virtual:
            return
        cuda = self.device.type == "cuda"
        mine = data_generators() | ({"cuda": torch.cuda.get_rng_state(self.device)} if cuda else {})
        with self.watching():
            states = broadcast_tree(mine, 0)
        set_data_generators(states)
        if cuda:
            torch.cuda.set_rng_state(states["cuda"], self.device)

    def any_rank(self, decision: bool) -> bool:
        """Whether a decision is true on any rank."""
        if not is_connected():
            return decision
        votes = torch.tensor(int(decision), device=self.device)
        return bool(self.reduce(votes, None, "sum"))


def _on_wire(tensor: Tensor) -> Tensor:
    """A tensor, on the device from which the backend sends it."""
    return tensor.to(world().device_for(tensor.device)) if is_connected() else tensor
