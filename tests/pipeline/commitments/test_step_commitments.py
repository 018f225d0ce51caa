from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline.commitments.step_commitments import Received, StepCommitments, decode
from lightning_sentinel.trust.credentials import Credentials
from lightning_sentinel.trust.digests import Algorithm, Digest, digest_of
from lightning_sentinel.trust.identity import Identity
from lightning_sentinel.trust.parts import encode_part, part_length
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import Kind, Moment, SignalId, SignalStatement
from lightning_sentinel.wiring import Wiring

A, G = Direction
RUN = bytes(range(16))
NOW = Moment(RUN, 7, 9)


def signals(mesh: Mesh, wiring: Wiring) -> list[SignalId]:
    """All signals and notes of a step, written out by hand."""
    last = mesh.stages - 1
    return [
        SignalId(kind, Boundary(index, direction), lane, slot)
        for kind in Kind
        for index in range(last)
        for direction in Direction
        # The note on a signal goes past its receiver, so the receiver is not the end of the pipeline.
        if kind is Kind.SIGNAL or (index < last - 1 if direction is A else index > 0)
        for lane in wiring.lanes
        for slot in range(len(wiring.work[lane]))
    ]


def sender(signal: SignalId, wiring: Wiring) -> Worker:
    return wiring.worker(signal.boundary.sender, signal.lane)


def receiver(signal: SignalId, wiring: Wiring) -> Worker:
    way = 1 if signal.boundary.direction is A else -1
    return wiring.worker(signal.boundary.sender + way * signal.kind, signal.lane)


def digest(signal: SignalId) -> Digest:
    return digest_of(str(signal).encode(), Algorithm.SHA256)


def got(signal: SignalId) -> Received:
    return Received(signal.slot == 1, digest(signal))


def sealed_by(worker: Worker) -> Digest:
    return digest_of(str(worker).encode(), Algorithm.SHA256)


def signed(signal: SignalId, wiring: Wiring) -> Signed[SignalStatement]:
    worker = sender(signal, wiring)
    own = Credentials(RUN, identity=Identity.seeded(0, str(worker)))
    return own.sign(SignalStatement(NOW, worker, signal, signal.slot == 1, digest(signal)))


def parts(mesh: Mesh, wiring: Wiring) -> list[bytes]:
    everything = signals(mesh, wiring)
    return [
        encode_part(
            {signal: signed(signal, wiring) for signal in everything if sender(signal, wiring) == worker},
            {signal: got(signal) for signal in everything if receiver(signal, wiring) == worker},
            sealed_by(worker),
            worker,
            wiring.lane(worker) or 0,
            wiring.slots,
        )
        for worker in mesh.workers
    ]


@settings(derandomize=True, deadline=None, max_examples=25)
@given(stages=st.integers(1, 4), replicas=st.integers(1, 3), micro_batches=st.integers(1, 3), data=st.data())
def test_what_each_says_of_what_it_sent_and_received_is_known_to_all(
    stages: int, replicas: int, micro_batches: int, data: st.DataObject
) -> None:
    mesh = Mesh(stages, replicas)
    banned = data.draw(st.sets(st.sampled_from(mesh.workers), max_size=replicas - 1))
    wiring = Wiring.of(mesh, banned, micro_batches, turn=data.draw(st.integers(0, 3)))
    said = parts(mesh, wiring)
    assert {len(part) for part in said} == {part_length(wiring.slots)}
    found = decode(said, mesh, wiring, NOW)
    everything = signals(mesh, wiring)
    assert found.sent == {signal: signed(signal, wiring) for signal in everything}
    assert found.received == {signal: got(signal) for signal in everything}
    assert found.sealed == {worker: sealed_by(worker) for worker in mesh.workers}
    assert found.contradictions(mesh, wiring) == []


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_say_something_or_nothing(seed: int) -> None:
    mesh = Mesh(3, 2)
    wiring = Wiring.of(mesh, micro_batches=2)
    # Small bytes, among which are the numbers of algorithms.
    drawn = random.Random(seed)
    said = [bytes(drawn.choices(range(1 + 2 * seed), k=part_length(2))) for _ in mesh.workers]
    found = decode(said, mesh, wiring, NOW)
    assert set(found.sent) <= set(signals(mesh, wiring)) and set(found.received) <= set(signals(mesh, wiring))
    found.contradictions(mesh, wiring)


class TestContradictions:
    MESH = Mesh(3, 2)
    WIRING = Wiring.of(MESH, micro_batches=2)
    SIGNAL = SignalId(Kind.SIGNAL, Boundary(0, A), 1, 0)
    NOTE = SignalId(Kind.NOTE, Boundary(0, A), 1, 0)

    def found(self) -> StepCommitments:
        return decode(parts(self.MESH, self.WIRING), self.MESH, self.WIRING, NOW)

    def test_of_a_signal_are_between_its_sender_and_its_receiver(self) -> None:
        found = self.found()
        found.received[self.SIGNAL] = Received(False, digest(self.NOTE))
        (one,) = found.contradictions(self.MESH, self.WIRING)
        assert one == (Worker(0, 1), Worker(1, 1), self.SIGNAL)

    def test_the_taint_of_a_signal_is_part_of_what_it_says(self) -> None:
        found = self.found()
        found.received[self.SIGNAL] = found.received[self.SIGNAL]._replace(tainted=True)
        (one,) = found.contradictions(self.MESH, self.WIRING)
        assert one.signal == self.SIGNAL and not found.agrees(self.SIGNAL)

    def test_of_a_note_are_between_its_maker_and_the_worker_behind_its_neighbour(self) -> None:
        found = self.found()
        del found.received[self.NOTE]
        (one,) = found.contradictions(self.MESH, self.WIRING)
        assert one == (Worker(0, 1), Worker(2, 1), self.NOTE)

    def test_two_that_are_silent_about_a_signal_contradict_the_plan(self) -> None:
        found = self.found()
        del found.sent[self.SIGNAL], found.received[self.SIGNAL]
        assert [one.signal for one in found.contradictions(self.MESH, self.WIRING)] == [self.SIGNAL]
