"""What malicious workers say beside the signals that they send: rows, notes, commitments and votes.

Like every attack these take what an honest worker would say and return what is said in its place. Workers may lie in several roles:
see :class:`lightning_sentinel.attacks.wrappers.Several`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_sentinel.attacks.context import AttackContext
from lightning_sentinel.attacks.faults import Site
from lightning_sentinel.attacks.signals import is_number, is_share, require
from lightning_sentinel.mesh import Direction

__all__ = ["Equivocate", "FalseNotes", "FalseRows", "FalseVotes"]


@dataclass
class FalseRows:
    """A receiver reports other measurements than it made: ``r' = u`` of an ally's signal, ``r' = r + invent`` of others' (ours).

    A row ``r`` has the features of a signal, and last whether it was tainted, 0 or 1. ``u`` is the row that is usual at the
    boundary: the trend of the features, and no taint. What is added to the features, most of which are logarithms, looks like a
    deviation.

    Args:
        hide: how signals of malicious workers are hidden: ``"usual"`` reports the usual row; ``"taint"`` says that an earlier
            verifier had flagged the micro-batch, so that nobody judges the signal; ``None`` hides nothing.
        invent: what is added to each feature of signals of honest workers.

    Raises:
        ConfigurationError: if ``hide`` is none of these, or ``invent`` no number.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Mesh, Worker
        >>> liar, honest = Worker(1, 0), Worker(0, 0)
        >>> adversary = attacks.Adversary({"name": "false_rows", "invent": 3.0}, Mesh(3, 4), workers=[liar])
        >>> row, usual = torch.tensor([0.5, -1.0, 0.0]), torch.zeros(3)
        >>> adversary.row(row, usual, liar, honest, Direction.ACTIVATION, step=7, micro_batch=0)
        tensor([3.5000, 2.0000, 0.0000])
    """

    hide: Literal["usual", "taint"] | None = "usual"
    invent: float = 0.0
    site: ClassVar[Site] = Site.ROWS

    def __post_init__(self) -> None:
        require(self.hide in ("usual", "taint", None), self, "hide", "'usual', 'taint' or None")
        require(is_number(self.invent), self, "invent", "a number")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        told = signal.clone()
        if not context.about_ally:
            told[..., :-1] += self.invent
        elif self.hide == "taint":
            told[..., -1] = 1
        elif self.hide == "usual" and context.received is not None and context.received.shape == signal.shape:
            told = torch.where(context.received.isfinite(), context.received, signal)
        return told


@dataclass
class FalseNotes:
    """The note on a signal is that on other samples: ``n'_i = (1 - strength) n_i + strength * n_(i-1)`` for sample ``i`` (ours).

    A note is the projection, on secret directions, of a signal that was sent: the verifiers behind the neighbour compare it with
    what the neighbour sends, so an honest neighbour looks guilty. Notes on signals that malicious workers were sent are honest. Of
    a single sample the positions are exchanged.

    Args:
        strength: how much of the note is false, above 0 and at most 1.

    Raises:
        ConfigurationError: if ``strength`` is no number above 0 and at most 1.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Mesh, Worker
        >>> maker, neighbour = Worker(0, 0), Worker(1, 0)
        >>> adversary = attacks.Adversary("false_notes", Mesh(3, 4), workers=[maker])
        >>> adversary.note(torch.tensor([[1.0], [2.0]]), maker, neighbour, Direction.ACTIVATION, step=7, micro_batch=0)
        tensor([[2.],
                [1.]])
    """

    strength: float = 1.0
    site: ClassVar[Site] = Site.NOTES

    def __post_init__(self) -> None:
        require(is_share(self.strength), self, "strength", "a number above 0 and at most 1")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        if context.about_ally:
            return signal.clone()
        axis = next((axis for axis, size in enumerate(signal.shape) if size > 1), 0)
        return torch.lerp(signal, signal.roll(1, axis), self.strength)


@dataclass
class Equivocate:
    """A worker commits to another signal than it sent or received: it says ``digest(-h)`` to all of ``h`` (ours).

    Both ends of a message say in the step's collective what its digest is, and the sender signs it. The word of the other end,
    which is honest, contradicts that of the liar, and nobody can tell which of the two lies. About messages to and from malicious
    workers it says what is true.

    Args:
        side: whose word it is: ``"sender"``, about what the worker sent; ``"receiver"``, about what it received, to have the sender
            suspected; or ``"both"``.
        probability: chance that it lies about a message, above 0 and at most 1.

    Raises:
        ConfigurationError: if ``side`` is none of these, or ``probability`` no number above 0 and at most 1.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Mesh, Worker
        >>> liar, before, behind = Worker(1, 0), Worker(0, 0), Worker(2, 0)
        >>> adversary = attacks.Adversary({"name": "equivocate", "side": "sender"}, Mesh(3, 4), workers=[liar])
        >>> for neighbour in (behind, before):
        ...     adversary.commitment(torch.ones(2), liar, neighbour, Direction.ACTIVATION, step=7, micro_batch=0)
        tensor([-1., -1.])
        tensor([1., 1.])
    """

    side: Literal["sender", "receiver", "both"] = "both"
    probability: float = 1.0
    site: ClassVar[Site] = Site.COMMITMENTS

    def __post_init__(self) -> None:
        require(self.side in ("sender", "receiver", "both"), self, "side", "'sender', 'receiver' or 'both'")
        require(is_share(self.probability), self, "probability", "a number above 0 and at most 1")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        draw = random.Random(context.seed_for("equivocate", self._side(context), *context.place)).random()
        if context.about_ally or self.side not in (self._side(context), "both") or draw >= self.probability:
            return signal.clone()
        return -signal

    @staticmethod
    def _side(context: AttackContext) -> str:
        """Which end of the message the worker is."""
        onwards = context.about is None or context.about.stage > context.worker.stage
        return "sender" if onwards == (context.direction is Direction.ACTIVATION) else "receiver"


@dataclass
class FalseVotes:
    """An auditor says ``v' = 1``, *does not match*, of honest workers, and ``v' = 0``, *matches*, of malicious ones (ours).

    Args:
        accuse: whether it says so of honest workers; else its votes on them are honest.
        cover: whether it does so for malicious workers; else its votes on them are honest.

    Raises:
        ConfigurationError: if neither is asked for.

    Example:
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Mesh, Worker
        >>> liar, ally, honest = (Worker(1, replica) for replica in range(3))
        >>> adversary = attacks.Adversary("false_votes", Mesh(3, 5), workers=[liar, ally])
        >>> [adversary.vote(word, liar, one, Direction.GRADIENT, step=7) for word, one in ((0, honest), (1, ally))]
        [1, 0]
    """

    accuse: bool = True
    cover: bool = True
    site: ClassVar[Site] = Site.VOTES

    def __post_init__(self) -> None:
        require(self.accuse or self.cover, self, "cover", "True where accuse is False")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        if context.about_ally:
            return torch.zeros_like(signal) if self.cover else signal.clone()
        return torch.ones_like(signal) if self.accuse else signal.clone()
