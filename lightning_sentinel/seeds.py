"""Seeds: derived from other seeds, or drawn in secret."""

from __future__ import annotations

import hashlib
import secrets

__all__ = ["derive_seed", "secret_seed"]


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits that is the same in every process for the same parts, unlike ``hash``."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def secret_seed() -> int:
    """A seed of 62 bits from the operating system, which no ``seed_everything`` makes public."""
    return secrets.randbits(62)
