"""What comes of an audit."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Outcome"]


class Outcome(IntEnum):
    """The result of an audit of one signal."""

    MATCHES = 0
    LIED = 1
    """The signal is not what an honest worker computes from the sender's inputs."""
    ACTIVATION_WITHHELD = 2
    """The worker that sent the sender its activation gave the auditor another one."""
    GRADIENT_WITHHELD = 3
    """The worker that sent the sender its gradient gave the auditor another one."""
    DISPUTED = 4
    """The votes contradict each other, and no majority tells who lies. Only a stage's result, never one worker's vote."""
    SIGNAL_WITHHELD = 5
    """The worker that received the signal gave the auditor another one."""
