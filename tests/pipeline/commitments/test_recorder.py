from __future__ import annotations

import torch

from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline.commitments.recorder import Recorder
from lightning_sentinel.pipeline.commitments.step_commitments import Received, decode
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.step_plan import plan_step
from lightning_sentinel.trust.credentials import Credentials
from lightning_sentinel.trust.digests import Algorithm, digest_of_tensor
from lightning_sentinel.trust.identity import Identity
from lightning_sentinel.trust.parts import part_length
from lightning_sentinel.trust.statements import Kind, Moment, SignalId

A = Direction.ACTIVATION
MESH, WORKER = Mesh(3, 1), Worker(1, 0)
RECEIVED, SENT = (SignalId(Kind.SIGNAL, Boundary(index, A), 0, 1) for index in range(2))


def test_what_was_sent_and_received_is_said_and_signed_once_the_step_is_over() -> None:
    identity = Identity.seeded(0, "worker")
    recorder = Recorder(WORKER, Credentials(bytes(16), Algorithm.SHA256, identity))
    plan = plan_step("training_step", MESH, BatchSizes(2, (4,)), number=3, run=5, audited=True)
    for repeat in range(2):
        recorder.begin(plan)
        recorder.received(RECEIVED, torch.ones(2, 3), torch.tensor(True))
        if repeat:
            recorder.sent(SENT, torch.full((2, 3), 2.0), torch.tensor(True))
            said = recorder.finish(None)
    nobody = bytes(part_length(plan.wiring.slots))
    found = decode([nobody, said, nobody], MESH, plan.wiring, Moment(bytes(16), 3, 5))
    assert found.received == {RECEIVED: Received(True, digest_of_tensor(torch.ones(2, 3), Algorithm.SHA256))}
    assert list(found.sent) == [SENT]
    signed = found.sent[SENT]
    assert signed.verifies(identity.public) and signed.statement.tainted
    assert signed.statement.digest.names(torch.full((2, 3), 2.0))


def test_nothing_is_said_of_a_step_that_is_not_audited() -> None:
    recorder = Recorder(WORKER, Credentials(bytes(16)))
    recorder.begin(plan_step("training_step", MESH, BatchSizes(2, (4,))))
    recorder.sent(SENT, torch.ones(1))
    recorder.received(RECEIVED, torch.ones(1))
    assert recorder.finish(None) == b""
