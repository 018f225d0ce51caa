from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import Tensor

from lightning_sentinel.errors import PipelineModelError, WorkerLostError
from lightning_sentinel.pipeline.transport import Transport

CPU = torch.device("cpu")
YES = torch.tensor(True)
NO = torch.tensor(False)


class Wire:
    """What this process sends comes back to it."""

    def __init__(self) -> None:
        self.messages: deque[Tensor] = deque()
        self.under_way: list[Tensor] = []
        """What was sent without waiting: the memory itself, which must not change before it was taken."""
        self.waited = 0

    def send(self, tensor: Tensor, rank: int) -> None:
        self.messages.append(tensor.clone())

    def isend(self, tensor: Tensor, rank: int) -> Wire:
        assert tensor.is_contiguous() and not tensor.requires_grad
        self.messages.append(tensor)
        self.under_way.append(tensor)
        return self

    def wait(self) -> None:
        self.waited += 1

    def recv(self, tensor: Tensor, rank: int) -> None:
        message = self.messages.popleft()
        assert (message.shape, message.dtype) == (tensor.shape, tensor.dtype)
        tensor.copy_(message)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    wire = Wire()
    monkeypatch.setattr("torch.distributed.send", wire.send)
    monkeypatch.setattr("torch.distributed.recv", wire.recv)
    monkeypatch.setattr("torch.distributed.isend", wire.isend)
    return wire


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
def test_there_and_back(wire: Wire, signal: Tensor, taint: Tensor, mode: str) -> None:
    transport = Transport(CPU, mode)  # type: ignore[arg-type]
    transport.send(signal, taint, 1, header=True)
    assert len(wire.messages) == 2
    received, tainted = transport.receive(1)
    assert received.dtype == signal.dtype
    assert torch.equal(received, signal)
    assert received.is_contiguous()
    assert not received.requires_grad
    assert (tainted.shape, tainted.dtype, bool(tainted)) == ((), torch.bool, bool(taint))


@pytest.mark.parametrize("taint", [YES, NO], ids=["tainted", "clean"])
def test_without_a_header_it_is_one_message(wire: Wire, taint: Tensor) -> None:
    transport, signal = Transport(CPU), torch.rand(3, 2, generator=torch.Generator().manual_seed(1))
    transport.send(signal, taint, 1, header=False)
    assert len(wire.messages) == 1
    received, tainted = transport.receive(1, like=torch.zeros(3, 2))
    assert torch.equal(received, signal)
    assert bool(tainted) == bool(taint)


def test_signals_do_not_share_memory(wire: Wire) -> None:
    transport, signal = Transport(CPU), torch.ones(3)
    for _ in range(2):
        transport.send(signal, NO, 1, header=True)
    first, second = transport.receive(1)[0], transport.receive(1)[0]
    first.fill_(5.0)
    assert second.tolist() == signal.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "signal",
    [torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.complex64), torch.tensor([True]), torch.ones((1,) * 9)],
    ids=["int64", "complex64", "bool", "9 axes"],
)
def test_what_cannot_cross_is_refused(wire: Wire, signal: Tensor) -> None:
    with pytest.raises(PipelineModelError) as raised:
        Transport(CPU).send(signal, NO, 1, header=True)
    message = str(raised.value)
    assert f"shape {tuple(signal.shape)} and dtype {signal.dtype}" in message
    assert "at most 8 axes: end the stage" in message
    assert not wire.messages


NOTES = {name: signal for name, signal in SIGNALS.items() if not signal.requires_grad}


@pytest.mark.parametrize("mode", ["device", "host"])
@pytest.mark.parametrize("number", [0, 64, 2**40])
@pytest.mark.parametrize("note", NOTES.values(), ids=NOTES)
def test_a_note_arrives_with_its_number(wire: Wire, note: Tensor, number: int, mode: str) -> None:
    transport = Transport(CPU, mode)  # type: ignore[arg-type]
    transport.send_note(note, number, 1)
    received, its = transport.receive_note(1)
    assert (received.dtype, its) == (note.dtype, number) and torch.equal(received, note) and not wire.messages


def test_notes_are_waited_for_at_the_end_and_once(wire: Wire) -> None:
    transport = Transport(CPU)
    for number in range(3):
        transport.send_note(torch.full((2,), float(number)), number, 1)
    assert wire.waited == 0
    transport.finish_notes()
    assert wire.waited == len(wire.under_way) == 6
    transport.finish_notes()
    assert wire.waited == 6
    assert [transport.receive_note(1)[1] for _ in range(3)] == [0, 1, 2]


def test_notes_and_signals_keep_their_order(wire: Wire) -> None:
    transport = Transport(CPU)
    transport.send_note(torch.ones(2), 7, 1)
    transport.send(torch.zeros(3), YES, 1, header=True)
    transport.send_note(torch.ones(1), 8, 1)
    assert transport.receive_note(1)[1] == 7
    assert bool(transport.receive(1)[1])
    assert transport.receive_note(1)[1] == 8


class TestLostPeers:
    def test_named_when_a_note_is_lost(self, monkeypatch: pytest.MonkeyPatch, wire: Wire) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:999")

        transport = Transport(CPU)
        transport.send_note(torch.ones(2), 0, 4)
        monkeypatch.setattr(Wire, "wait", fail)
        with pytest.raises(WorkerLostError, match="Rank 4 does not answer") as raised:
            transport.finish_notes()
        assert raised.value.rank == 4
        monkeypatch.setattr("torch.distributed.isend", fail)
        monkeypatch.setattr("torch.distributed.recv", fail)
        with pytest.raises(WorkerLostError, match="Rank 2 does not answer"):
            transport.send_note(torch.ones(2), 0, 2)
        with pytest.raises(WorkerLostError, match="Rank 3 does not answer"):
            transport.receive_note(3)

    @pytest.mark.parametrize("like", [None, torch.zeros(2)], ids=["header", "message"])
    def test_named(self, monkeypatch: pytest.MonkeyPatch, like: Tensor | None) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:999")

        monkeypatch.setattr("torch.distributed.send", fail)
        monkeypatch.setattr("torch.distributed.recv", fail)
        transport = Transport(CPU)
        with pytest.raises(WorkerLostError, match=r"Rank 3 does not answer: .*closed by peer") as raised:
            transport.receive(3, like=like)
        assert raised.value.rank == 3
        with pytest.raises(WorkerLostError, match="Rank 2 does not answer") as raised:
            transport.send(torch.ones(2), NO, 2, header=like is None)
        assert raised.value.rank == 2

    def test_other_errors_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr("torch.distributed.recv", fail)
        with pytest.raises(RuntimeError, match="out of memory") as raised:
            Transport(CPU).receive(3)
        assert not isinstance(raised.value, WorkerLostError)
