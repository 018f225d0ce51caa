"""The replay attack, the only published one that remembers: it sends a signal of earlier steps again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from lightning_sentinel.attacks.context import AttackContext
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Direction, Worker

__all__ = ["Delay"]

_Key = tuple[Worker, Direction, int]
_History = deque[tuple[int, Tensor]]


@dataclass
class Delay:
    """Sends the honest signal of an earlier step: ``h'(t) = h(t - steps)`` (SENTINEL, arXiv 2603.03592, section on attacks).

    A history is kept for each (worker, direction, micro-batch). Until it reaches ``steps`` back, and where the old
    signal has another shape than the present one, the honest signal is sent. Where the worker sent nothing exactly
    ``steps`` ago, the next older signal takes its place. A history holds at most ``steps + 1`` signals, on their
    device: 100 steps of a (4, 512, 1024) activation in bfloat16 take 404 MiB. A step may be done again: the second
    signal of the same step and micro-batch replaces the first, and the replayed signal is as old as before.

    Args:
        steps: age of the signal that is sent, in optimizer steps, at least 1.

    Raises:
        ConfigurationError: if ``steps`` is no integer of at least 1.

    Example:
        >>> import torch
        >>> from lightning_sentinel import attacks
        >>> from lightning_sentinel.mesh import Direction, Worker
        >>> delay = attacks.Delay(steps=2)
        >>> def send(step):
        ...     context = attacks.AttackContext.seeded(0, Worker(1, 0), Direction.ACTIVATION, step=step)
        ...     return delay(torch.tensor([float(step)]), context).item()
        >>> [send(step) for step in range(5)]
        [0.0, 1.0, 0.0, 1.0, 2.0]
    """

    steps: int = 100
    _histories: dict[_Key, _History] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ConfigurationError(f"Delay(steps={self.steps!r}) cannot work: steps must be an integer of at least 1.")

    def __call__(self, signal: Tensor, context: AttackContext) -> Tensor:
        history = self._history(context)
        due = [old for step, old in history if step <= context.step - self.steps]
        old = due[-1] if due else signal
        fits = (old.shape, old.dtype, old.device) == (signal.shape, signal.dtype, signal.device)
        sent = (old if fits else signal).clone()
        self._remember(history, signal, context.step)
        return sent

    def observe(self, signal: Tensor, context: AttackContext) -> None:
        """Remembers a signal that is sent honestly, so that the attack can start at full strength."""
        self._remember(self._history(context), signal, context.step)

    def _history(self, context: AttackContext) -> _History:
        history = self._histories.setdefault((context.worker, context.direction, context.micro_batch), deque())
        # A step that was already seen comes again when a run restarts from a checkpoint: what followed never happened.
        while history and history[-1][0] >= context.step:
            history.pop()
        return history

    def _remember(self, history: _History, signal: Tensor, step: int) -> None:
        # The signal of this step is kept until the next one: the step may be done again.
        while len(history) > 1 and history[1][0] <= step - self.steps:
            history.popleft()
        # A copy, since pipeline engines reuse their send buffers.
        history.append((step, signal.detach().clone()))
