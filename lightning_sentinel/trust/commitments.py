"""Commitments: a worker's row of a step's collective binds what it sent and received, and which table it saw in the step before.

Two ranks that saw different tables know it one step later. Then they show the signed rows that they hold, and these say why: a
worker has signed two rows, or a row was changed on its way. In the same manner two workers that say different things about one
message show the signed statement for it, and whoever has none has lied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.digests import Algorithm, Digest, digest_of
from lightning_sentinel.trust.identity import PublicKey
from lightning_sentinel.trust.signing import Signed, fault
from lightning_sentinel.trust.statements import Moment, RowStatement, SignalStatement, Transfer

__all__ = ["Causes", "Claim", "Copy", "causes_of_difference", "mismatches", "settle_by_showing", "table_digest"]

Content = TypeVar("Content")
"""What a message holds: its digest, alone or with more."""


@dataclass(frozen=True)
class Copy:
    """A step's table as one worker holds it.

    Args:
        holder: whose copy it is.
        said: the digest of the table that the holder put into its next row.
        rows: the signed rows that it shows, by worker.
    """

    holder: Worker
    said: Digest
    rows: Mapping[Worker, Signed[RowStatement]]


@dataclass(frozen=True)
class Causes:
    """Why two copies of a table differ.

    Args:
        equivocated: workers that signed two different rows; both rows prove it.
        altered: by holder, the workers whose rows in its copy are missing or bear no valid signature. The holder, or a worker that
            relayed the row to it, has altered it; it was not the worker whose row it is.
        misreported: holders that show another table than the one whose digest they signed.

    Example:
        >>> Causes(frozenset(), {}, frozenset()).liars
        frozenset()
    """

    equivocated: frozenset[Worker]
    altered: Mapping[Worker, frozenset[Worker]]
    misreported: frozenset[Worker]

    @property
    def liars(self) -> frozenset[Worker]:
        """Workers that have lied without a doubt."""
        return self.equivocated | self.misreported


def table_digest(rows: Iterable[Signed[RowStatement]], algorithm: Algorithm) -> Digest:
    """The digest of a step's table: of what each worker signed about its row, in the order of the workers.

    Signed statements, not only the rows' digests: what a worker said about the table before is part of the table, and so is a
    signature, whose validity has consequences.

    Args:
        rows: one of each worker that takes part, in any order; none for the table before the first step.
        algorithm: how to make the digest.

    Example:
        >>> from lightning_sentinel.trust.statements import Moment
        >>> moment, nothing = Moment(bytes(16), 0, 0), table_digest([], Algorithm.SHA256)
        >>> row = digest_of(b"row", Algorithm.SHA256)
        >>> rows = [Signed(RowStatement(moment, Worker(0, r), row, nothing), bytes(64)) for r in (0, 1)]
        >>> table_digest(rows, Algorithm.SHA256) == table_digest(rows[::-1], Algorithm.SHA256)
        True
        >>> table_digest(rows, Algorithm.SHA256) == table_digest(rows[:1], Algorithm.SHA256)
        False
    """
    # Encodings of rows are of one length, so that their sequence can be read in one way only.
    encoded = [row.encode() for row in sorted(rows, key=lambda row: row.statement.sender)]
    return digest_of(b"".join(encoded), algorithm)


def causes_of_difference(first: Copy, second: Copy, keys: Mapping[Worker, PublicKey], moment: Moment) -> Causes:
    """Why two workers saw different tables in a step.

    Args:
        first: as one of them holds it.
        second: as the other does.
        keys: of all workers that take part in the step.
        moment: of the step whose table it is, as both know it.

    Returns:
        the causes; none, if the copies are of the same signed rows and have the digests that were said.

    Example:
        >>> from lightning_sentinel.trust.identity import Identity
        >>> from lightning_sentinel.trust.signing import sign
        >>> eve, now, nothing = Worker(0, 2), Moment(bytes(16), 0, 0), table_digest([], Algorithm.SHA256)
        >>> identity = Identity.seeded(0, "eve")
        >>> copies = []
        >>> for replica, contents in enumerate((b"a row", b"another row")):
        ...     row = sign(identity, RowStatement(now, eve, digest_of(contents, Algorithm.SHA256), nothing))
        ...     copies.append(Copy(Worker(0, replica), table_digest([row], Algorithm.SHA256), {eve: row}))
        >>> causes_of_difference(*copies, {eve: identity.public}, now).liars
        frozenset({Worker(stage=0, replica=2)})
    """
    genuine = {copy.holder: _genuine(copy, keys, moment) for copy in (first, second)}
    ours, theirs = genuine[first.holder], genuine[second.holder]
    equivocated = {worker for worker in ours.keys() & theirs.keys() if ours[worker] != theirs[worker]}
    altered = {holder: frozenset(keys.keys() - rows.keys()) for holder, rows in genuine.items()}
    shown = {copy.holder: table_digest(copy.rows.values(), copy.said.algorithm) for copy in (first, second)}
    misreported = {copy.holder for copy in (first, second) if shown[copy.holder] != copy.said}
    return Causes(frozenset(equivocated), {holder: rows for holder, rows in altered.items() if rows}, frozenset(misreported))


def mismatches(sent: Mapping[Transfer, Content], received: Mapping[Transfer, Content]) -> list[Transfer]:
    """The messages about which sender and receiver disagree, in order.

    Args:
        sent: what senders say that they sent, such as digests.
        received: what receivers say that they received.

    Example:
        >>> from lightning_sentinel.mesh import Boundary, Direction
        >>> from lightning_sentinel.trust.statements import Kind, SignalId
        >>> signal = SignalId(Kind.SIGNAL, Boundary(0, Direction.ACTIVATION), lane=0, slot=3)
        >>> transfer = Transfer(Worker(0, 0), Worker(1, 0), signal)
        >>> digest = digest_of(b"a signal", Algorithm.SHA256)
        >>> mismatches({transfer: digest}, {transfer: digest})
        []
        >>> [str(one.receiver) for one in mismatches({transfer: digest}, {})]
        ['worker (stage 1, replica 0)']
    """
    return sorted(one for one in sent.keys() | received.keys() if sent.get(one) != received.get(one))


@dataclass(frozen=True)
class Claim:
    """What one of two workers says about a message, and what it shows for it.

    Args:
        digest: of what it says that it sent, or received; ``None`` if it says that there was nothing.
        shown: the statement, signed by the sender, that it shows; ``None`` if it shows none.
    """

    digest: Digest | None
    shown: Signed[SignalStatement] | None


def settle_by_showing(transfer: Transfer, sent: Claim, received: Claim, sender_key: PublicKey, moment: Moment) -> frozenset[Worker]:
    """Who lies, where sender and receiver disagree about a message: whoever cannot show a signed statement for its digest.

    If both can, the sender has signed two messages. If the receiver says that nothing came, and the sender shows what it signed,
    nobody can tell whether it sent it: then the signal is to be sent again where others see it.

    Args:
        transfer: which message.
        sent: what the sender says and shows.
        received: what the receiver says and shows.
        sender_key: the public key of the sender.
        moment: of the step, as all know it.

    Returns:
        the liars: the sender, the receiver, both or none.
    """
    claims = {transfer.sender: sent, transfer.receiver: received}
    liars = {
        worker for worker, claim in claims.items() if claim.digest is not None and not _shows(claim, transfer, sender_key, moment)
    }
    differ = received.digest is not None and received.digest != sent.digest
    if differ and transfer.receiver not in liars:
        liars.add(transfer.sender)
    return frozenset(liars)


def _genuine(copy: Copy, keys: Mapping[Worker, PublicKey], moment: Moment) -> dict[Worker, RowStatement]:
    """The rows of a copy that were signed by those whose rows they are."""
    return {
        worker: signed.statement
        for worker, signed in copy.rows.items()
        if worker in keys and fault(signed, keys[worker], moment=moment, sender=worker) is None
    }


def _shows(claim: Claim, transfer: Transfer, sender_key: PublicKey, moment: Moment) -> bool:
    if claim.shown is None:
        return False
    due = {"moment": moment, "sender": transfer.sender, "signal": transfer.signal, "digest": claim.digest}
    return fault(claim.shown, sender_key, **due) is None
