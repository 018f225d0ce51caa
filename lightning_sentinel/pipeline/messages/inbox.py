"""Receives a step's signals and notes, and replaces malformed messages so that the step can go on.

A malformed message holds nothing usable, so the receiver goes on with a signal of the right shape filled with NaN. From there on
it is handled as if the sender had sent NaN: the signal is kept out of the weights, and the sender is blamed. That takes a verifier.
Without one, or where no worker may be blamed, a malformed message ends the run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.pipeline.messages.headers import DTYPES, NOTHING, Allowance, Expected, Kind, MessageId
from lightning_sentinel.pipeline.messages.transport import Transport
from lightning_sentinel.verification.projection import Projection

__all__ = ["Inbox"]


class Inbox:
    """Receives signals and notes.

    The shape of a gradient is known from the forward pass, that of an activation is not, because samples may differ in length. So
    each activation carries an ``is_new_shape`` bit. If the sender's input shape was known but its output shape is new to us and our
    layers reject it, the sender altered it.

    Args:
        transport: receives the messages.
        device: where signals are.
        try_out: runs this stage's layers on an activation of a micro-batch, without side effects, and raises what they raise.
    """

    def __init__(self, transport: Transport, device: torch.device, try_out: Callable[[Tensor, int], object]) -> None:
        self._transport = transport
        self._device = device
        self._try_out = try_out
        self._allowances = {kind: Allowance() for kind in Kind}
        self._shapes: set[tuple[int, ...]] = set()
        self._news: dict[int, bool] = {}
        self._replaces = self._lets_nothing_in = False
        self._told_of: set[int | None] = set()
        self._replaced: set[MessageId] = set()

    def begin(self, replaces: bool, lets_nothing_in: bool = False) -> None:
        """Begin a step.

        Args:
            replaces: whether a signal of NaN replaces a malformed message; if not, a malformed message ends the run.
            lets_nothing_in: whether an activation may be absent, because the step does not call the pipeline.
        """
        self._replaces = replaces
        self._lets_nothing_in = lets_nothing_in
        self._news.clear()
        self._replaced.clear()

    def is_replaced(self, message_id: MessageId) -> bool:
        """Whether a message of this step was malformed, and a signal of NaN went on in its place."""
        return message_id in self._replaced

    def is_new_shape(self, slot: int) -> bool:
        """Whether a micro-batch's input has a shape that is new to this stage, or an earlier stage's input had a new one."""
        return self._news[slot]

    def loaded(self, inputs: object, slot: int) -> None:
        """Record the shape of a micro-batch that the first stage loaded."""
        shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else None
        self._news[slot] = shape is None or shape not in self._shapes
        if shape is not None:
            self._shapes.add(shape)

    def activation(self, rank: int, message_id: MessageId, samples: int) -> tuple[Tensor | None, Tensor]:
        """Receive an activation, ``None`` if there is none, and its taint flag, as :meth:`Transport.receive` does.

        Args:
            rank: the sender.
            message_id: the message that is due.
            samples: number of samples in the micro-batch.

        Raises:
            MalformedMessageError: if the message is malformed, and must not or cannot be replaced.
            WorkerLostError: if ``rank`` does not answer.
        """
        allowance = self._allowances[Kind.ACTIVATION]
        usual = allowance.usual(samples) if self._replaces else None
        expected = allowance.expected(samples if self._replaces else None, numbers=range(2))
        if self._lets_nothing_in:
            expected = replace(expected, numbers=range(NOTHING + 1), dtypes=DTYPES)
        try:
            signal, tainted, is_new_shape = self._transport.receive(rank, message_id, expected)
            if is_new_shape == NOTHING:
                return None, tainted
            shape = tuple(signal.shape)
            if usual is not None and not is_new_shape and shape not in self._shapes:
                self._require_workable(signal, usual, rank, message_id)
        except MalformedMessageError as error:
            if usual is None or not error.taken:
                raise
            self._news[message_id.slot] = False
            return self._nothing(message_id, usual, allowance.dtypes[0], error)
        self._news[message_id.slot] = bool(is_new_shape) or shape not in self._shapes
        self._shapes.add(shape)
        allowance.saw(signal, samples)
        return signal, tainted

    def gradient(self, rank: int, message_id: MessageId, output: Tensor) -> tuple[Tensor, Tensor]:
        """Receive the gradient of ``output`` and its taint flag; otherwise like :meth:`activation`."""
        try:
            signal, tainted, _ = self._transport.receive(rank, message_id, Expected.like(output))
        except MalformedMessageError as error:
            if not self._replaces or not error.taken:
                raise
            return self._nothing(message_id, output.shape, output.dtype, error)
        return signal, tainted

    def note(self, rank: int, message_id: MessageId) -> Projection:
        """Receive a worker's note: the projection of the signal that it sent our neighbour. A malformed note ends the run.

        Raises:
            MalformedMessageError: if the note is malformed.
            WorkerLostError: if ``rank`` does not answer.
        """
        allowance = self._allowances[message_id.kind]
        note, channels = self._transport.receive_note(rank, message_id, allowance.expected(numbers=range(1, 2**31)))
        allowance.saw(note)
        return Projection(note, channels)

    def _require_workable(self, signal: Tensor, usual: Sequence[int], rank: int, message_id: MessageId) -> None:
        try:
            self._try_out(signal, message_id.slot)
        except Exception as error:
            raise MalformedMessageError(
                f"Rank {rank} sent the {message_id} in shape {tuple(signal.shape)}, on which this stage's layers fail with"
                f" {type(error).__name__}: {error}; they have worked on {tuple(usual)}.",
                rank=rank,
                taken=True,
            ) from error

    def _nothing(
        self, message_id: MessageId, shape: Sequence[int], dtype: torch.dtype, error: MalformedMessageError
    ) -> tuple[Tensor, Tensor]:
        """A signal of NaN in place of a malformed message, for which the sender is blamed. Warns once per sender."""
        self._replaced.add(message_id)
        if error.rank not in self._told_of:
            self._told_of.add(error.rank)
            warnings.warn(f"{error} It counts as a signal that is not finite.", RuntimeWarning, stacklevel=2)
        return torch.full(tuple(shape), torch.nan, dtype=dtype, device=self._device), torch.tensor(False, device=self._device)
