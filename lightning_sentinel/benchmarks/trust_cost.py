"""What it takes to bind workers to what they say: bytes of each worker and step, and how long a network needs for them."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from lightning_sentinel.mesh import Direction, Mesh
from lightning_sentinel.pipeline.commitments.transcript import BINDING_BYTES
from lightning_sentinel.trust.parts import part_length
from lightning_sentinel.verification.table import COLUMNS

__all__ = ["EXAMPLES", "StepTraffic", "table_of_traffic"]

_FLOAT_BYTES = 4
_HALF_BYTES = 2
_GIGABIT = 1e9


@dataclass(frozen=True)
class StepTraffic:
    """What each worker of a middle stage sends and receives in a training step, on a ring of all workers.

    Args:
        name: of the model.
        mesh: all workers.
        micro_batches: of each replica.
        tokens: of a micro-batch.
        width: of the signals, in bfloat16.

    Example:
        >>> traffic = StepTraffic("a small Llama", Mesh(stages=2, replicas=2), micro_batches=4, tokens=512, width=256)
        >>> traffic.row_bytes, traffic.commitment_bytes, round(traffic.share, 4)
        (3043, 2275, 0.0044)
    """

    name: str
    mesh: Mesh
    micro_batches: int
    tokens: int
    width: int

    @property
    def signal_bytes(self) -> int:
        """That a worker sends in signals: activations to one neighbour, gradients to the other."""
        return len(Direction) * self.micro_batches * self.tokens * self.width * _HALF_BYTES

    @property
    def commitment_bytes(self) -> int:
        """Of digests and signatures in a worker's row of the step's collective."""
        return part_length(self.micro_batches) + BINDING_BYTES

    @property
    def row_bytes(self) -> int:
        """Of a worker's whole row: scores of the signals that it received, and what binds it to what it says."""
        return len(Direction) * self.micro_batches * len(COLUMNS) * _FLOAT_BYTES + self.commitment_bytes

    @property
    def table_bytes(self) -> int:
        """That a worker receives of the others' rows."""
        return (self.mesh.size - 1) * self.row_bytes

    @property
    def share(self) -> float:
        """What the table takes, as a share of the signals."""
        return self.table_bytes / self.signal_bytes


EXAMPLES = (
    StepTraffic("4B, 16 x 11 workers", Mesh(16, 11), micro_batches=32, tokens=2048, width=3072),
    StepTraffic("70B, 32 x 64 workers", Mesh(32, 64), micro_batches=64, tokens=4096, width=8192),
)
"""Trainings on machines that are connected by 1 Gbit/s; on paper."""


def _readable(size: float) -> str:
    """A number of bytes in few characters.

    Example:
        >>> _readable(264), _readable(23042), _readable(805306368)
        ('264 B', '23 kB', '805 MB')
    """
    for unit, scale in (("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.0f} {unit}"
    return f"{size:.0f} B"


def table_of_traffic(trainings: tuple[StepTraffic, ...]) -> Table:
    """Bytes of a worker in a step, and the seconds that 1 Gbit/s takes for them.

    Its signals, its row, the digests and signatures in the row by which it is bound, those for each signal, and the rows of all.
    """
    table = Table(title="A worker's bytes in a step, and what 1 Gbit/s takes for them")
    for heading in ("", "signals", "row", "bound by", "a signal", "all rows", "signals", "all rows", "share"):
        table.add_column(heading, justify="right" if heading else "left")
    for one in trainings:
        a_signal = one.commitment_bytes / (len(Direction) * one.micro_batches)
        sizes = map(_readable, (one.signal_bytes, one.row_bytes, one.commitment_bytes, a_signal, one.table_bytes))
        seconds = (f"{8 * size / _GIGABIT:.2f} s" for size in (one.signal_bytes, one.table_bytes))
        table.add_row(one.name, *sizes, *seconds, f"{one.share:.2%}")
    return table
