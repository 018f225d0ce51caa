"""What a worker signs with in a run, and the keys by which it knows the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.digests import Algorithm, Digest, digest_of_tensor
from lightning_sentinel.trust.identity import SIGNATURE_BYTES, Identity, PublicKey
from lightning_sentinel.trust.signing import S, Signed, sign

__all__ = ["Credentials"]

_NO_SIGNATURE = bytes(SIGNATURE_BYTES)


@dataclass(frozen=True)
class Credentials:
    """The keys of a run, and the digests that all of its workers make.

    Args:
        run: 16 bytes that no other run has; see :class:`~lightning_sentinel.trust.statements.Moment`.
        algorithm: of digests, which all workers have.
        identity: of this worker; ``None`` if nothing is signed.
        keys: the public key of each worker; empty if nothing is signed.

    Example:
        >>> from lightning_sentinel.trust.digests import digest_of
        >>> from lightning_sentinel.trust.statements import Moment, RowStatement
        >>> identity = Identity.seeded(0, "worker")
        >>> worker = Worker(1, 0)
        >>> credentials = Credentials(bytes(16), Algorithm.SHA256, identity, {worker: identity.public})
        >>> digest = digest_of(b"a row", Algorithm.SHA256)
        >>> signed = credentials.sign(RowStatement(Moment(bytes(16), 12, 0), worker, digest, digest))
        >>> credentials.hold(signed), credentials.hold(Signed(signed.statement, bytes(64)))
        (True, False)
    """

    run: bytes
    algorithm: Algorithm = Algorithm.SHA256
    identity: Identity | None = None
    keys: Mapping[Worker, PublicKey] = field(default_factory=dict)

    def sign(self, statement: S) -> Signed[S]:
        """The statement with this worker's signature; with an empty one if nothing is signed."""
        return Signed(statement, _NO_SIGNATURE) if self.identity is None else sign(self.identity, statement)

    def digest(self, tensor: Tensor) -> Digest:
        """The digest of a tensor, as all workers of the run make it."""
        return digest_of_tensor(tensor, self.algorithm)

    def hold(self, signed: Signed[S]) -> bool:
        """Whether a statement is the word of its sender, as far as anything is signed."""
        if not self.keys:
            return True
        key = self.keys.get(signed.statement.sender)
        return key is not None and signed.verifies(key)
