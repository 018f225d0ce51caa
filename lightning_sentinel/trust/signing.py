"""Signed statements: who said it, and whether it is what should have been said here and now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Generic, NamedTuple, TypeVar

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.trust.encoding import decode, encode
from lightning_sentinel.trust.identity import SIGNATURE_BYTES, Identity, PublicKey
from lightning_sentinel.trust.statements import ContributionVote, Moment, RowStatement, SignalId, SignalStatement, VoteStatement

__all__ = ["Fault", "Signed", "check", "contradict", "fault", "sign"]

S = TypeVar("S", SignalStatement, RowStatement, VoteStatement, ContributionVote)

_WORDS = {
    "run": "is from another run: a replay",
    "step": "is of step {said}, not {due}: a replay, or out of its turn",
    "attempt": "is of attempt {said}, not {due}: a replay, or out of its turn",
    "kind": "is about a {said}, not a {due}",
    "boundary": "is about the boundary {said.name}, not {due.name}",
    "lane": "is of lane {said}, not {due}: a replay, or misplaced",
    "slot": "is of micro-batch {said}, not {due}: a replay, or misplaced",
    "sender": "is another worker's word: that of {said}, not of {due}",
    "digest": "is about other contents: {said} was signed, and what came is {due}",
    "row": "is about another row: {said} was signed, and what came is {due}",
}


class Fault(NamedTuple):
    """Why a signed statement does not count here.

    Args:
        field: what is wrong: ``signature``, or the innermost field that differs, such as ``run``, ``slot`` or ``digest``. Without a
            valid signature anybody can have said it; any other fault is the word of the sender, whoever brought it here.
        message: that in words, with both values.
    """

    field: str
    message: str


@dataclass(frozen=True)
class Signed(Generic[S]):
    """A statement with a signature, which may be anybody's until it is checked.

    Args:
        statement: what is said.
        signature: 64 bytes, over the statement's encoding.

    Raises:
        MalformedMessageError: if the signature is of another length.

    Example:
        >>> from lightning_sentinel.mesh import Worker
        >>> from lightning_sentinel.trust.digests import Algorithm, digest_of
        >>> digest = digest_of(b"a row", Algorithm.SHA256)
        >>> row = RowStatement(Moment(bytes(16), step=12, attempt=0), Worker(1, 0), digest, digest)
        >>> signed = sign(Identity.seeded(0, "worker"), row)
        >>> Signed.decode(signed.encode()) == signed
        True
    """

    statement: S
    signature: bytes

    def __post_init__(self) -> None:
        if len(self.signature) != SIGNATURE_BYTES:
            raise MalformedMessageError(f"A signature of {len(self.signature)} bytes came, and each has {SIGNATURE_BYTES}.")

    def encode(self) -> bytes:
        """The statement's encoding, and the signature after it."""
        return encode(self.statement) + self.signature

    @staticmethod
    def decode(
        encoded: bytes,
    ) -> Signed[SignalStatement] | Signed[RowStatement] | Signed[VoteStatement] | Signed[ContributionVote]:
        """The signed statement that these bytes are; its signature is not looked at.

        Args:
            encoded: any bytes at all.

        Raises:
            MalformedMessageError: if they are none; nothing else is ever raised.
        """
        statement = decode(encoded[:-SIGNATURE_BYTES])
        signature = encoded[-SIGNATURE_BYTES:]
        if isinstance(statement, SignalStatement):
            return Signed(statement, signature)
        if isinstance(statement, RowStatement):
            return Signed(statement, signature)
        if isinstance(statement, VoteStatement):
            return Signed(statement, signature)
        return Signed(statement, signature)

    def verifies(self, key: PublicKey) -> bool:
        """Whether the owner of the key signed it."""
        return key.verifies(self.signature, encode(self.statement))


def sign(identity: Identity, statement: S) -> Signed[S]:
    """Sign a statement.

    Raises:
        MalformedMessageError: if it cannot be encoded.
    """
    return Signed(statement, identity.sign(encode(statement)))


def fault(signed: Signed[S], key: PublicKey, **due: object) -> Fault | None:
    """What is wrong with a signed statement; ``None`` if nothing is.

    Args:
        signed: as it came.
        key: of the worker that is said to have signed it.
        due: what its fields have to be, as far as that is known here: of a signal all but ``tainted``, with the digest of the
            tensor that came; of a row the digest of what came; of a vote all but its outcome and its finding.

    Example:
        >>> from lightning_sentinel.mesh import Worker
        >>> from lightning_sentinel.trust.digests import Algorithm, digest_of
        >>> digest = digest_of(b"a row", Algorithm.SHA256)
        >>> identity = Identity.seeded(0, "worker")
        >>> signed = sign(identity, RowStatement(Moment(bytes(16), step=12, attempt=0), Worker(1, 0), digest, digest))
        >>> fault(signed, identity.public, moment=Moment(bytes(16), step=12, attempt=0), sender=Worker(1, 0))
        >>> fault(signed, identity.public, moment=Moment(bytes(16), step=13, attempt=0)).message
        'The row of step 12, attempt 0, by worker (stage 1, replica 0) is of step 12, not 13: a replay, or out of its turn.'
    """
    if not signed.verifies(key):
        return Fault("signature", f"The {signed.statement} bears no valid signature of {key}: it was changed, or is not its word.")
    for name, expected in due.items():
        for field, said, wanted in _differences(name, getattr(signed.statement, name), expected):
            words = _WORDS.get(field, f"says of its {field} {{said}}, not {{due}}")
            return Fault(field, f"The {signed.statement} {words.format(said=said, due=wanted)}.")
    return None


def check(signed: Signed[S], key: PublicKey, **due: object) -> None:
    """Let nothing pass but a statement that is signed, and is the one that is due.

    Args:
        signed: as it came.
        key: of the worker that is said to have signed it.
        due: as in :func:`fault`.

    Raises:
        MalformedMessageError: if anything is wrong, with what it is.
    """
    found = fault(signed, key, **due)
    if found is not None:
        raise MalformedMessageError(found.message)


def contradict(first: Signed[S], second: Signed[S], key: PublicKey) -> bool:
    """Whether the owner of a key has signed two different statements about one subject, which no honest worker does.

    Both together are proof of it for everybody.
    """
    differ = first.statement.subject == second.statement.subject and first.statement != second.statement
    return differ and first.verifies(key) and second.verifies(key)


def _differences(name: str, said: object, due: object) -> Iterator[tuple[str, object, object]]:
    if isinstance(due, (Moment, SignalId)) and type(said) is type(due):
        for field in fields(due):
            yield from _differences(field.name, getattr(said, field.name), getattr(due, field.name))
    elif said != due:
        yield name, said, due
