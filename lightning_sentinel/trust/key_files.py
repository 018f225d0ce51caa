"""Key files: a worker's private key, kept from run to run where nobody but its owner can read it.

The format is PEM (PKCS 8), which other programs write and read as well.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from lightning_sentinel.errors import ConfigurationError

__all__ = ["create_key_file", "read_key_file"]

# A key file has about 120 bytes; what is larger by far is another file.
_LARGEST_FILE = 4096
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def read_key_file(path: Path) -> bytes:
    """The 32 bytes of the private key in a file.

    Raises:
        ConfigurationError: if it has none, or may be read or written by others.
        OSError: if it cannot be read.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _content(path)
    cause = f"it is larger than {_LARGEST_FILE} bytes"
    if len(content) <= _LARGEST_FILE:
        try:
            key = load_pem_private_key(content, password=None)
            if isinstance(key, Ed25519PrivateKey):
                return key.private_bytes_raw()
            cause = "it holds a key of another kind"
        except TypeError:
            cause = "it is encrypted"
        except (ValueError, UnsupportedAlgorithm):
            cause = "it has no private key in PEM format" if content else "it is empty"
    raise ConfigurationError(
        f"{path} is no key file: {cause}. Name a file that is not there yet, and a key is made; or make one with: openssl genpkey"
        " -algorithm ed25519."
    )


def create_key_file(path: Path, private_key: bytes) -> None:
    """Write a key file, unless another process has by then.

    Args:
        path: of the file; its folder is made.
        private_key: 32 bytes.

    Raises:
        OSError: if it cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.from_private_bytes(private_key)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IRUSR | stat.S_IWUSR)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            file.flush()
            os.fsync(file.fileno())
        # Unlike a renamed file, a link does not replace the key that another process wrote meanwhile, and already uses.
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
    finally:
        part.unlink()


def _content(path: Path) -> bytes:
    # Opened before it is looked at, so that what is looked at is what is read; not blocking, because it may be a pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
            raise ConfigurationError(
                f"{path} is {kind}, and a key is kept in a file. Name one in it, such as {path / 'worker.key'}."
            )
        if mode & _OTHERS:
            raise ConfigurationError(
                f"Others than its owner may use the key file {path}: its mode is {stat.S_IMODE(mode):o}. Whoever can read it can"
                f" sign in this worker's name. If nobody has, run: chmod 600 {path}; or else remove it, and a new key is made."
            )
        return os.read(descriptor, _LARGEST_FILE + 1)
    finally:
        os.close(descriptor)
