"""Point-to-point messages between neighbouring stages.

A signal (activation or gradient) travels as a header of integers (:mod:`~lightning_sentinel.pipeline.messages.headers`), then its
elements, then one more element with the taint flag, so that the flag costs no message of its own. The header is on the host, so
that reading it waits for no device. Each message makes the sender wait for the receiver. So through host memory header and elements
go as one message if their number and dtype are those of the last signal to that receiver, which then knows the size. Otherwise the
header goes first, alone.

A worker also sends small notes past its neighbour to the stage behind it: projections, along secret directions, of the signal that
it sent the neighbour. The sender does not wait for a note to arrive, because its receiver asks for it only after the neighbour's
own signal.

``device`` sends tensors from where they are. ``host`` copies them through host memory: between sites, and where the backend cannot
send from the device (several ranks on one GPU). Collectives go the same way
(:mod:`~lightning_sentinel.pipeline.processes.wire`).

The receiver compares every message with the expected one before it uses anything of it. What gloo itself does with a message whose
size is not that of the receiver's buffer (test_transport_over_gloo.py tests it):

- gloo accepts a shorter message silently, and the end of the buffer keeps its old bytes. So the receiver marks the end beforehand
  and checks the mark afterwards. The next message is not affected, because gloo knows where each ends.
- A longer message ends the receiver's *process*: gloo aborts in a thread of its own (``Received data size doesn't match expected
  size``), which no Python code can catch. So a worker that sends fewer elements than it announced is refused, but one that sends
  more takes its receiver down. Only another transport could help.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.pipeline.messages.headers import HEADER_WORDS, Expected, Header, Kind, MessageId, decode, encode, extent
from lightning_sentinel.pipeline.processes.wire import Sending, world

__all__ = ["Transport"]

# Sentinel for bytes not yet received. -1 is safe: header words and taint flags are never negative, every dtype can represent it.
_UNTOUCHED = -1
_HEADER_BYTES = 8 * HEADER_WORDS
# Byte offset of the elements in a message that also has the header: aligned as separate tensors would be.
_ELEMENTS_AT = -(-_HEADER_BYTES // 64) * 64


class _MessageSize(NamedTuple):
    """Size of the last signal on a connection, which sender and receiver both remember."""

    elements: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return _ELEMENTS_AT + self.elements * self.dtype.itemsize


class Transport:
    """Sends signals to other ranks and receives signals from them.

    If a malformed message's header gives its size and there is memory for it, the receiver drains it, and can receive the sender's
    next message. Otherwise it receives nothing more from that rank: the elements behind that header are still under way, and would
    be taken for the next message. With gloo the sender then waits, until the group's timeout, for a receiver. Signals are still
    sent to that rank, because other workers wait for what it computes from them.

    Args:
        device: where signals live.
        mode: ``"device"``, ``"host"``, or ``"auto"``, which sends from the device where the backend can.
    """

    def __init__(self, device: torch.device, mode: Literal["auto", "device", "host"] = "auto") -> None:
        self._device = device
        self._wire = {"auto": world().device_for(device), "device": device, "host": torch.device("cpu")}[mode]
        self._under_way: list[Sending] = []
        self._broken: dict[int, str] = {}
        self._sent: dict[tuple[int, Kind], _MessageSize] = {}
        self._received: dict[tuple[int, Kind], _MessageSize] = {}
        self._latest: dict[tuple[int, Kind], MessageId] = {}

    def send(self, signal: Tensor, tainted: Tensor, rank: int, message_id: MessageId, number: int = 0) -> None:
        """Send a signal of any shape, its taint flag (0-dim bool), and a number in its header.

        Raises:
            PipelineModelError: if the signal is no tensor that can cross a boundary.
            WorkerLostError: if ``rank`` does not answer.
        """
        for message in self._messages(signal, tainted, rank, message_id, number):
            world().send(message, rank)

    def receive(self, rank: int, message_id: MessageId, expected: Expected) -> tuple[Tensor, Tensor, int]:
        """Receive a signal, its taint flag, and its number.

        Args:
            rank: the sender.
            message_id: the message that is due.
            expected: which headers are allowed.

        Returns:
            the signal, in memory of its own; the 0-dim bool taint, true unless the sender wrote exactly 0; the number.

        Raises:
            MalformedMessageError: if ``rank`` sent another message, now or before. A duplicate makes the next message fail too.
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
            # Not checked on a device, which would have to be waited for. There the mark, which is not zero, taints the signal.
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
        """Send a tensor, and a number in its header, without waiting for the receiver; :meth:`finish_notes` waits.

        Raises:
            PipelineModelError: if the note is no tensor that can cross a boundary.
            WorkerLostError: if ``rank`` does not answer.
        """
        for message in self._messages(note, torch.zeros((), dtype=torch.bool, device=note.device), rank, message_id, number):
            self._under_way.append(world().send_later(message, rank))

    def receive_note(self, rank: int, message_id: MessageId, expected: Expected) -> tuple[Tensor, int]:
        """Receive what :meth:`send_note` sent: the tensor, in memory of its own, and the number.

        Raises:
            MalformedMessageError: if ``rank`` sent another message, now or before.
            WorkerLostError: if ``rank`` does not answer.
        """
        note, _, number = self.receive(rank, message_id, expected)
        return note, number

    def finish_notes(self) -> None:
        """Wait until all notes are received. Called at the end of a schedule, when their receivers have asked for them.

        Raises:
            WorkerLostError: if a receiver does not answer.
        """
        for sending in self._under_way:
            sending.wait()
        self._under_way.clear()

    def _messages(self, tensor: Tensor, last: Tensor, rank: int, message_id: MessageId, number: int) -> list[Tensor]:
        """Header and elements as one message or two, in memory that no other code writes to."""
        header = encode(message_id, tensor.shape, tensor.dtype, number)
        size = _MessageSize(tensor.numel() + 1, tensor.dtype)
        as_before = self._sent.get((rank, message_id.kind)) == size
        self._sent[rank, message_id.kind] = size
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
            # Concatenated on the device, because each copy to the host waits for it.
            elements.copy_(torch.cat((tensor.reshape(-1), last.to(tensor.dtype).reshape(1))))
        return [message]

    def _message(self, rank: int, message_id: MessageId, expected: Expected) -> tuple[Header, Tensor]:
        """Receive the message that is due. If another arrives instead, drain it; if it is a duplicate, drain the next one too."""
        words, elements = self._next(rank, message_id.kind)
        try:
            header = decode(words, message_id, expected)
        except MalformedMessageError as error:
            came = self._take(words, rank, message_id.kind, expected)
            error.taken = came is not None
            if came is not None and came == self._latest.get((rank, came.kind)):
                # A duplicate: the message that is due comes next, unless the sender repeats more.
                words, _ = self._next(rank, message_id.kind)
                error.taken = self._take(words, rank, message_id.kind, expected) == message_id
            raise
        size = _MessageSize(math.prod(header.shape) + 1, header.dtype)
        return header, elements if self._comes_with_its_header(size, rank, message_id.kind) else self._elements(rank, size)

    def _take(self, words: Tensor, rank: int, kind: Kind, expected: Expected) -> MessageId | None:
        """Drain the elements behind a refused header. ``None`` if the header does not give their number, or it is too large."""
        found = extent(words, expected)
        if found is None:
            return None
        message_id, dtype, elements = found
        size = _MessageSize(elements + 1, dtype)
        if not self._comes_with_its_header(size, rank, kind):
            self._elements(rank, size)
        return message_id

    def _next(self, rank: int, kind: Kind) -> tuple[Tensor, Tensor]:
        """Receive the next header, with the elements if their size is that of the last message; else they follow separately."""
        size = self._received.get((rank, kind)) if self._wire.type == "cpu" else None
        message = torch.empty(_HEADER_BYTES if size is None else size.bytes, dtype=torch.uint8)
        words = message[:_HEADER_BYTES].view(torch.int64).fill_(_UNTOUCHED)
        elements = message[_ELEMENTS_AT:].view(torch.float32 if size is None else size.dtype)
        elements[-1:] = _UNTOUCHED
        world().receive(message, rank)
        return words, elements

    def _comes_with_its_header(self, size: _MessageSize, rank: int, kind: Kind) -> bool:
        """Whether a message's elements came with its header. From now on elements of this size do."""
        before = self._received.get((rank, kind))
        self._received[rank, kind] = size
        return self._wire.type == "cpu" and before == size

    def _elements(self, rank: int, size: _MessageSize) -> Tensor:
        """Receive elements sent after their header: ``(elements,)``, on the wire's device. A mark left at the end means too few."""
        message = torch.empty(size.elements, dtype=size.dtype, device=self._wire)
        message[-1] = _UNTOUCHED
        world().receive(message, rank)
        return message
