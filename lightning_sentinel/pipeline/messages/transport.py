"""Point-to-point messages between neighbouring stages.

A signal travels as a header of integers (see :mod:`~lightning_sentinel.pipeline.messages.headers`), on the host, so that no device
is waited for, and the elements, then one more that carries the taint flag, so that the flag costs no message of its own. Each
message has its receiver waited for, so header and elements go as one through host memory, if they are of the same shape and dtype
as the last ones to that receiver: then it knows how much is coming. If they are not, the header goes first, alone.

Besides, a worker sends small notes past its neighbour to the stage behind it: what the neighbour was sent, along secret directions.
Nobody waits for a note to arrive before going on, because its receiver asks for it only when the neighbour's own signal is there.

``device`` sends tensors from where they are. ``host`` copies them through host memory: between sites, and where the backend cannot
send from the device (several ranks on one GPU). Collectives go the same way
(:mod:`~lightning_sentinel.pipeline.processes.collectives`).

Nothing in a message is believed before it was compared with what is due. What gloo itself does with a message whose size is not
that of the receiver's buffer (test_transport_over_gloo.py has it in writing):

- A shorter one is taken without a word, and the end of the buffer stays what it was. So the end is marked before, and looked at
  afterwards. The next message is not affected, because gloo knows where each ends.
- A longer one ends the receiver's *process*: gloo aborts in a thread of its own (``Received data size doesn't match expected
  size``), which no Python code can catch. A worker that sends fewer elements than it announced is refused; one that sends more
  takes its receiver down. Only another transport could help.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sentinel.errors import MalformedMessageError, WorkerLostError
from lightning_sentinel.pipeline.messages.headers import HEADER_WORDS, Expected, Header, Kind, MessageId, decode, encode, extent
from lightning_sentinel.pipeline.processes.collectives import wire
from lightning_sentinel.pipeline.processes.liveness import sounds_lost

__all__ = ["Transport"]

# What a buffer holds where nothing arrived: no word of a header is negative, no taint is, and all dtypes have the number.
_UNTOUCHED = -1
_HEADER_BYTES = 8 * HEADER_WORDS
# Where elements begin that are in one message with their header, so that they are aligned as tensors of their own would be.
_ELEMENTS_AT = -(-_HEADER_BYTES // 64) * 64


class _MessageSize(NamedTuple):
    """A size that sender and receiver know of."""

    elements: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return _ELEMENTS_AT + self.elements * self.dtype.itemsize


class Transport:
    """Sends signals to, and receives them from, other ranks.

    A malformed message is taken off the wire if its header tells how much that is, and there is memory for it; then the sender's
    next message can be received. Else the rank is not listened to again: what it sent after that header is still under way, and
    would be taken for the next message. With gloo that rank waits, until the group's timeout, for somebody to take it. Sending to
    it goes on, because others wait for what it makes of that.

    Args:
        device: where signals live.
        mode: ``"device"``, ``"host"``, or ``"auto"``, which sends from the device where the backend can.
    """

    def __init__(self, device: torch.device, mode: Literal["auto", "device", "host"] = "auto") -> None:
        self._device = device
        self._wire = {"auto": wire(device), "device": device, "host": torch.device("cpu")}[mode]
        self._under_way: list[tuple[int, dist.Work, Tensor]] = []
        self._broken: dict[int, str] = {}
        self._sent: dict[tuple[int, Kind], _MessageSize] = {}
        self._received: dict[tuple[int, Kind], _MessageSize] = {}
        self._latest: dict[tuple[int, Kind], MessageId] = {}

    def send(self, signal: Tensor, tainted: Tensor, rank: int, message_id: MessageId, number: int = 0) -> None:
        """Send a signal of any shape, its taint (0-dim bool), and a number with its header.

        Raises:
            PipelineModelError: if the signal is no tensor that can cross a boundary.
            WorkerLostError: if ``rank`` does not answer.
        """
        for message in self._messages(signal, tainted, rank, message_id, number):
            with _naming(rank):
                dist.send(message, rank)

    def receive(self, rank: int, message_id: MessageId, expected: Expected) -> tuple[Tensor, Tensor, int]:
        """Receive a signal, its taint, and its number.

        Args:
            rank: the sender.
            place: the message that is due.
            expected: what is allowed of it.

        Returns:
            the signal, in memory of its own; the 0-dim bool taint, true unless the sender wrote exactly 0; the number.

        Raises:
            MalformedMessageError: if something else came, now or before. A message that came twice spoils the one behind it.
            WorkerLostError: if ``rank`` does not answer.
        """
        if rank in self._broken:
            raise MalformedMessageError(
                f"Rank {rank} is not listened to, not for the {message_id} either, since it sent a malformed message."
                f" {self._broken[rank]} Leave it out of the pipeline, or start the run again.",
                rank=rank,
            )
        try:
            header, message = self._message(rank, message_id, expected)
            # A device would have to be waited for. There the mark is not zero, and makes the signal a tainted one.
            if self._wire.type == "cpu" and message[-1] == _UNTOUCHED:
                raise MalformedMessageError(
                    f"Expected the {message_id}; what came has fewer elements than the {len(message)} of shape {header.shape} and"
                    " flag that its header announces.",
                    taken=True,
                )
        except MalformedMessageError as error:
            if not error.taken:
                self._broken[rank] = str(error)
            raise MalformedMessageError(
                f"Rank {rank} sent a malformed message. {error} Nothing of it was used. See that the rank runs the same release and"
                " settings as this one; if it does, it is faulty or hostile, and has to go.",
                rank=rank,
                taken=error.taken,
            ) from error
        finally:
            self._latest[rank, message_id.kind] = message_id
        message = message.to(self._device)
        return message[:-1].view(header.shape), message[-1].bool(), header.number

    def send_note(self, note: Tensor, number: int, rank: int, message_id: MessageId) -> None:
        """Send a tensor, and a number with its header, without waiting; :meth:`finish_notes` does.

        Raises:
            PipelineModelError: if the note is no tensor that can cross a boundary.
            WorkerLostError: if ``rank`` does not answer.
        """
        for message in self._messages(note, torch.zeros((), dtype=torch.bool, device=note.device), rank, message_id, number):
            with _naming(rank):
                work = dist.isend(message, rank)
            assert work is not None, "the default group has all ranks"
            self._under_way.append((rank, work, message))

    def receive_note(self, rank: int, message_id: MessageId, expected: Expected) -> tuple[Tensor, int]:
        """Receive what :meth:`send_note` sent: the tensor, in memory of its own, and the number.

        Raises:
            MalformedMessageError: if something else came, now or before.
            WorkerLostError: if ``rank`` does not answer.
        """
        note, _, number = self.receive(rank, message_id, expected)
        return note, number

    def finish_notes(self) -> None:
        """Wait until all notes were taken; at the end of a schedule, when their receivers have asked for them.

        Raises:
            WorkerLostError: if one of the receivers does not answer.
        """
        for rank, work, _ in self._under_way:
            with _naming(rank):
                work.wait()
        self._under_way.clear()

    def _messages(self, tensor: Tensor, last: Tensor, rank: int, message_id: MessageId, number: int) -> list[Tensor]:
        """Header and elements, in memory that nobody else writes to: one message, or two."""
        header, size = encode(message_id, tensor.shape, tensor.dtype, number), _MessageSize(tensor.numel() + 1, tensor.dtype)
        as_before, self._sent[rank, message_id.kind] = self._sent.get((rank, message_id.kind)) == size, size
        tensor = tensor.detach()
        if self._wire.type != "cpu" or not as_before:
            return [header, torch.cat((tensor.reshape(-1), last.to(tensor.dtype).reshape(1))).to(self._wire)]
        message = torch.empty(size.bytes, dtype=torch.uint8)
        message[:_HEADER_BYTES] = header.view(torch.uint8)
        elements = message[_ELEMENTS_AT:].view(tensor.dtype)
        if tensor.device == self._wire:
            elements[:-1].view(tensor.shape).copy_(tensor)
            elements[-1] = last
        else:
            # Put together there, because the device is waited for with each copy.
            elements.copy_(torch.cat((tensor.reshape(-1), last.to(tensor.dtype).reshape(1))))
        return [message]

    def _message(self, rank: int, message_id: MessageId, expected: Expected) -> tuple[Header, Tensor]:
        """The one that is due. What comes in its place is taken off the wire, and so is one that came before, once."""
        words, elements = self._next(rank, message_id.kind)
        try:
            header = decode(words, message_id, expected)
        except MalformedMessageError as error:
            came = self._take(words, rank, message_id.kind, expected)
            error.taken = came is not None
            if came is not None and came == self._latest.get((rank, came.kind)):
                # The one that is due is behind it, unless the sender goes on like this.
                words, _ = self._next(rank, message_id.kind)
                error.taken = self._take(words, rank, message_id.kind, expected) == message_id
            raise
        size = _MessageSize(math.prod(header.shape) + 1, header.dtype)
        return header, elements if self._comes_with_its_header(size, rank, message_id.kind) else self._elements(rank, size)

    def _take(self, words: Tensor, rank: int, kind: Kind, expected: Expected) -> MessageId | None:
        """Take the elements behind a header off the wire. ``None`` if nobody can tell how many they are, or they are too many."""
        found = extent(words, expected)
        if found is None:
            return None
        message_id, dtype, elements = found
        size = _MessageSize(elements + 1, dtype)
        if not self._comes_with_its_header(size, rank, kind):
            self._elements(rank, size)
        return message_id

    def _next(self, rank: int, kind: Kind) -> tuple[Tensor, Tensor]:
        """The next header, and the elements if they are of the same size as before; else they come by themselves."""
        size = self._received.get((rank, kind)) if self._wire.type == "cpu" else None
        message = torch.empty(_HEADER_BYTES if size is None else size.bytes, dtype=torch.uint8)
        words = message[:_HEADER_BYTES].view(torch.int64).fill_(_UNTOUCHED)
        elements = message[_ELEMENTS_AT:].view(torch.float32 if size is None else size.dtype)
        elements[-1:] = _UNTOUCHED
        with _naming(rank):
            dist.recv(message, rank)
        return words, elements

    def _comes_with_its_header(self, size: _MessageSize, rank: int, kind: Kind) -> bool:
        """Whether the elements of a message came with its header, and from now on those of this size do."""
        before, self._received[rank, kind] = self._received.get((rank, kind)), size
        return self._wire.type == "cpu" and before == size

    def _elements(self, rank: int, size: _MessageSize) -> Tensor:
        """``(elements,)``, on the wire's device, with a mark at the end that tells whether so many came."""
        message = torch.empty(size.elements, dtype=size.dtype, device=self._wire)
        message[-1] = _UNTOUCHED
        with _naming(rank):
            dist.recv(message, rank)
        return message


@contextmanager
def _naming(rank: int) -> Iterator[None]:
    """Say which peer it was when a connection is lost."""
    try:
        yield
    except RuntimeError as error:
        if not sounds_lost(error):
            raise
        raise WorkerLostError(f"Rank {rank} does not answer: {error}", rank=rank) from error
