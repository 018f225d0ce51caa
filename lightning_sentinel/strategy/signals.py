"""Process signals that ask a run to save itself or to end: noted on arrival, handled between two batches, by all ranks at once.

Lightning acts in the signal's handler, wherever a process happens to be: it saves a checkpoint before SLURM requeues the job, and
tells all ranks of a SIGTERM. In a pipeline both send messages between ranks, which must not mix with the messages of a step.
"""

from __future__ import annotations

import inspect
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
from typing_extensions import override

from lightning_sentinel.pipeline.processes.renumbering import RenumberedEnvironment
from lightning_sentinel.pipeline.processes.wire import is_connected, world

__all__ = ["DeferredSignals"]


class DeferredSignals(L.Callback):
    """Replaces Lightning's signal handlers, and calls them where a checkpoint can be saved.

    Ranks receive a signal at different times, or only some ranks do. So in every batch all ranks agree on the largest number of
    signals that any rank has received, and if it has grown the handler runs, on all ranks. The number travels with what a step
    exchanges anyway, and by itself in prediction, where a step exchanges nothing.

    Args:
        watching: a context that turns the loss of a peer into an error that names the peer.
    """

    def __init__(self, watching: Callable[[], AbstractContextManager[None]]) -> None:
        self._watching = watching
        self._handlers: dict[int, _HandlersCompose] = {}
        self._received: Counter[int] = Counter()
        self._handled: Counter[int] = Counter()
        self._numbers: tuple[int, ...] = ()
        self.heard: tuple[int, ...] = ()
        """The numbers of signals that all ranks agreed on in the current step; empty if they have yet to agree."""

    def counts(self) -> tuple[int, ...]:
        """How many signals of each kind this process has received."""
        return tuple(self._received[number] for number in self._numbers)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._handlers = {}
        self._received = Counter()
        self._handled = Counter()
        self._numbers = _numbers(trainer)
        self.heard = ()

    def _take_over(self, trainer: L.Trainer, *_: Any) -> None:
        """Lightning's ``on_*_start`` hooks, the first hooks after it has registered its handlers: replace those handlers."""
        for number in self._numbers:
            handler = signal.getsignal(number)
            # Neither a handler of the user's, which Lightning has left alone, nor ours.
            if isinstance(handler, _HandlersCompose):
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received[number] += 1

    def _act(self, trainer: L.Trainer, *_: Any) -> None:
        """Lightning's ``on_*_batch_end`` hooks: call the handlers of new signals, on all ranks."""
        counts = self.heard or self._agreed()
        self.heard = ()
        for number, count in zip(self._numbers, counts):
            if count > self._handled[number]:
                self._handled[number] = count
                handler = self._handlers.get(number)
                frame = inspect.currentframe()
                if handler is not None and frame is not None:
                    with self._watching():
                        handler(number, frame)

    def _agreed(self) -> tuple[int, ...]:
        counts = torch.tensor(self.counts())
        if is_connected():
            with self._watching():
                world().all_reduce(counts, largest=True)
        return tuple(counts.tolist())

    on_sanity_check_start = on_train_start = on_validation_start = on_test_start = on_predict_start = _take_over  # type: ignore[assignment]
    on_train_batch_end = on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _act  # type: ignore[assignment]


def _numbers(trainer: L.Trainer) -> tuple[int, ...]:
    """The signals that Lightning handles; the same on all ranks."""
    environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    environment = environment.original if isinstance(environment, RenumberedEnvironment) else environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal is not None:
        return signal.SIGTERM, environment.requeue_signal
    return (signal.SIGTERM,)
