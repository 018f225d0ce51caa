"""Who a worker is: the Ed25519 key with which it signs, and the public key by which others know it.

A worker's name, address or rank is what it says of itself. Its key is the only thing that nobody else can use, so what counts
against a worker counts against its key.

Ed25519: RFC 8032. The package ``cryptography`` does the arithmetic; it is imported when the first key is made or used.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import secrets
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_sentinel.errors import ConfigurationError, MissingExtraError
from lightning_sentinel.trust.key_files import create_key_file, read_key_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["KEY_BYTES", "SIGNATURE_BYTES", "Identity", "PublicKey"]

KEY_BYTES = 32
SIGNATURE_BYTES = 64

_PREFIX = "ed25519:"


@dataclass(frozen=True, order=True)
class PublicKey:
    """The public half of a worker's key.

    Args:
        raw: its 32 bytes.

    Raises:
        ConfigurationError: if these are not 32 bytes.

    Example:
        >>> key = Identity.seeded(0, "worker 3").public
        >>> print(key)
        ed25519:eWlURICzpLby1xiUTqS3RcZObmzumalyeEbtnQWKKm4=
        >>> PublicKey.of(str(key)) == key
        True
    """

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_BYTES:
            raise ConfigurationError(
                f"A public key of {len(self.raw)} bytes: an Ed25519 key has {KEY_BYTES}. Pass Identity.public."
            )

    @classmethod
    def of(cls, text: str) -> PublicKey:
        """The key that a text names, in the form in which keys are printed.

        Raises:
            ConfigurationError: if the text names none.
        """
        key: PublicKey | None = None
        with contextlib.suppress(ValueError):
            key = cls(base64.b64decode(text.removeprefix(_PREFIX), validate=True))
        # Base64 has more than one text for some bytes, and a key must have one name.
        if key is None or str(key) != text:
            raise ConfigurationError(
                f"{text[:80]!r} is no public key. It reads {_PREFIX} and 44 characters of base64; print(Identity.kept(path).public)"
                " shows that of a file."
            )
        return key

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether this key signed the message; ``False`` for a signature that is none, whatever its bytes are.

        Raises:
            MissingExtraError: if the package ``cryptography`` is not installed.

        Example:
            >>> identity = Identity.draw()
            >>> signature = identity.sign(b"said")
            >>> identity.public.verifies(signature, b"said"), identity.public.verifies(signature, b"not said")
            (True, False)
        """
        _require_cryptography()
        from cryptography.exceptions import InvalidSignature

        try:
            _loaded(self.raw).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True

    def __str__(self) -> str:
        return _PREFIX + base64.b64encode(self.raw).decode()


class Identity:
    """A worker's private key, which never leaves the process: it cannot be pickled or printed.

    Args:
        private_key: 32 bytes, all of them secret.

    Raises:
        MissingExtraError: if the package ``cryptography`` is not installed.

    Example:
        >>> identity = Identity.seeded(0, "worker 3")
        >>> identity
        Identity(ed25519:eWlURICzpLby1xiUTqS3RcZObmzumalyeEbtnQWKKm4=)
        >>> len(identity.sign(b"said"))
        64
    """

    def __init__(self, private_key: bytes) -> None:
        _require_cryptography()
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._private: Ed25519PrivateKey = Ed25519PrivateKey.from_private_bytes(private_key)
        self.public = PublicKey(self._private.public_key().public_bytes_raw())

    @classmethod
    def draw(cls) -> Identity:
        """A new identity, from the operating system's randomness."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def seeded(cls, seed: int, name: str) -> Identity:
        """An identity for virtual meshes, so that a run can be repeated. Whoever knows the seed can sign in its name.

        Args:
            seed: of the run.
            name: of the worker.
        """
        return cls(hashlib.sha256(f"lightning-sentinel identity/{seed}/{name}".encode()).digest())

    @classmethod
    def kept(cls, path: str | Path) -> Identity:
        """The identity in a key file: PEM (PKCS 8), as ``openssl genpkey -algorithm ed25519`` writes it.

        If there is no file, a key is drawn and written, readable by its owner only. The file is there when it is whole; of several
        processes that make it at once all get the same key.

        Raises:
            ConfigurationError: if the file is no such key, can be read or written by others, or cannot be read or written at all.
            MissingExtraError: if the package ``cryptography`` is not installed.

        Example:
            >>> path = getfixture("tmp_path") / "worker.key"
            >>> Identity.kept(path).public == Identity.kept(path).public
            True
        """
        _require_cryptography()
        path = Path(path)
        try:
            if not path.exists():
                create_key_file(path, secrets.token_bytes(KEY_BYTES))
            return cls(read_key_file(path))
        except OSError as error:
            raise ConfigurationError(
                f"The key file {path} can be neither read nor made ({type(error).__name__}: {error.strerror}). Name a file in a"
                " folder that the user of this process owns, or leave identity out: then a key is drawn for the run."
            ) from error

    def sign(self, message: bytes) -> bytes:
        """The 64 bytes by which everybody can see that this identity said the message; the same for the same message."""
        return self._private.sign(message)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.public})"


def _require_cryptography() -> None:
    try:
        import cryptography.exceptions  # noqa: F401
    except ImportError:
        otherwise = ". Or sign nothing: SentinelStrategy(identity='unsigned')."
        raise MissingExtraError("cryptography", "trust", "Signing what workers say", otherwise) from None


@lru_cache(maxsize=4096)
def _loaded(raw: bytes) -> Ed25519PublicKey:
    """Each message has a signature and there are few keys, so that keys are read once."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return Ed25519PublicKey.from_public_bytes(raw)
