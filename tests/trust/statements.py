"""Statements for tests, and strategies that draw them."""

from __future__ import annotations

from hypothesis import strategies as st

from lightning_sentinel.mesh import Boundary, Direction, Worker
from lightning_sentinel.trust.digests import Algorithm, Digest, digest_of
from lightning_sentinel.trust.identity import Identity
from lightning_sentinel.trust.statements import (
    ContributionVote,
    Kind,
    Moment,
    RowStatement,
    SignalId,
    SignalStatement,
    VoteStatement,
)

RUN = bytes(range(16))
NOW = Moment(RUN, step=12, attempt=0)
PLACE = SignalId(Kind.SIGNAL, Boundary(1, Direction.ACTIVATION), lane=0, slot=3)
SENDER = Worker(1, 0)


def digest(contents: str) -> Digest:
    return digest_of(contents.encode(), Algorithm.SHA256)


def identity(worker: Worker) -> Identity:
    return Identity.seeded(0, str(worker))


SIGNAL = SignalStatement(NOW, SENDER, PLACE, False, digest("a signal"))
ROW = RowStatement(NOW, SENDER, digest("a row"), digest("a table"))
VOTE = VoteStatement(NOW, Worker(1, 2), PLACE, digest("what was signed"), 1, 5, digest("what was found"))
OF_WEIGHTS = ContributionVote(NOW, Worker(1, 2), SENDER, digest("a sketch"), 1, 5, digest("what was found"))

UINT32 = st.integers(0, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)
MOMENTS = st.builds(Moment, st.binary(min_size=16, max_size=16), UINT64, UINT32)
WORKERS = st.builds(Worker, UINT32, UINT32)
PLACES = st.builds(SignalId, st.sampled_from(Kind), st.builds(Boundary, UINT32, st.sampled_from(Direction)), UINT32, UINT32)
DIGESTS = st.builds(Digest, st.sampled_from(Algorithm), st.binary(min_size=32, max_size=32))
SIGNALS = st.builds(SignalStatement, MOMENTS, WORKERS, PLACES, st.booleans(), DIGESTS)
ROWS = st.builds(RowStatement, MOMENTS, WORKERS, DIGESTS, DIGESTS)
VOTES = st.builds(VoteStatement, MOMENTS, WORKERS, PLACES, DIGESTS, st.integers(0, 255), UINT32, DIGESTS)
VOTES_ON_WEIGHTS = st.builds(ContributionVote, MOMENTS, WORKERS, WORKERS, DIGESTS, st.integers(0, 255), UINT32, DIGESTS)
STATEMENTS = SIGNALS | ROWS | VOTES | VOTES_ON_WEIGHTS
