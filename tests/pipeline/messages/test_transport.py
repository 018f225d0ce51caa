from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sentinel.errors import MalformedMessageError, PipelineModelError, WorkerLostError
from lightning_sentinel.pipeline.messages.headers import DTYPES, HEADER_WORDS, Expected, Kind, MessageId, encode
from lightning_sentinel.pipeline.messages.transport import Transport
from tests.pipeline.ranks import Silent, installed

CPU = torch.device("cpu")
YES = torch.tensor(True)
NO = torch.tensor(False)
ANY = Expected(DTYPES, most_elements=100)
NOTE = Expected(DTYPES, most_elements=100, numbers=range(2**40 + 1))


def at(slot: int, kind: Kind = Kind.ACTIVATION) -> MessageId:
    return MessageId(5, slot, kind)


DUE, NOTE_DUE = at(0), at(0, Kind.NOTE_ACTIVATION)


class Loop(Silent):
    """What this process sends comes back to it; the end of a buffer that is too large stays what it was, as with gloo."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: deque[Tensor] = deque()
        self.under_way: list[Tensor] = []
        """What was sent without waiting: the memory itself, which must not change before it was taken."""
        self.waited = 0

    def _send(self, tensor: Tensor, rank: int) -> None:
        self.messages.append(tensor.clone())

    def _send_later(self, tensor: Tensor, rank: int, tag: int) -> Loop:
        assert tensor.is_contiguous() and not tensor.requires_grad
        self.messages.append(tensor)
        self.under_way.append(tensor)
        return self

    def wait(self) -> None:
        self.waited += 1

    def _receive(self, tensor: Tensor, rank: int, tag: int) -> None:
        message, room = self.messages.popleft().reshape(-1).view(torch.uint8), tensor.view(torch.uint8)
        assert len(message) <= len(room), "gloo aborts the process"
        room[: len(message)] = message


@pytest.fixture
def wire() -> Iterator[Loop]:
    with installed(Loop()) as loop:
        yield loop


SIGNALS = {
    "float32": torch.linspace(-1, 1, 12).view(3, 4),
    "float64": torch.rand(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "float16": torch.ones(5, dtype=torch.float16),
    "bfloat16": torch.full((2, 1, 3), 0.1, dtype=torch.bfloat16),
    "0 axes": torch.tensor(3.5),
    "8 axes": torch.arange(6.0).view(1, 2, 1, 3, 1, 1, 1, 1),
    "empty": torch.empty(0, 4),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "with a graph": torch.ones(2, 2, requires_grad=True),
    "not finite": torch.tensor([torch.inf, -torch.inf, 1.0]),
}


@pytest.mark.parametrize("mode", ["auto", "device", "host"])
@pytest.mark.parametrize("taint", [YES, NO], ids=["tainted", "clean"])
@pytest.mark.parametrize("signal", SIGNALS.values(), ids=SIGNALS)
def test_there_and_back(wire: Loop, signal: Tensor, taint: Tensor, mode: str) -> None:
    transport = Transport(CPU, mode)  # type: ignore[arg-type]
    transport.send(signal, taint, 1, DUE)
    assert [len(message) for message in wire.messages] == [HEADER_WORDS, signal.numel() + 1]
    received, tainted, _ = transport.receive(1, DUE, ANY)
    assert received.dtype == signal.dtype
    assert torch.equal(received, signal)
    assert received.is_contiguous()
    assert not received.requires_grad
    assert (tainted.shape, tainted.dtype, bool(tainted)) == ((), torch.bool, bool(taint))


@pytest.mark.parametrize("taint", [YES, NO], ids=["tainted", "clean"])
def test_a_gradient_of_known_shape(wire: Loop, taint: Tensor) -> None:
    transport, signal = Transport(CPU), torch.rand(3, 2, generator=torch.Generator().manual_seed(1))
    transport.send(signal, taint, 1, at(2, Kind.GRADIENT))
    received, tainted, _ = transport.receive(1, at(2, Kind.GRADIENT), Expected.like(torch.zeros(3, 2)))
    assert torch.equal(received, signal)
    assert bool(tainted) == bool(taint)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("flag", "tainted"), [(0.0, False), (-0.0, False), (1.0, True), (0.5, True), (2.0, True), (math.nan, True), (-math.inf, True)]
)
def test_any_flag_but_zero_is_a_taint(wire: Loop, flag: float, tainted: bool, dtype: torch.dtype) -> None:
    wire.messages.extend((encode(DUE, (2,), dtype), torch.tensor([3.0, 4.0, flag], dtype=dtype)))
    signal, its, _ = Transport(CPU).receive(1, DUE, ANY)
    assert signal.tolist() == [3.0, 4.0]
    assert bool(its) is tainted


def test_messages_of_one_size_are_one_each(wire: Loop) -> None:
    transport = Transport(CPU)
    shapes = [(2, 3), (2, 3), (3, 2), (4, 3), (2, 3), (2, 3), (1, 6)]
    sent = [torch.rand(shape, generator=torch.Generator().manual_seed(slot)) for slot, shape in enumerate(shapes)]
    counts = []
    for slot, signal in enumerate(sent):
        transport.send(signal, YES if slot % 2 else NO, 1, at(slot))
        counts.append(len(wire.messages))
        received, tainted, _ = transport.receive(1, at(slot), ANY)
        assert torch.equal(received, signal) and bool(tainted) is bool(slot % 2)
        assert received.data_ptr() % 64 == 0, "as a tensor of its own"
    assert counts == [2, 1, 1, 2, 2, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_of_peers_and_kinds_are_their_own(wire: Loop, dtype: torch.dtype) -> None:
    transport, gradient = Transport(CPU), at(0, Kind.GRADIENT)
    for _ in range(2):
        for rank, message_id, length in ((1, at(0), 2), (2, at(0), 3), (1, gradient, 4)):
            signal = torch.arange(length).to(dtype)
            transport.send(signal, NO, rank, message_id)
            assert torch.equal(transport.receive(rank, message_id, ANY)[0], signal)
    signal = torch.ones(2, dtype=torch.float64 if dtype != torch.float64 else torch.float32)
    transport.send(signal, NO, 1, at(0))
    assert torch.equal(transport.receive(1, at(0), ANY)[0], signal)


def test_signals_do_not_share_memory(wire: Loop) -> None:
    transport, signal = Transport(CPU), torch.ones(3)
    for slot in range(2):
        transport.send(signal, NO, 1, at(slot))
    first, second = (transport.receive(1, at(slot), ANY)[0] for slot in range(2))
    first.fill_(5.0)
    assert second.tolist() == signal.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "signal",
    [torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.complex64), torch.tensor([True]), torch.ones((1,) * 9)],
    ids=["int64", "complex64", "bool", "9 axes"],
)
def test_what_cannot_cross_is_refused(wire: Loop, signal: Tensor) -> None:
    with pytest.raises(PipelineModelError) as raised:
        Transport(CPU).send(signal, NO, 1, DUE)
    message = str(raised.value)
    assert f"shape {tuple(signal.shape)} and dtype {signal.dtype}" in message
    assert "at most 8 axes: end the stage" in message
    assert not wire.messages


NOTES = {name: signal for name, signal in SIGNALS.items() if not signal.requires_grad}


@pytest.mark.parametrize("mode", ["device", "host"])
@pytest.mark.parametrize("number", [0, 64, 2**40])
@pytest.mark.parametrize("note", NOTES.values(), ids=NOTES)
def test_a_note_arrives_with_its_number(wire: Loop, note: Tensor, number: int, mode: str) -> None:
    transport = Transport(CPU, mode)  # type: ignore[arg-type]
    transport.send_note(note, number, 1, NOTE_DUE)
    received, its = transport.receive_note(1, NOTE_DUE, NOTE)
    assert (received.dtype, its) == (note.dtype, number) and torch.equal(received, note) and not wire.messages


def test_notes_are_waited_for_at_the_end_and_once(wire: Loop) -> None:
    transport = Transport(CPU)
    for number in range(3):
        transport.send_note(torch.full((2,), float(number)), number, 1, at(number, Kind.NOTE_GRADIENT))
    assert wire.waited == 0
    transport.finish_notes()
    assert wire.waited == len(wire.under_way) == 4, "the first in two messages, the others in one"
    transport.finish_notes()
    assert wire.waited == 4
    assert [transport.receive_note(1, at(slot, Kind.NOTE_GRADIENT), NOTE)[1] for slot in range(3)] == [0, 1, 2]


def test_a_note_may_be_changed_once_it_is_under_way(wire: Loop) -> None:
    transport, note = Transport(CPU), torch.ones(2)
    transport.send_note(note, 1, 1, NOTE_DUE)
    note.zero_()
    assert transport.receive_note(1, NOTE_DUE, NOTE)[0].tolist() == [1.0, 1.0]


def test_notes_and_signals_keep_their_order(wire: Loop) -> None:
    transport = Transport(CPU)
    after = at(1, Kind.NOTE_ACTIVATION)
    transport.send_note(torch.ones(2), 7, 1, NOTE_DUE)
    transport.send(torch.zeros(3), YES, 1, DUE)
    transport.send_note(torch.ones(1), 8, 1, after)
    assert transport.receive_note(1, NOTE_DUE, NOTE)[1] == 7
    assert bool(transport.receive(1, DUE, ANY)[1])
    assert transport.receive_note(1, after, NOTE)[1] == 8


class TestLostPeers:
    def test_named_when_a_note_is_lost(self, monkeypatch: pytest.MonkeyPatch, wire: Loop) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:999")

        transport = Transport(CPU)
        transport.send_note(torch.ones(2), 0, 4, NOTE_DUE)
        monkeypatch.setattr(Loop, "wait", fail)
        with pytest.raises(WorkerLostError, match="Rank 4 does not answer") as raised:
            transport.finish_notes()
        assert raised.value.rank == 4
        monkeypatch.setattr(wire, "_send_later", fail)
        monkeypatch.setattr(wire, "_receive", fail)
        with pytest.raises(WorkerLostError, match="Rank 2 does not answer"):
            transport.send_note(torch.ones(2), 0, 2, NOTE_DUE)
        with pytest.raises(WorkerLostError, match="Rank 3 does not answer"):
            transport.receive_note(3, NOTE_DUE, NOTE)

    @pytest.mark.parametrize("header", [True, False], ids=["at the header", "at the elements"])
    def test_named(self, monkeypatch: pytest.MonkeyPatch, wire: Loop, header: bool) -> None:
        def closed_after(count: int, works: Callable[..., object]) -> Callable[..., None]:
            left = iter(range(count))

            def call(*arguments: Any) -> None:
                if next(left, None) is None:
                    raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:999")
                works(*arguments)

            return call

        transport = Transport(CPU)
        monkeypatch.setattr(wire, "_send", closed_after(0 if header else 1, wire._send))
        monkeypatch.setattr(wire, "_receive", closed_after(0 if header else 1, wire._receive))
        with pytest.raises(WorkerLostError, match="Rank 2 does not answer") as raised:
            transport.send(torch.ones(2), NO, 2, DUE)
        assert raised.value.rank == 2
        with pytest.raises(WorkerLostError, match=r"Rank 3 does not answer: .*closed by peer") as raised:
            transport.receive(3, DUE, ANY)
        assert raised.value.rank == 3

    def test_other_errors_pass(self, monkeypatch: pytest.MonkeyPatch, wire: Loop) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(wire, "_receive", fail)
        with pytest.raises(RuntimeError, match="out of memory") as raised:
            Transport(CPU).receive(3, DUE, ANY)
        assert not isinstance(raised.value, WorkerLostError)


class TestMalformed:
    MALFORMED = {
        "a duplicate": ((encode(at(0), (2,), torch.float32), torch.zeros(3)), "is a duplicate or late"),
        "late": ((encode(MessageId(4, 3, Kind.ACTIVATION), (2,), torch.float32), torch.zeros(3)), "is a duplicate or late"),
        "early": ((encode(at(2), (2,), torch.float32), torch.zeros(3)), "is early"),
        "of another kind": ((encode(at(1, Kind.GRADIENT), (2,), torch.float32), torch.zeros(3)), "is of another kind"),
        "huge": ((encode(at(1), (2**40, 2**40), torch.float32), torch.zeros(3)), "memory for 100 elements"),
        "one element too large": ((encode(at(1), (101,), torch.float32), torch.zeros(102)), "memory for 100 elements"),
        "no header": ((torch.zeros(HEADER_WORDS, dtype=torch.int64),), "does not begin as a header"),
        "an empty header": ((torch.empty(0, dtype=torch.int64),), "does not begin as a header"),
        "half a header": ((encode(at(1), (2,), torch.float32)[:9], torch.zeros(3)), "must not be negative"),
        "a header but its last word": ((encode(at(1), (2,), torch.float32)[:-1], torch.zeros(3)), "must not be negative"),
        "no flag": ((encode(at(1), (2,), torch.float32), torch.zeros(2)), "has fewer elements than the 3 of shape (2,)"),
        "no elements": ((encode(at(1), (2,), torch.float16), torch.zeros(0, dtype=torch.float16)), "has fewer elements"),
    }

    @pytest.mark.parametrize("mode", ["device", "host"])
    @pytest.mark.parametrize(("messages", "reason"), MALFORMED.values(), ids=MALFORMED)
    def test_refused_and_named(self, wire: Loop, messages: tuple[Tensor, ...], reason: str, mode: str) -> None:
        transport = Transport(CPU, mode)  # type: ignore[arg-type]
        wire.messages.extend(messages)
        with pytest.raises(MalformedMessageError) as raised:
            transport.receive(3, at(1), ANY)
        message = str(raised.value)
        assert raised.value.rank == 3
        assert message.startswith("Rank 3 sent a malformed message. Expected the activation of step 5, micro-batch 1; what came ")
        assert reason in message and "See that the rank runs the same release" in message

    @pytest.mark.parametrize("before", [0, 1], ids=["in two messages", "in one"])
    @pytest.mark.parametrize(
        ("message_id", "cut"),
        [(MessageId(4, 1, Kind.ACTIVATION), 0), (at(3), 0), (at(1), 4), (at(1), 12)],
        ids=["late", "early", "no flag", "no elements"],
    )
    def test_the_next_message_is_received(self, wire: Loop, before: int, message_id: MessageId, cut: int) -> None:
        transport = Transport(CPU)
        for _ in range(before):
            transport.send(torch.ones(2), NO, 3, at(0))
            transport.receive(3, at(0), ANY)
        transport.send(torch.ones(2), NO, 3, message_id)
        whole = wire.messages.pop().view(torch.uint8)
        wire.messages.append(whole[: len(whole) - cut])
        with pytest.raises(MalformedMessageError) as raised:
            transport.receive(3, at(1), ANY)
        assert raised.value.taken and not wire.messages
        transport.send(torch.full((2,), 7.0), YES, 3, at(2))
        assert len(wire.messages) == 1, "of the size that the one before had"
        signal, tainted, _ = transport.receive(3, at(2), ANY)
        assert signal.tolist() == [7.0, 7.0] and tainted and not wire.messages

    def test_more_than_there_is_memory_for_is_left_on_the_wire(self, wire: Loop) -> None:
        wire.messages.extend((encode(at(0), (101,), torch.float32), torch.zeros(102)))
        with pytest.raises(MalformedMessageError) as raised:
            Transport(CPU).receive(3, at(1), ANY)
        assert not raised.value.taken and len(wire.messages) == 1

    def test_nothing_is_allocated_for_a_header_that_is_refused(self, monkeypatch: pytest.MonkeyPatch, wire: Loop) -> None:
        asked, empty = [], torch.empty

        def count(size: int, **options: Any) -> Tensor:
            asked.append(size)
            return empty(size, **options)

        wire.messages.append(encode(DUE, (101,), torch.float32))
        monkeypatch.setattr("torch.empty", count)
        with pytest.raises(MalformedMessageError):
            Transport(CPU).receive(3, DUE, ANY)
        assert asked == [8 * HEADER_WORDS]

    @pytest.mark.parametrize("kind", [Kind.NOTE_ACTIVATION, Kind.ACTIVATION])
    def test_the_wire_is_not_touched_again(self, wire: Loop, kind: Kind) -> None:
        transport = Transport(CPU)
        wire.messages.extend((encode(at(0, kind), (2**40,), torch.float32), torch.zeros(3)))
        with pytest.raises(MalformedMessageError):
            transport.receive_note(3, at(0, kind), NOTE)
        transport.send(torch.ones(2), NO, 3, at(1))
        before = len(wire.messages)
        assert before == 3
        for again in (lambda: transport.receive(3, at(1), ANY), lambda: transport.receive_note(3, at(1, kind), NOTE)):
            with pytest.raises(MalformedMessageError, match=r"Rank 3 is not listened to.* since .*announces sizes") as raised:
                again()
            assert raised.value.rank == 3
            assert "micro-batch 1 either" in str(raised.value)
        assert len(wire.messages) == before

    def test_other_ranks_are_heard(self, wire: Loop) -> None:
        transport = Transport(CPU)
        wire.messages.append(torch.zeros(HEADER_WORDS, dtype=torch.int64))
        with pytest.raises(MalformedMessageError):
            transport.receive(3, DUE, ANY)
        transport.send(torch.ones(2), NO, 2, DUE)
        assert transport.receive(2, DUE, ANY)[0].tolist() == [1.0, 1.0]

    def test_a_message_that_is_sent_twice(self, wire: Loop) -> None:
        transport = Transport(CPU)
        for _ in range(2):
            transport.send(torch.ones(2), NO, 1, at(0))
        transport.receive(1, at(0), ANY)
        transport.send(torch.ones(2), NO, 1, at(1))
        with pytest.raises(
            MalformedMessageError, match="is a duplicate or late: the activation of step 5, micro-batch 0"
        ) as raised:
            transport.receive(1, at(1), ANY)
        assert raised.value.taken and not wire.messages
        transport.send(torch.ones(2), NO, 1, at(2))
        assert transport.receive(1, at(2), ANY)[0].tolist() == [1.0, 1.0]

    def test_one_that_is_sent_again_and_again(self, wire: Loop) -> None:
        """Nobody reads for ever."""
        transport = Transport(CPU)
        for _ in range(100):
            transport.send(torch.ones(2), NO, 1, at(0))
        transport.receive(1, at(0), ANY)
        with pytest.raises(MalformedMessageError) as raised:
            transport.receive(1, at(1), ANY)
        assert not raised.value.taken
        with pytest.raises(MalformedMessageError, match="is not listened to"):
            transport.receive(1, at(2), ANY)

    def test_notes(self, wire: Loop) -> None:
        transport = Transport(CPU)
        transport.send_note(torch.ones(2), 65, 1, NOTE_DUE)
        with pytest.raises(MalformedMessageError, match="carries the number 65, and allowed are 1 to 64"):
            transport.receive_note(1, NOTE_DUE, Expected(DTYPES, 100, numbers=range(1, 65)))
        wire.messages.clear()
        wire.messages.extend((encode(NOTE_DUE, (2,), torch.float32), torch.zeros(1)))
        with pytest.raises(MalformedMessageError, match="has fewer elements"):
            transport.receive_note(2, NOTE_DUE, NOTE)
