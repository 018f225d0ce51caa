"""The errors that users may see. Every message names the value, the cause and the remedy."""

from __future__ import annotations

__all__ = [
    "ConfigurationError",
    "MalformedMessageError",
    "MeshExhaustedError",
    "MissingExtraError",
    "PipelineModelError",
    "PlanMismatchError",
    "SentinelError",
    "UnsupportedVersionError",
    "WorkerLostError",
    "add_place",
    "places",
]


class SentinelError(Exception):
    """Base of every error that lightning-sentinel raises on purpose."""


class ConfigurationError(SentinelError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class PipelineModelError(SentinelError, TypeError):
    """The LightningModule cannot be run as a pipeline the way it is written."""


class MissingExtraError(SentinelError, ImportError):
    """An optional dependency is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str, otherwise: str = "") -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed."
            f" Install it with: pip install 'lightning-sentinel[{extra}]'{otherwise}"
        )


class UnsupportedVersionError(SentinelError, RuntimeError):
    """A library that the plugin builds on no longer has a name that it relies on."""


class WorkerLostError(SentinelError, RuntimeError):
    """A worker stopped answering: its process died, hangs, or is slower than the timeout.

    Args:
        message: what happened, and what to do.
        rank: the rank that was lost, if it is known.
        told: whether that rank reported its error, with which the message then ends.
    """

    def __init__(self, message: str, rank: int | None = None, told: bool = False) -> None:
        super().__init__(message)
        self.rank = rank
        self.told = told


class MalformedMessageError(SentinelError, ValueError):
    """A worker sent a message other than the expected one; no part of it was used.

    Args:
        message: the expected and the received message.
        rank: the rank that sent it, if it is known.
        taken: whether all of the message was read, so that the sender's next one can be received.

    Example:
        >>> MalformedMessageError("Expected 4 axes; what came announces 9.", rank=3).rank
        3
    """

    def __init__(self, message: str, rank: int | None = None, taken: bool = False) -> None:
        super().__init__(message)
        self.rank = rank
        self.taken = taken


class MeshExhaustedError(SentinelError, RuntimeError):
    """So many workers are banned that no complete pipeline is left."""


class TableMismatchError(SentinelError, RuntimeError):
    """Ranks have seen different rows, or different votes, in the exchange of a step."""


class PlanMismatchError(SentinelError, RuntimeError):
    """Ranks have made different plans for a step."""


def add_place(error: BaseException, place: str) -> None:
    """Note where an error in the user's code happened; Python 3.11 and later show it below the message.

    Example:
        >>> error = ValueError("shapes differ")
        >>> add_place(error, "in layer net.2 (Linear) of stage 1")
        >>> places(error)
        ['in layer net.2 (Linear) of stage 1']
    """
    # What add_note of Python 3.11 does, which 3.10 has not.
    error.__notes__ = [*places(error), place]  # type: ignore[attr-defined]


def places(error: BaseException) -> list[str]:
    """The places that :func:`add_place` has noted."""
    return list(getattr(error, "__notes__", []))
