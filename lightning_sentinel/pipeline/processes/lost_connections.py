"""Tells the error of a lost connection from every other ``RuntimeError``."""

from __future__ import annotations

import re

__all__ = ["is_lost_connection", "sounds_lost"]

_LOST = re.compile(r"gloo|nccl|connection (was likely )?(closed|reset|refused)|timed? ?out|socket|broken pipe", re.IGNORECASE)
_WAITING = ("torch.distributed.", "lightning_sentinel.")


def sounds_lost(error: BaseException) -> bool:
    """Whether an error of a call into ``torch.distributed`` means that a peer is gone; the backends raise ``RuntimeError``."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error, from any code, means that a peer is gone.

    The message alone is not enough, because a user's own code may say that something "timed out". So the innermost Python frame
    must also be in ``torch.distributed``, or in this package, which waits for peers.
    """
    return sounds_lost(error) and _raised_by(error).startswith(_WAITING)


def _raised_by(error: BaseException) -> str:
    """The Python module where an error was raised."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__", ""))
