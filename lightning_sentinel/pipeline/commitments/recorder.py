"""Records what a worker sends and receives in a step: digests and signatures are made in a thread, beside the schedule."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.trust.credentials import Credentials
from lightning_sentinel.trust.digests import Digest
from lightning_sentinel.trust.parts import Received, encode_part
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import Moment, SignalId, SignalStatement

__all__ = ["Recorder"]


class Recorder:
    """Records a step's messages.

    The thread reads tensors while the schedule goes on, so a message that was sent or received must not be changed until the step
    ends. On a GPU the thread waits for the device, and the host does not.

    Args:
        worker: the worker of this process.
        credentials: with which it signs.
    """

    def __init__(self, worker: Worker, credentials: Credentials) -> None:
        self._worker = worker
        self._credentials = credentials
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commitments")
        self._sent: dict[SignalId, Future[Signed[SignalStatement]]] = {}
        self._received: dict[SignalId, Future[Received]] = {}
        self._plan: StepPlan | None = None

    def begin(self, plan: StepPlan) -> None:
        """Begin a step."""
        self._forget()
        self._plan = plan

    def sent(self, signal: SignalId, tensor: Tensor, tainted: Tensor | None = None) -> None:
        """Record a message that this worker sends.

        Args:
            signal: which one it is.
            tensor: that is sent.
            tainted: 0-dim bool; ``None`` for a note, which has no taint.
        """
        if self._plan is not None and self._plan.audited:
            moment = self._plan.moment(self._credentials.run)
            self._sent[signal] = self._thread.submit(self._signed, moment, signal, tensor.detach(), tainted)

    def received(self, signal: SignalId, tensor: Tensor, tainted: Tensor | None = None) -> None:
        """Record a message that this worker receives; arguments are those of :meth:`sent`."""
        if self._plan is not None and self._plan.audited:
            self._received[signal] = self._thread.submit(self._content, tensor.detach(), tainted)

    def finish(self, seal: Digest | None) -> bytes:
        """This worker's part of the step's commitments, of which :func:`encode_part` says what it is.

        Waits for the thread. Empty in a step that is not audited.

        Args:
            seal: of what the worker has drawn for the step.
        """
        plan = self._plan
        if plan is None or not plan.audited:
            return b""
        sent = {signal: future.result() for signal, future in self._sent.items()}
        received = {signal: future.result() for signal, future in self._received.items()}
        self._forget()
        return encode_part(sent, received, seal, self._worker, plan.wiring.lane(self._worker) or 0, plan.wiring.slots)

    def _forget(self) -> None:
        self._sent.clear()
        self._received.clear()

    def _signed(self, moment: Moment, signal: SignalId, tensor: Tensor, tainted: Tensor | None) -> Signed[SignalStatement]:
        content = self._content(tensor, tainted)
        return self._credentials.sign(SignalStatement(moment, self._worker, signal, *content))

    def _content(self, tensor: Tensor, tainted: Tensor | None) -> Received:
        return Received(tainted is not None and bool(tainted), self._credentials.digest(tensor))
