"""The name of this machine."""

from __future__ import annotations

import os
import socket

__all__ = ["host_name"]


def host_name() -> str:
    """The name by which the run identifies this machine, and bans it.

    ``LIGHTNING_SENTINEL_HOST`` if it is set, because a container's own name changes with every start; else the host name.

    Example:
        >>> os.environ["LIGHTNING_SENTINEL_HOST"] = "rack 3"
        >>> host_name()
        'rack 3'
        >>> del os.environ["LIGHTNING_SENTINEL_HOST"]
    """
    return os.environ.get("LIGHTNING_SENTINEL_HOST", "").strip() or socket.gethostname()
