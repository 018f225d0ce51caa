"""What a machine is called."""

from __future__ import annotations

import os
import socket

__all__ = ["host_name"]


def host_name() -> str:
    """The name under which this machine is known to the run, and under which it is banned.

    ``LIGHTNING_SENTINEL_HOST``, if it is set: the name of a container changes with every start, that of its machine does not.

    Example:
        >>> os.environ["LIGHTNING_SENTINEL_HOST"] = "rack 3"
        >>> host_name()
        'rack 3'
        >>> del os.environ["LIGHTNING_SENTINEL_HOST"]
    """
    return os.environ.get("LIGHTNING_SENTINEL_HOST", "").strip() or socket.gethostname()
