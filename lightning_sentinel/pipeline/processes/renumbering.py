"""Renumbers ranks for a mesh that is smaller than the number of started processes."""

from __future__ import annotations

from lightning.pytorch.plugins.environments import ClusterEnvironment
from typing_extensions import override

__all__ = ["RenumberedEnvironment"]


class RenumberedEnvironment(ClusterEnvironment):
    """Wraps a cluster environment: leaves some processes out and numbers the others from zero.

    The processes of a machine keep their devices, so local ranks stay. A process that is left out has a rank beyond the mesh.

    Args:
        environment: of all started processes.
        ranks: the original ranks of the mesh's processes, in the mesh's order.

    Example:
        >>> from lightning.pytorch.plugins.environments import LightningEnvironment
        >>> started = LightningEnvironment()
        >>> started.set_world_size(6)
        >>> started.set_global_rank(5)
        >>> mesh = RenumberedEnvironment(started, (0, 1, 4, 5))
        >>> mesh.global_rank(), mesh.world_size()
        (3, 4)
    """

    def __init__(self, environment: ClusterEnvironment, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self._environment = environment
        self._ranks = ranks

    @property
    def original(self) -> ClusterEnvironment:
        """The environment of all started processes."""
        return self._environment

    @override
    def world_size(self) -> int:
        return len(self._ranks)

    @override
    def global_rank(self) -> int:
        rank = self._environment.global_rank()
        return self._ranks.index(rank) if rank in self._ranks else len(self._ranks) + rank

    @override
    def set_world_size(self, size: int) -> None:
        """Ignored: Lightning passes the number of started processes, which the environment knows."""

    @override
    def set_global_rank(self, rank: int) -> None:
        """Ignored, for the same reason."""

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return self._environment.creates_processes_externally

    @property
    @override
    def main_address(self) -> str:
        return self._environment.main_address

    @property
    @override
    def main_port(self) -> int:
        return self._environment.main_port

    @staticmethod
    @override
    def detect() -> bool:
        return False

    @override
    def local_rank(self) -> int:
        return self._environment.local_rank()

    @override
    def node_rank(self) -> int:
        return self._environment.node_rank()

    @override
    def teardown(self) -> None:
        self._environment.teardown()
