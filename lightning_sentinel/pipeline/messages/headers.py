"""Headers of messages between workers: what is coming, and which message it is.

A header is a fixed number of integers ahead of the elements. It was written by somebody who may be faulty or hostile, so the
receiver compares every word of it with what it expects before it allocates anything. What does not fit is refused with one error,
:class:`~lightning_sentinel.errors.MalformedMessageError`, whatever the integers are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import psutil
import torch
from torch import Tensor

from lightning_sentinel.errors import MalformedMessageError, PipelineModelError
from lightning_sentinel.mesh import Direction

__all__ = [
    "DTYPES",
    "HEADER_WORDS",
    "MOST_AXES",
    "NOTES",
    "NOTHING",
    "SIGNALS",
    "Allowance",
    "Expected",
    "Header",
    "Kind",
    "MessageId",
    "decode",
    "encode",
    "extent",
]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""What can cross a boundary. The place in this tuple is what is sent: append only, or count the version up."""

MOST_AXES = 8

# A message may be so many times as large as the largest one before it, or as the one that is due.
_GROWTH = 16
# Says that this is a header of ours, and in its last byte which layout it has.
_MAGIC = int.from_bytes(b"sentine\x01", "big")
HEADER_WORDS = 7 + MOST_AXES
"""Length of a header: magic and version, step, slot, kind, dtype, number, axes, and as many sizes as there can be axes."""


NOTHING = 2
"""The number of an activation that is none, because a step of an evaluation has not called the pipeline."""


class Kind(IntEnum):
    """What a message carries; notes carry projections of activations and of gradients."""

    ACTIVATION = 1
    GRADIENT = 2
    NOTE_ACTIVATION = 3
    NOTE_GRADIENT = 4

    def __str__(self) -> str:
        return {3: "note on the activation", 4: "note on the gradient"}.get(self.value, self.name.lower())


SIGNALS = {Direction.ACTIVATION: Kind.ACTIVATION, Direction.GRADIENT: Kind.GRADIENT}
NOTES = {Direction.ACTIVATION: Kind.NOTE_ACTIVATION, Direction.GRADIENT: Kind.NOTE_GRADIENT}


@dataclass(frozen=True)
class MessageId:
    """Which message it is.

    Args:
        step: number of the training batch.
        slot: which micro-batch of the lane, in the order of the schedule.
        kind: what it carries.

    Example:
        >>> str(MessageId(12, 3, Kind.GRADIENT))
        'gradient of step 12, micro-batch 3'
    """

    step: int
    slot: int
    kind: Kind

    def __str__(self) -> str:
        return f"{self.kind} of step {self.step}, micro-batch {self.slot}"


@dataclass(frozen=True)
class Expected:
    """What a receiver allows.

    Args:
        dtypes: each of them will do.
        most_elements: the largest message there is memory for, where sizes of 0 count as 1.
        shape: the exact shape, if it is known, as that of a gradient is from the forward pass.
        samples: size of the first axis, if it is known.
        numbers: what may stand in the header besides; 0 alone for gradients, which have no number.

    Example:
        >>> Expected((torch.float32,), most_elements=4096, samples=8).samples
        8
    """

    dtypes: tuple[torch.dtype, ...]
    most_elements: int
    shape: tuple[int, ...] | None = None
    samples: int | None = None
    numbers: range = range(1)

    @classmethod
    def like(cls, tensor: Tensor) -> Expected:
        """A signal of the shape and dtype of ``tensor``.

        Example:
            >>> Expected.like(torch.ones(2, 3)).shape
            (2, 3)
        """
        return cls((tensor.dtype,), _GROWTH * tensor.numel(), tuple(tensor.shape))


class Allowance:
    """What is allowed of signals whose shape is not known beforehand, because samples may differ in length.

    The first may fill a quarter of the memory that is free; later ones have its dtype, as many samples as the micro-batch if it
    had, and may be a few times as large as the largest so far.

    Example:
        >>> allowance = Allowance()
        >>> allowance.saw(torch.ones(8, 4096), samples=8)
        >>> allowance.expected(samples=2)
        Expected(dtypes=(torch.float32,), most_elements=524288, shape=None, samples=2, numbers=range(0, 1))
        >>> allowance.usual(samples=2)
        (2, 4096)
    """

    def __init__(self) -> None:
        self._largest = 0
        self._dtypes: tuple[torch.dtype, ...] = DTYPES
        self._last: tuple[int, ...] | None = None
        self._by_samples = False

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Each of them will do."""
        return self._dtypes

    def expected(self, samples: int | None = None, numbers: range = range(1)) -> Expected:
        """What may come next.

        Args:
            samples: of the micro-batch, if that is to be looked at.
            numbers: of a note.
        """
        most = _GROWTH * self._largest if self._largest else psutil.virtual_memory().available // 16
        return Expected(self._dtypes, most, samples=samples if self._by_samples else None, numbers=numbers)

    def saw(self, signal: Tensor, samples: int | None = None) -> None:
        """Take note of a signal that came and was as it should be; ``samples`` as in :meth:`expected`."""
        self._largest, self._dtypes = max(self._largest, signal.numel()), (signal.dtype,)
        self._last = tuple(signal.shape)
        self._by_samples = signal.shape[:1] == (samples,)

    def usual(self, samples: int) -> tuple[int, ...] | None:
        """The shape of the last signal, for so many samples; ``None`` if there was none."""
        return (samples, *self._last[1:]) if self._last and self._by_samples else self._last


@dataclass(frozen=True)
class Header:
    """What a header says once it is believed.

    Args:
        shape: of the tensor that follows.
        dtype: of the tensor that follows.
        number: of a note, the channels of the signal that it is about; of an activation, 1 if its shape is news to its sender, and
            :data:`NOTHING` if there is none.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    number: int


def encode(message_id: MessageId, shape: Sequence[int], dtype: torch.dtype, number: int = 0) -> Tensor:
    """The header of a message.

    Returns:
        ``(HEADER_WORDS,)``, int64, on the host.

    Raises:
        PipelineModelError: if a tensor of this shape or dtype cannot cross a boundary.

    Example:
        >>> encode(MessageId(12, 3, Kind.ACTIVATION), (2, 5), torch.float64)[1:]
        tensor([12,  3,  1,  1,  0,  2,  2,  5,  0,  0,  0,  0,  0,  0])
    """
    if dtype not in DTYPES or len(shape) > MOST_AXES:
        raise PipelineModelError(
            f"A stage returned a tensor of shape {tuple(shape)} and dtype {dtype}. Between stages travels one floating-point tensor"
            f" with at most {MOST_AXES} axes: end the stage at a layer that returns one."
        )
    padding = [0] * (MOST_AXES - len(shape))
    words = [_MAGIC, message_id.step, message_id.slot, message_id.kind, DTYPES.index(dtype), number, len(shape), *shape, *padding]
    return torch.tensor(words, dtype=torch.int64)


def decode(header: Tensor, message_id: MessageId, expected: Expected) -> Header:
    """Read a header, and believe it only if it is the one that is expected.

    Args:
        header: ``(HEADER_WORDS,)``, int64, on the host: any integers at all.
        message_id: the message that is due.
        expected: what is allowed of it.

    Raises:
        MalformedMessageError: if anything in it is not as it should be; nothing else is ever raised, nor anything allocated.

    Example:
        >>> due = MessageId(12, 3, Kind.ACTIVATION)
        >>> header = encode(due, (2, 5), torch.float64)
        >>> decode(header, due, Expected((torch.float64,), most_elements=10))
        Header(shape=(2, 5), dtype=torch.float64, number=0)
        >>> decode(header, due, Expected((torch.float64,), most_elements=9))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lightning_sentinel.errors.MalformedMessageError: Expected the activation of step 12, micro-batch 3; what came announces ...
    """
    # Python's integers, because products of sizes need not fit into 64 bits.
    magic, step, slot, kind, dtype, number, axes, *sizes = header.tolist()
    wrong = _wrong_place(magic, step, slot, kind, message_id) or _wrong_layout(dtype, number, axes, sizes, expected)
    if not wrong:
        shape = tuple(sizes[:axes])
        wrong = _wrong_shape(shape, expected)
        if not wrong:
            return Header(shape, DTYPES[dtype], number)
    raise MalformedMessageError(f"Expected the {message_id}; what came {wrong}.")


def extent(header: Tensor, expected: Expected) -> tuple[MessageId, torch.dtype, int] | None:
    """What a header that was refused says of the elements behind it, so that they can be taken off the wire.

    Args:
        header: ``(HEADER_WORDS,)``, int64, on the host: any integers at all.
        expected: what was allowed; how much memory there is.

    Returns:
        which message it says it is, dtype, and number of elements; ``None`` if that is no message of ours, or too large a one.

    Example:
        >>> due = MessageId(12, 3, Kind.GRADIENT)
        >>> extent(encode(due, (2, 5), torch.float64), Expected.like(torch.ones(2, 4)))
        (MessageId(step=12, slot=3, kind=<Kind.GRADIENT: 2>), torch.float64, 10)
        >>> extent(encode(due, (2**31, 2**31), torch.float32), Expected.like(torch.ones(2, 4)))
    """
    magic, step, slot, kind, dtype, _, axes, *sizes = header.tolist()
    known = magic == _MAGIC and kind in tuple(Kind) and 0 <= dtype < len(DTYPES) and 0 <= axes <= MOST_AXES
    if not known or min(sizes) < 0 or any(sizes[axes:]) or _elements(sizes[:axes], ignoring_zeros=True) > expected.most_elements:
        return None
    return MessageId(step, slot, Kind(kind)), DTYPES[dtype], _elements(sizes[:axes])


def _elements(shape: Sequence[int], ignoring_zeros: bool = False) -> int:
    """Of a shape. An empty tensor can have sizes whose product overflows in what is computed from them."""
    return math.prod(size for size in shape if size or not ignoring_zeros)


def _wrong_place(magic: int, step: int, slot: int, kind: int, message_id: MessageId) -> str:
    if magic != _MAGIC:
        return f"does not begin as a header of this version does: word {magic}, not {_MAGIC}"
    if kind not in tuple(Kind):
        return f"is of the unknown kind {kind}"
    if (step, slot, kind) == (message_id.step, message_id.slot, message_id.kind):
        return ""
    came = MessageId(step, slot, Kind(kind))
    if kind != message_id.kind:
        return f"is of another kind: the {came}"
    if (step, slot) < (message_id.step, message_id.slot):
        return f"is a duplicate or late: the {came}"
    return f"is early, or one before it was left out: the {came}"


def _wrong_layout(dtype: int, number: int, axes: int, sizes: list[int], expected: Expected) -> str:
    allowed = [DTYPES.index(each) for each in expected.dtypes]
    if dtype not in allowed:
        came = DTYPES[dtype] if 0 <= dtype < len(DTYPES) else f"number {dtype}"
        return f"has dtype {came}, and allowed are {', '.join(map(str, expected.dtypes))}"
    if number not in expected.numbers:
        return f"carries the number {number}, and allowed are {expected.numbers.start} to {expected.numbers.stop - 1}"
    if not 0 <= axes <= MOST_AXES:
        return f"announces {axes} axes, and there can be 0 to {MOST_AXES}"
    if min(sizes) < 0 or any(sizes[axes:]):
        return f"announces {axes} axes and the sizes {sizes}, which must not be negative, and be 0 from there on"
    return ""


def _wrong_shape(shape: tuple[int, ...], expected: Expected) -> str:
    if expected.shape is not None:
        return "" if shape == expected.shape else f"announces shape {shape}, not {expected.shape}"
    if _elements(shape, ignoring_zeros=True) > expected.most_elements:
        return f"announces sizes {list(shape)}, and there is memory for {expected.most_elements} elements"
    if expected.samples is not None and shape[:1] != (expected.samples,):
        return f"announces shape {shape}, whose first axis should have {expected.samples} samples"
    return ""
