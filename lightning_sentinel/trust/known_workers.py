"""The list of known workers: a file of public keys, one a line, and nobody else is admitted to a run.

::

    # The machines of the first laboratory
    ed25519:eWlURICzpLby1xiUTqS3RcZObmzumalyeEbtnQWKKm4= alice, second rack
    ed25519:3cdmDKo4ta4TU+aP4yEM6A+T2QqcQ+VIAPYtzHcHjJ8= bob

What follows a key is a comment, as in SSH's ``authorized_keys``. A ban follows the key from run to run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.trust.identity import PublicKey

__all__ = ["read_known_workers", "require_distinct", "require_known"]

_LARGEST_FILE = 2**20


def read_known_workers(path: str | Path) -> dict[PublicKey, str]:
    """The keys on a list, with their comments, in the order of the file.

    Raises:
        ConfigurationError: if the file cannot be read or is larger than 1 MiB; if a line has no key, with its number; if a key is
            there twice, with the numbers of both lines; if there is no key at all.

    Example:
        >>> path = getfixture("tmp_path") / "known_workers"
        >>> _ = path.write_text("# two racks\\n\\ned25519:eWlURICzpLby1xiUTqS3RcZObmzumalyeEbtnQWKKm4= alice, second rack\\n")
        >>> list(read_known_workers(path).values())
        ['alice, second rack']
    """
    comments: dict[PublicKey, str] = {}
    lines: dict[PublicKey, int] = {}
    for number, line in enumerate(_lines(Path(path)), start=1):
        text, _, comment = line.strip().partition(" ")
        if not text or text.startswith("#"):
            continue
        try:
            key = PublicKey.of(text)
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}:{number}: {error} A line that is a comment begins with #.") from None
        if key in lines:
            raise ConfigurationError(
                f"{path}:{number}: the key {key} is on line {lines[key]} as well ({comments[key]!r} and {comment.strip()!r})."
                " Each worker has a key of its own: remove one of the two lines."
            )
        lines[key] = number
        comments[key] = comment.strip()
    if not comments:
        raise ConfigurationError(f"{path} has no key on it, and would admit no worker. Write one public key a line.")
    return comments


def require_known(keys: Sequence[PublicKey], known: Collection[PublicKey]) -> None:
    """Admit a run's workers only if all their keys are known.

    Args:
        keys: of the workers, by rank.
        known: keys that are admitted, from :func:`read_known_workers`.

    Raises:
        ConfigurationError: if a key is not known, with the ranks and their keys.

    Example:
        >>> from lightning_sentinel.trust.identity import Identity
        >>> alice, eve = (Identity.seeded(0, name).public for name in ("alice", "eve"))
        >>> require_known([alice, eve], {alice})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lightning_sentinel.errors.ConfigurationError: The key of rank 1 (ed25519:...) is not on the list of known workers. ...
    """
    strangers = [f"rank {rank} ({key})" for rank, key in enumerate(keys) if key not in known]
    if strangers:
        raise ConfigurationError(
            f"The key of {', '.join(strangers)} is not on the list of known workers. Add a line with the key to the file that"
            " known_workers names, on every machine, if its owner is known to you; or start without that machine."
        )


def require_distinct(keys: Sequence[PublicKey]) -> None:
    """Refuse workers that sign with the same key: what one of them says could be the other's word.

    Args:
        keys: of the workers, by rank.

    Raises:
        ConfigurationError: if two have the same, with their ranks.

    Example:
        >>> from lightning_sentinel.trust.identity import Identity
        >>> alice = Identity.seeded(0, "alice").public
        >>> require_distinct([alice, alice])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lightning_sentinel.errors.ConfigurationError: Ranks 0 and 1 have the same key, ed25519:...: a key file ...
    """
    ranks: dict[PublicKey, int] = {}
    for rank, key in enumerate(keys):
        first = ranks.setdefault(key, rank)
        if first != rank:
            raise ConfigurationError(
                f"Ranks {first} and {rank} have the same key, {key}: a key file that belongs to two workers. Give each worker a"
                " file of its own, with its rank in the path where machines share a file system."
            )


def _lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"The list of known workers {path} cannot be read ({type(error).__name__}: {error}). Name a text file with one public"
            " key a line, or leave known_workers out to admit any worker."
        ) from error
    if len(content) > _LARGEST_FILE:
        raise ConfigurationError(
            f"{path} is larger than {_LARGEST_FILE} bytes, which no list of known workers is. Name another file."
        )
    return text.splitlines()
