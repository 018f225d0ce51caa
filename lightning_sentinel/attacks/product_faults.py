"""Faults inside the matrix products of a broken worker, as a defect of its processor causes them.

They strike single products, forward or backward, so a fault may reach a signal, a weight's gradient, both, or, as many do, neither
by more than rounding. ``C = A B`` is the product. All draws are made on the host, so that nothing waits for the device.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sentinel.attacks.context import AttackContext
from lightning_sentinel.attacks.faults import Site
from lightning_sentinel.attacks.memory import History
from lightning_sentinel.attacks.products import KERNELS, Phase
from lightning_sentinel.attacks.signals import is_integer, is_share, require
from lightning_sentinel.errors import ConfigurationError

__all__ = ["BitFlip", "MisplacedTile", "ProductFault", "SilentCorruption", "StuckTile", "WrongAddress"]

_PHASES = tuple(phase.value for phase in Phase)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer dtype of as many bytes."""
WARP = 32
"""Threads that a GPU runs together; neighbours in a row of a result are theirs."""


@dataclass
class ProductFault(ABC):
    """Base of faults in matrix products: chooses which products are struck.

    Args:
        phase: ``"forward"``, ``"backward_input"`` or ``"backward_weight"``; ``None`` for all.
        kernel: ``"mm"``, ``"bmm"``, ``"addmm"`` or ``"baddbmm"``; ``None`` for all.
        rate: chance that one of these products is struck, above 0 and at most 1.

    Raises:
        ConfigurationError: if there is no such phase or kernel, or ``rate`` is no number above 0 and at most 1.
    """

    phase: str | None = None
    kernel: str | None = None
    rate: float = 1.0
    site: ClassVar[Site] = Site.PRODUCT

    def __post_init__(self) -> None:
        require(self.phase is None or self.phase in _PHASES, self, "phase", f"one of {', '.join(_PHASES)}, or None")
        require(self.kernel is None or self.kernel in KERNELS, self, "kernel", f"one of {', '.join(KERNELS)}, or None")
        require(is_share(self.rate), self, "rate", "a number above 0 and at most 1")

    def __call__(self, result: Tensor, context: AttackContext) -> Tensor:
        draws = random.Random(context.seed_for("fault", *context.place))
        if not self._meant(context) or draws.random() >= self.rate:
            return self.spared(result, context)
        return self.struck(result, context, draws)

    def _meant(self, context: AttackContext) -> bool:
        product = context.product
        return product is None or (self.phase in (None, product.phase.value) and self.kernel in (None, product.kernel))

    def spared(self, result: Tensor, context: AttackContext) -> Tensor:
        """The result of a product that is not struck."""
        return result.clone()

    @abstractmethod
    def struck(self, result: Tensor, context: AttackContext, draws: random.Random) -> Tensor:
        """The wrong result of a product."""


@dataclass
class BitFlip(ProductFault):
    """Bits flip in some elements of a product's result, or of a factor before it is multiplied (arXiv 2604.00726).

    Args:
        phase: see :class:`ProductFault`.
        kernel: see :class:`ProductFault`.
        rate: see :class:`ProductFault`.
        bit: which one, counted from the sign, which is 0; the exponent follows. ``None`` draws any of the dtype's.
        flips: how many bits of an element flip: ``bit``, and others that are drawn.
        count: in how many elements.
        operand: ``"result"``, ``"left"`` or ``"right"``.

    Raises:
        ConfigurationError: if a value cannot work; in the run, if the dtype has no such bit.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> attacks.BitFlip(bit=0)(torch.ones(1), context)
        tensor([-1.])
    """

    bit: int | None = None
    flips: int = 1
    count: int = 1
    operand: str = "result"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.bit is None or (is_integer(self.bit) and 0 <= self.bit < 64), self, "bit", "an integer from 0 to 63, or None")
        require(is_integer(self.flips) and 0 < self.flips <= 16, self, "flips", "an integer from 1 to 16")
        require(is_integer(self.count) and self.count > 0, self, "count", "an integer above 0")
        require(self.operand in ("result", "left", "right"), self, "operand", "result, left or right")

    def struck(self, result: Tensor, context: AttackContext, draws: random.Random) -> Tensor:
        product = context.product
        if self.operand == "result" or product is None:
            return self._flipped(result, draws)
        if self.operand == "left":
            return product.of(self._flipped(product.left, draws), product.right)
        return product.of(product.left, self._flipped(product.right, draws))

    def _flipped(self, tensor: Tensor, draws: random.Random) -> Tensor:
        bits = 8 * tensor.element_size()
        if self.bit is not None and self.bit >= bits:
            raise ConfigurationError(
                f"BitFlip(bit={self.bit}) cannot work: a product is computed in {tensor.dtype}, which has {bits} bits, from 0"
                f" to {bits - 1}. Name one of them, or none."
            )
        first = draws.randrange(bits) if self.bit is None else self.bit
        flipping = [first, *draws.sample([bit for bit in range(bits) if bit != first], self.flips - 1)]
        return _changed(tensor, _drawn(tensor, self.count, draws), _mask(flipping, bits))


def _mask(flipping: Sequence[int], bits: int) -> int:
    """The integer whose bits are set, counted from the sign, as a signed one."""
    mask = sum(1 << (bits - 1 - bit) for bit in flipping)
    return mask - (1 << bits) if mask >> (bits - 1) else mask


def _drawn(tensor: Tensor, count: int, draws: random.Random) -> Tensor:
    """Indices of elements."""
    return torch.tensor(draws.sample(range(tensor.numel()), min(count, tensor.numel())), device=tensor.device)


def _changed(tensor: Tensor, places: Tensor, mask: int) -> Tensor:
    """A copy in which these bits of these elements are others."""
    wrong = tensor.clone(memory_format=torch.contiguous_format)
    integers = wrong.view(_INTEGERS[tensor.element_size()]).view(-1)
    integers[places] ^= mask
    return wrong


@dataclass
class WrongAddress(ProductFault):
    """One lane of every warp reads another address: ``C'_i = C_(i + offset)`` where ``i mod period = lane`` (arXiv 2605.04213).

    ``i`` counts the elements of the result in the order of memory. The lane is drawn once for each worker, as a part of its defect,
    and the offset anew for each product.

    Args:
        phase: see :class:`ProductFault`.
        kernel: see :class:`ProductFault`.
        rate: see :class:`ProductFault`.
        period: elements from one wrong address to the next.

    Raises:
        ConfigurationError: if ``period`` is no integer above 0, or see :class:`ProductFault`.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> wrong = attacks.WrongAddress()(torch.arange(128.0).view(4, 32), context)
        >>> (wrong.view(-1) != torch.arange(128)).nonzero().view(-1).diff()
        tensor([32, 32, 32])
    """

    period: int = WARP

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_integer(self.period) and self.period > 0, self, "period", "an integer above 0")

    def struck(self, result: Tensor, context: AttackContext, draws: random.Random) -> Tensor:
        wrong = result.clone(memory_format=torch.contiguous_format)
        elements = wrong.view(-1)
        size = len(elements)
        if size > 1:
            lane = random.Random(context.seed_for("lane")).randrange(min(self.period, size))
            elements[lane :: self.period] = result.reshape(-1).roll(-draws.randrange(1, size))[lane :: self.period]
        return wrong


@dataclass
class MisplacedTile(ProductFault):
    """A tile of a product's result comes from another place: ``C'[i, j] = C[i + di, j + dj]`` in the tile (ours).

    The tile and the offsets, which are whole tiles where there is more than one, are drawn anew for each product.

    Args:
        phase: see :class:`ProductFault`.
        kernel: see :class:`ProductFault`.
        rate: see :class:`ProductFault`.
        tile: rows and columns of a tile; those of a warp's instruction by default.

    Raises:
        ConfigurationError: if ``tile`` is no integer above 0, or see :class:`ProductFault`.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> result = torch.arange(16.0).view(4, 4)
        >>> int((attacks.MisplacedTile(tile=2)(result, context) != result).sum())
        4
    """

    tile: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_integer(self.tile) and self.tile > 0, self, "tile", "an integer above 0")

    def struck(self, result: Tensor, context: AttackContext, draws: random.Random) -> Tensor:
        tile = _Tile.drawn(result, self.tile, draws)
        steps = [self.tile if size > self.tile else 1 for size in tile.result]
        down, right = (math.ceil(size / step) for size, step in zip(tile.result, steps))
        if down * right == 1:
            return result.clone()
        # Any pair of offsets but (0, 0).
        rows, columns = divmod(draws.randrange(1, down * right), right)
        matrices = result.reshape(-1, *tile.result)
        return tile.replaced(result, matrices.roll((-rows * steps[0], -columns * steps[1]), (1, 2)))


@dataclass
class StuckTile(ProductFault):
    """A tile of a product's result is never written: ``C' = 0`` there, or what the micro-batch before left there (ours).

    Args:
        phase: see :class:`ProductFault`.
        kernel: see :class:`ProductFault`.
        rate: see :class:`ProductFault`.
        tile: rows and columns of a tile; those of a warp's instruction by default.
        stale: it holds the same tile of the same product for the micro-batch before, which the first one does not have.

    Raises:
        ConfigurationError: if ``tile`` is no integer above 0, or see :class:`ProductFault`.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> attacks.StuckTile(tile=2)(torch.ones(4, 4), context).sum()
        tensor(12.)
    """

    tile: int = 16
    stale: bool = False
    _history: History = field(default_factory=History, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_integer(self.tile) and self.tile > 0, self, "tile", "an integer above 0")

    def spared(self, result: Tensor, context: AttackContext) -> Tensor:
        self._before(result, context)
        return super().spared(result, context)

    def struck(self, result: Tensor, context: AttackContext, draws: random.Random) -> Tensor:
        there = self._before(result, context)
        return _Tile.drawn(result, self.tile, draws).replaced(result, there)

    def _before(self, result: Tensor, context: AttackContext) -> Tensor:
        """What the memory of the result holds before the product is written there."""
        if not self.stale:
            return torch.zeros_like(result)
        product = context.product
        which = (context.direction,) if product is None else (product.phase, product.number)
        return self._history.before((context.worker, *which), context.step, context.micro_batch, result)


@dataclass(frozen=True)
class _Tile:
    """A tile of a matrix, one of several if the result is a batch of them.

    Args:
        result: rows and columns of the matrix; a vector is a row.
        batch: number of the matrix.
        rows: of the tile.
        columns: of the tile.
    """

    result: tuple[int, int]
    batch: int
    rows: slice
    columns: slice

    @classmethod
    def drawn(cls, result: Tensor, size: int, draws: random.Random) -> _Tile:
        """One of the aligned tiles of ``size`` rows and columns; at the edges they may be smaller."""
        height, width = result.shape[-2:] if result.ndim > 1 else (1, len(result))
        top = size * draws.randrange(math.ceil(height / size))
        left = size * draws.randrange(math.ceil(width / size))
        batch = draws.randrange(result.numel() // (height * width))
        return cls((height, width), batch, slice(top, top + size), slice(left, left + size))

    def replaced(self, result: Tensor, other: Tensor) -> Tensor:
        """A copy of ``result`` in which the tile is that of ``other``, which has as many elements."""
        wrong = result.clone(memory_format=torch.contiguous_format)
        where = (self.batch, self.rows, self.columns)
        wrong.view(-1, *self.result)[where] = other.reshape(-1, *self.result)[where]
        return wrong


_NON_FINITE = 0.01
_SINGLE_BIT = 0.3
_SEVERAL_BITS = 0.49
_MOST_FLIPS = 8


@dataclass
class SilentCorruption(ProductFault):
    """Faults of a data-centre GPU in the shares that a study of its gates found (arXiv 2605.04213).

    Of simulated stuck-at faults in gates that corrupt a result, 1 % make NaN or an infinity; of those that flip bits, fewer than
    40 % flip a single one; and wrong addresses are periodic. Here 1 % are NaN or an infinity in one element, 30 % a single bit that
    flips in one, 49 % two to eight bits (so that 38 % of flips are single), and 20 % wrong addresses, half of them in one lane of
    every warp and half in a tile. The last share is ours.

    Args:
        phase: see :class:`ProductFault`.
        kernel: see :class:`ProductFault`.
        rate: see :class:`ProductFault`.

    Raises:
        ConfigurationError: see :class:`ProductFault`.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION)
        >>> bool((attacks.SilentCorruption()(torch.arange(64.0), context) != torch.arange(64.0)).any())
        True
    """

    def struck(self, result: Tensor, context: AttackContext, draws: random.Random) -> Tensor:
        kind = draws.random()
        if kind < _NON_FINITE:
            wrong = result.clone(memory_format=torch.contiguous_format)
            wrong.view(-1)[_drawn(result, 1, draws)] = draws.choice((math.nan, math.inf, -math.inf))
            return wrong
        if kind < _NON_FINITE + _SINGLE_BIT:
            return BitFlip().struck(result, context, draws)
        if kind < _NON_FINITE + _SINGLE_BIT + _SEVERAL_BITS:
            return BitFlip(flips=draws.randint(2, _MOST_FLIPS)).struck(result, context, draws)
        address: ProductFault = WrongAddress() if draws.random() < 0.5 else MisplacedTile()
        return address.struck(result, context, draws)
