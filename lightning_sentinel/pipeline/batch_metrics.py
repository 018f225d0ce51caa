"""Metric objects of torchmetrics where a step sees a micro-batch at a time, and on one stage only.

Lightning asks a metric that was logged with ``on_step`` for what its ``forward`` gave on the batch, and one that was logged with
``on_epoch`` for what it computes. The first is worked out here, by a copy of the metric that is given all of a batch's
micro-batches; the second is a matter between ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric

__all__ = ["BatchMetrics", "LoggedMetric", "alone"]


def alone() -> bool:
    """Nobody to gather states from: ``distributed_available_fn`` of metrics that are not to wait for other ranks."""
    return False


class BatchMetrics:
    """What metrics are on a batch, from what a step gives to their ``forward``.

    Args:
        module: the user's module, which has them.

    Example:
        >>> from torchmetrics import MaxMetric
        >>> module = L.LightningModule()
        >>> module.highest = MaxMetric()
        >>> metrics = BatchMetrics(module)
        >>> metrics.begin()
        >>> for micro_batch in (torch.tensor([1.0, 5.0]), torch.tensor([2.0])):
        ...     with metrics.listening():
        ...         _ = module.highest(micro_batch)
        ...         metrics.want("highest", module.highest)
        >>> metrics.value("highest")
        tensor(5.)
    """

    def __init__(self, module: L.LightningModule) -> None:
        self._module = module
        self._metrics: list[Metric] | None = None
        self._copies: dict[str, Metric] = {}
        self._heard: dict[int, list[tuple[Any, Any]]] = {}
        self._wanted: dict[str, Metric] = {}
        self._has: set[str] = set()

    def begin(self) -> None:
        """Forget the batch before."""
        self._has.clear()

    def want(self, name: str, metric: Metric) -> None:
        """The step logs a metric, whose value on the batch somebody will look at."""
        self._wanted[name] = metric
        if not any(metric is known for known in self._metrics or ()):
            self._metrics = None  # made since, and heard from the next micro-batch on

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Around a step on a micro-batch."""
        if self._metrics is None:
            self._metrics = [part for part in self._module.modules() if isinstance(part, Metric)]
        self._heard.clear()
        self._wanted.clear()
        hooks = [metric.register_forward_hook(self._hear, with_kwargs=True) for metric in self._metrics]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for name, metric in self._wanted.items():
            self._give(name, metric)
        self._heard.clear()

    def _hear(self, metric: Metric, args: Any, kwargs: Any, output: Any) -> None:
        self._heard.setdefault(id(metric), []).append(apply_to_collection((args, kwargs), Tensor, Tensor.detach))

    def _give(self, name: str, metric: Metric) -> None:
        given = self._heard.get(id(metric), [])
        if not given:
            return
        if name not in self._copies:
            self._copies[name] = _fresh(metric)
        copy = self._copies[name]
        if name not in self._has:
            copy.reset()
            self._has.add(name)
        for args, kwargs in given:
            copy.update(*args, **kwargs)

    def value(self, name: str) -> Tensor | None:
        """What a metric is on the micro-batches since the beginning of the batch; ``None`` if that is no number."""
        if name not in self._has:
            return None
        value = self._copies[name].compute()
        return value.detach().reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else None


def _fresh(metric: Metric) -> Metric:
    """A copy without what the metric has been given, which may belong to a graph and could not be copied."""
    parts = [part for part in metric.modules() if isinstance(part, Metric)]
    before = [dict(vars(part)) for part in parts]
    for part in parts:
        states: dict[str, Any] = part._defaults
        empty = {name: [] if isinstance(default, list) else default.clone() for name, default in states.items()}
        vars(part).update(empty, _forward_cache=None, _computed=None, _cache=None)
    try:
        copy = metric.clone()
    finally:
        for part, state in zip(parts, before):
            vars(part).update(state)
    for copied in copy.modules():
        if isinstance(copied, Metric):
            copied.distributed_available_fn = alone
    return copy.to(metric.device)


class LoggedMetric(Metric):
    """Stands for a metric where Lightning is told that it was logged.

    Args:
        name: of the metric in the module.
        metric: itself.
        compute: what it is over an epoch, given name and metric.
    """

    full_state_update = False

    def __init__(self, name: str, metric: Metric, compute: Callable[[str, Metric], Any]) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        # In a function, because a module would take a metric for a part of itself, and move it to where it is itself.
        self._of = lambda: metric
        self._name = name
        self._ask = compute

    def is_of(self, metric: Metric) -> bool:
        """Whether it stands for this one."""
        return self._of() is metric

    @property
    def device(self) -> torch.device:
        """Where the metric is."""
        return self._of().device

    def of_batch(self, value: float | None) -> None:
        """What the metric is on the batch that is being logged, which Lightning looks for where ``forward`` leaves it."""
        self.update()
        vars(self)["_forward_cache"] = None if value is None else torch.tensor(value, device=self.device)

    def update(self) -> None:
        """Nothing: the steps do."""

    def compute(self) -> Any:
        """The value over the epoch."""
        return self._ask(self._name, self._of())

    def reset(self) -> None:
        """Of the metric as well."""
        super().reset()
        self._of().reset()
