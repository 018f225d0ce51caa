"""What attacks remember of honest signals, such that a step can be taken back: sums over past steps, and the signal before."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["DecayedSums", "History", "Sums"]

Sums = tuple[Tensor, ...]


@dataclass
class DecayedSums:
    """``S(t) = decay * S(t-1) + sums added in step t``, available only once ``t`` is over.

    Sums of the present step are kept apart for each micro-batch, so that a step that is done again replaces them. Memory: the sums
    of one step's micro-batches, and one more.

    Args:
        decay: weight of the steps before, in [0, 1).

    Example:
        >>> import torch
        >>> memory = DecayedSums(decay=0.5)
        >>> for step in (0, 1, 1, 2):
        ...     past = memory.before(step, kind=None)
        ...     memory.add(0, (torch.tensor(8.0),))
        >>> past
        (tensor(12.),)
    """

    decay: float
    _past: Sums | None = None
    _step: int = -1
    _kind: Hashable = None
    _present: dict[int, Sums] = field(default_factory=dict)

    def before(self, step: int, kind: Hashable) -> Sums | None:
        """``S(step - 1)``, the same object all through the step; ``None`` if nothing was added before.

        Everything is forgotten when ``kind`` (a signal's shape, say) changes, or when an earlier step comes: a run that restarts
        from there never saw the rest.
        """
        if kind != self._kind or step < self._step:
            self._past = None
            self._present = {}
        elif step > self._step:
            self._close()
        self._step = step
        self._kind = kind
        return self._past

    def add(self, micro_batch: int, sums: Sums) -> None:
        """Adds ``sums`` to the step that was last asked for. Sums that are not finite, as after an overflow, count as zero."""
        finite = torch.stack([one.isfinite().all() for one in sums]).all()
        self._present[micro_batch] = tuple(torch.where(finite, one, torch.zeros_like(one)) for one in sums)

    def _close(self) -> None:
        if not self._present:
            return
        # In a fixed order, so that the same run gives the same bits.
        parts = [self._present[index] for index in sorted(self._present)]
        new = tuple(sum(column[1:], column[0]) for column in zip(*parts))
        self._past = new if self._past is None else tuple(self.decay * old + one for old, one in zip(self._past, new))
        self._present = {}


@dataclass
class History:
    """The value before the present one, in several sequences whose steps may be done again.

    Of each sequence at most one step and one value are kept.

    Example:
        >>> import torch
        >>> history = History()
        >>> for step in (0, 1, 1, 2):
        ...     print(history.before("mine", step, 0, torch.tensor(10 * step)).item())
        0
        0
        0
        10
    """

    _sequences: dict[Hashable, deque[tuple[tuple[int, int], Tensor]]] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many values are kept."""
        return sum(map(len, self._sequences.values()))

    def before(self, key: Hashable, step: int, micro_batch: int, value: Tensor) -> Tensor:
        """Remember a value. Returns the one before it, or itself if there is none or it differs in shape, dtype or device."""
        history = self._sequences.setdefault(key, deque())
        now = (step, micro_batch)
        while history and history[-1][0] >= now:
            history.pop()
        before = history[-1][1] if history else value
        # A copy, since pipeline engines reuse their send buffers.
        history.append((now, value.detach().clone()))
        # The step may be done again, and then needs the last value of the step before.
        while len(history) > 1 and history[1][0][0] < step:
            history.popleft()
        fits = (before.shape, before.dtype, before.device) == (value.shape, value.dtype, value.device)
        return before if fits else value
