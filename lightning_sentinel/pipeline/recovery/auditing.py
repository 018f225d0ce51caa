"""Audits between processes: which workers hand evidence to an auditor, and how the auditor judges the signal from it.

Another worker of the stage recomputes the signal. The previous stage's worker hands it the activation that it sent, the next
stage's worker the gradient that it sent, the receiver the claimed signal, and a worker that loaded the samples hands those over.
All ranks go through the same list in the same order, so that no two ranks wait for each other.

Whoever hands over a signal has said what its digest is, in the collective of the step, before anybody knew what would be audited.
So the auditor knows whether it is given the signal that was sent. Which workers are asked, and whose vote counts, the jury decides
(:mod:`lightning_sentinel.verification.jury`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from enum import IntEnum
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.attacks import Adversary
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker
from lightning_sentinel.pipeline.commitments.step_commitments import StepCommitments
from lightning_sentinel.pipeline.commitments.transcript import Transcript
from lightning_sentinel.pipeline.data.sample_exchange import supplier, unpacked
from lightning_sentinel.pipeline.messages.tensor_trees import Packed, pack_all, receive_tree, send_packed
from lightning_sentinel.pipeline.processes.wire import world
from lightning_sentinel.pipeline.recovery.evidence import evidence_of_bans
from lightning_sentinel.pipeline.recovery.signal_cache import SignalCache
from lightning_sentinel.pipeline.recovery.votes import VOTE_BYTES, Vote, decode, encode, says, testimony
from lightning_sentinel.pipeline.step_plan import StepPlan
from lightning_sentinel.pipeline.waiting import on_host
from lightning_sentinel.trust.digests import Digest, digest_of
from lightning_sentinel.trust.evidence import Evidence, Recomputation, Testimony
from lightning_sentinel.trust.statements import Kind, SignalId
from lightning_sentinel.verification.audit import Outcome
from lightning_sentinel.verification.jury import Case
from lightning_sentinel.verification.tolerance import MEASURED, Tolerances, deviation
from lightning_sentinel.wiring import MicroBatchId

__all__ = ["Audits", "Inputs"]


class Inputs(NamedTuple):
    """What a stage computed a signal from, as handed to an auditor.

    Args:
        batch: the samples, at the ends of the pipeline.
        activation: the activation that the audited worker received; ``None`` at the first stage.
        gradient: if the signal is a gradient, the gradient that the audited worker received; ``None`` at the last stage.
    """

    batch: Any
    activation: Tensor | None
    gradient: Tensor | None


class _Item(IntEnum):
    BATCH = 0
    ACTIVATION = 1
    GRADIENT = 2
    CLAIMED = 3


_Need = tuple[_Item, Worker]
"""An item that an auditor needs, and the worker that hands it over."""


class _Answer(NamedTuple):
    """An auditor's answer to a case.

    Args:
        word: its vote, unless it has recomputed the signal.
        recomputed: the signal, on the device; ``None`` if it was not recomputed.
        measured: from :func:`deviation`, on the device; ``None`` if the recomputed signal has another shape.
        allowed: the error up to which the signal matches.
    """

    word: Outcome
    recomputed: Tensor | None = None
    measured: Tensor | None = None
    allowed: float = 0.0


def _warn_of(audited: Worker, what: str) -> None:
    warnings.warn(f"A signal of {audited} could not be audited with what others gave for it: {what}.", stacklevel=2)


class Audits:
    """The audits that this rank takes part in.

    Args:
        mesh: all workers.
        worker: the worker that this rank is.
        cache: the signals that this rank sent and received.
        samples: returns ``[batch, samples, weight]`` of one of this replica's micro-batches.
        recompute: returns the signal that an honest worker of this stage sends, from its direction, micro-batch and evidence.
        tolerances: the errors up to which signals match.
        transcript: with which this rank signs its votes, and binds itself to those that it heard.
        computed_in: returns the dtype in which this worker's device multiplies float32.
    """

    def __init__(
        self,
        mesh: Mesh,
        worker: Worker,
        cache: SignalCache,
        samples: Callable[[MicroBatchId], Any],
        recompute: Callable[[Direction, MicroBatchId, Inputs], Tensor],
        tolerances: Tolerances,
        transcript: Transcript,
        computed_in: Callable[[], torch.dtype],
    ) -> None:
        self._mesh = mesh
        self._worker = worker
        self._cache = cache
        self._samples = samples
        self.recompute = recompute
        self._tolerances = tolerances
        self._transcript = transcript
        self._computed_in = computed_in
        self._adversary: Adversary | None = None
        self.testimonies: dict[SignalId, list[Testimony]] = {}
        """The signed votes on the signals of the step under way."""

    def begin(self, adversary: Adversary | None = None) -> None:
        """Begin a step.

        Args:
            adversary: a simulated attacker, which may also lie in its votes.
        """
        self._adversary = adversary
        self.testimonies = {}

    def ask(self, asked: Sequence[tuple[Case, Worker]], plan: StepPlan, commitments: StepCommitments) -> list[Outcome]:
        """Have workers recompute signals; to be called by all ranks.

        The host waits for the device twice: for all items that this rank hands over, and for the errors of all signals that it
        recomputes.

        Args:
            asked: the signals, those of a boundary in succession, and the worker that recomputes each.
            plan: the step's plan.
            commitments: what workers said about the signals that they sent, before it was known which are audited.

        Returns:
            the vote of each of these workers.
        """
        # Nobody can judge a signal of which nobody knows what was sent: this run only reports, or the step would be done again.
        known = [one for one in asked if commitments.agrees(_signal_of(one[0]))]
        words = iter(self._ask(known, plan, commitments) if known else ())
        return [next(words) if commitments.agrees(_signal_of(case)) else Outcome.MATCHES for case, _ in asked]

    def _ask(self, asked: Sequence[tuple[Case, Worker]], plan: StepPlan, commitments: StepCommitments) -> list[Outcome]:
        needed = [self._needs(case, plan) for case, _ in asked]
        handed = self._handed(asked, needed)
        answers: list[_Answer | None] = []
        # One boundary at a time: no auditor holds more evidence than that of one boundary.
        for _, some in groupby(range(len(asked)), key=lambda number: asked[number][0].boundary):
            given = [(*asked[number], self._hand_over(*asked[number], needed[number], handed[number])) for number in some]
            answers += [
                self._judge(case, items, commitments) if auditor == self._worker else None for case, auditor, items in given
            ]
        mine = self._decided(answers, asked, plan.number)
        empty = encode(Vote(Outcome.MATCHES))
        said = b"".join(
            encode(self._signed(mine[number], *asked[number], plan, commitments)) if number in mine else empty
            for number in range(len(asked))
        )
        everyone = world().all_gather(torch.frombuffer(bytearray(said), dtype=torch.uint8))
        self._transcript.hear(everyone)
        return [self._heard(everyone, number, *asked[number], plan, commitments) for number in range(len(asked))]

    def evidence(self, banned: Collection[Worker], commitments: StepCommitments) -> dict[Worker, Evidence]:
        """What the votes of this step show against the workers that it bans; see :func:`evidence_of_bans`."""
        return evidence_of_bans(banned, self.testimonies, commitments, self._transcript.credentials)

    def _signed(self, vote: Vote, case: Case, auditor: Worker, plan: StepPlan, commitments: StepCommitments) -> Vote:
        credentials = self._transcript.credentials
        about = commitments.sent[_signal_of(case)].statement
        return replace(vote, signature=credentials.sign(says(vote, auditor, about, self._live(case, plan), credentials)).signature)

    def _heard(
        self, everyone: Tensor, number: int, case: Case, auditor: Worker, plan: StepPlan, commitments: StepCommitments
    ) -> Outcome:
        """The vote of an auditor, the same on all ranks. Only its own entry counts, and only if it is signed."""
        # Whatever other ranks put there.
        entry = everyone[self._mesh.rank(auditor), number * VOTE_BYTES : (number + 1) * VOTE_BYTES]
        vote = decode(entry.numpy().tobytes())
        credentials = self._transcript.credentials
        signal = _signal_of(case)
        if not credentials.hold(commitments.sent[signal]):
            # The sender has signed a row in which it does not sign its signal.
            return Outcome.LIED
        statement = says(vote, auditor, commitments.sent[signal].statement, self._live(case, plan), credentials)
        if credentials.keys:
            words = testimony(vote, statement, credentials)
            if words is None:
                return Outcome.MATCHES
            self.testimonies.setdefault(signal, []).append(words)
        if vote.word == Outcome.MATCHES:
            self._tolerances.heard(self._mesh.boundaries.index(case.boundary), case.audited, vote.measured)
        return vote.word

    def _live(self, case: Case, plan: StepPlan) -> int:
        """Workers of the audited stage that are not banned."""
        return sum(Worker(case.audited.stage, replica) not in plan.banned for replica in range(self._mesh.replicas))

    def _handed(self, asked: Sequence[tuple[Case, Worker]], needed: Sequence[Sequence[_Need]]) -> list[dict[_Item, Packed]]:
        """The items that this rank sends to the auditor of each case, packed for sending."""
        wanted = [
            (number, item, self._item(item, asked[number][0]))
            for number, needs in enumerate(needed)
            for item, giver in needs
            if giver == self._worker != asked[number][1]
        ]
        handed: list[dict[_Item, Packed]] = [{} for _ in asked]
        for (number, item, _), packed in zip(wanted, pack_all(held for *_, held in wanted)):
            handed[number][item] = packed
        return handed

    def _hand_over(self, case: Case, auditor: Worker, needs: Sequence[_Need], handed: dict[_Item, Packed]) -> dict[_Item, Any]:
        """Send or receive the items that an auditor needs. Returns them on the auditor's rank."""
        items: dict[_Item, Any] = {}
        for item, giver in needs:
            if item in handed:
                send_packed(handed[item], self._mesh.rank(auditor))
            elif giver == auditor == self._worker:
                items[item] = self._item(item, case)
            elif auditor == self._worker:
                items[item] = receive_tree(self._mesh.rank(giver), self._room)
        return items

    @property
    def _room(self) -> int:
        return 64 * max(self._cache.largest, 2**20)

    def _needs(self, case: Case, plan: StepPlan) -> list[_Need]:
        """The items that the auditor of a case needs, in the order in which they are sent."""
        boundary = case.boundary
        wiring = plan.wiring
        stage = boundary.sender
        last = self._mesh.stages - 1
        backward = boundary.direction is Direction.GRADIENT
        needs: list[_Need] = []
        if stage == 0 or (backward and stage == last):
            needs.append((_Item.BATCH, supplier(case.micro_batch_id, stage, self._mesh, plan.absent, case.audited)))
        if stage > 0:
            needs.append((_Item.ACTIVATION, wiring.worker(stage - 1, case.lane)))
        if backward and stage < last:
            needs.append((_Item.GRADIENT, wiring.worker(stage + 1, case.lane)))
        return [*needs, (_Item.CLAIMED, wiring.worker(boundary.receiver, case.lane))]

    def _item(self, item: _Item, case: Case) -> Any:
        cache = self._cache
        slot = case.slot
        if item is _Item.BATCH:
            return self._samples(case.micro_batch_id)
        if item is _Item.ACTIVATION:
            return cache.sent[Direction.ACTIVATION, slot]
        if item is _Item.GRADIENT:
            return cache.sent[Direction.GRADIENT, slot]
        return cache.received[case.boundary.direction, slot]

    def _judge(self, case: Case, items: dict[_Item, Any], commitments: StepCommitments) -> _Answer:
        """This rank's vote on a signal, or the signal's error against the recomputed one.

        Where samples from another worker are unusable the rank warns, and the signal counts as matching: no digest vouches for
        samples, so no worker is blamed for them.
        """
        if _Item.BATCH in items and not isinstance(items[_Item.BATCH], list):
            _warn_of(case.audited, f"the batch is {type(items[_Item.BATCH]).__name__}")
            return _Answer(Outcome.MATCHES)
        stage = case.boundary.sender
        given = (
            (_Item.CLAIMED, case.boundary, Outcome.SIGNAL_WITHHELD),
            (_Item.ACTIVATION, Boundary(stage - 1, Direction.ACTIVATION), Outcome.ACTIVATION_WITHHELD),
            (_Item.GRADIENT, Boundary(stage, Direction.GRADIENT), Outcome.GRADIENT_WITHHELD),
        )
        for item, boundary, outcome in given:
            sent = commitments.sent_digest(SignalId(Kind.SIGNAL, boundary, case.lane, case.slot))
            if item in items and not (isinstance(items[item], Tensor) and sent is not None and sent.names(items[item])):
                return _Answer(outcome)
        try:
            batch = unpacked(items[_Item.BATCH], self._mesh.rank(case.audited)) if _Item.BATCH in items else None
            honest = self.recompute(
                case.boundary.direction, case.micro_batch_id, Inputs(batch, items.get(_Item.ACTIVATION), items.get(_Item.GRADIENT))
            )
        except Exception as error:
            if _Item.BATCH not in items:
                raise
            # The samples come from another worker, and may be such that no step can work on them.
            _warn_of(case.audited, f"no step can work on the samples ({type(error).__name__}: {error})")
            return _Answer(Outcome.MATCHES)
        claimed = items[_Item.CLAIMED].to(honest.device)
        if claimed.shape != honest.shape:
            return _Answer(Outcome.LIED, honest)
        index = self._mesh.boundaries.index(case.boundary)
        backward = case.boundary.direction is Direction.GRADIENT
        activation = items[_Item.ACTIVATION].to(honest.device) if backward else None
        measured = deviation(claimed, honest, self._tolerances.seed_of(index), activation)
        allowed = self._tolerances.allowed(index, case.audited, honest.dtype, self._computed_in())
        return _Answer(Outcome.MATCHES, honest, measured, allowed)

    def _decided(self, answers: Sequence[_Answer | None], asked: Sequence[tuple[Case, Worker]], step: int) -> dict[int, Vote]:
        """Maps the number of each case that this rank audits to its vote, not signed yet."""
        mine = {number: answer for number, answer in enumerate(answers) if answer is not None}
        recomputed = {number: answer.recomputed for number, answer in mine.items() if answer.recomputed is not None}
        measured = {number: answer.measured for number, answer in mine.items() if answer.measured is not None}
        errors, *signals = on_host([torch.stack(list(measured.values())) if measured else torch.empty(0), *recomputed.values()])
        found = dict(zip(measured, errors.tolist()))
        digests = {number: self._transcript.credentials.digest(signal) for number, signal in zip(recomputed, signals)}
        return {
            number: self._vote(answer, digests.get(number), found.get(number), *asked[number], step)
            for number, answer in mine.items()
        }

    def _vote(
        self, answer: _Answer, recomputed: Digest | None, measured: list[float] | None, case: Case, auditor: Worker, step: int
    ) -> Vote:
        word = answer.word
        error = math.inf if measured is None else measured[0]
        if measured is not None:
            word = Outcome.LIED if error > answer.allowed else Outcome.MATCHES
        said = word
        if self._adversary is not None:
            said = Outcome(self._adversary.vote(word, auditor, case.audited, case.boundary.direction, step))
        if said != word:
            # Whoever lies says what its lie would follow from.
            error = 0.0 if said == Outcome.MATCHES else math.inf
            recomputed = recomputed or digest_of(b"", self._transcript.credentials.algorithm)
        numbers = [math.nan] * MEASURED if measured is None else measured
        return Vote(said, numbers, None if recomputed is None else Recomputation(recomputed, error, answer.allowed))


def _signal_of(case: Case) -> SignalId:
    return SignalId(Kind.SIGNAL, case.boundary, case.lane, case.slot)
