"""Sealed draws: a worker says what it has drawn for a step only when all have said what they sent; until then it shows a seal.

The seal is a digest of the number, so a worker cannot draw again once it has seen those of others, and nobody learns the number
from it. It names the moment and the worker: who copies the seal of another one cannot open it.
"""

from __future__ import annotations

from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.digests import Algorithm, Digest, digest_of
from lightning_sentinel.trust.statements import Moment

__all__ = ["seal"]


def seal(number: bytes, moment: Moment, worker: Worker, algorithm: Algorithm) -> Digest:
    """The seal of what a worker has drawn.

    Args:
        number: that it has drawn.
        moment: of the step that it is for.
        worker: who has drawn it.
        algorithm: of the run.

    Example:
        >>> now = Moment(bytes(16), step=7, attempt=1)
        >>> shown = seal(b"16 random bytes.", now, Worker(1, 0), Algorithm.SHA256)
        >>> shown == seal(b"16 random bytes.", now, Worker(1, 0), Algorithm.SHA256)
        True
        >>> shown == seal(b"16 random bytes.", now, Worker(1, 1), Algorithm.SHA256)
        False
    """
    place = f"draw/{moment.step}/{moment.attempt}/{worker.stage}/{worker.replica}/".encode()
    return digest_of(place + moment.run + number, algorithm)
