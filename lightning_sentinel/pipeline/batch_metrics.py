"""Computes the values of torchmetrics objects on a whole batch, though a step sees one micro-batch at a time, on one stage only.

For a metric logged with ``on_step`` Lightning reads the result of its ``forward`` on the batch; for one logged with ``on_epoch`` it
calls ``compute``. The first value is computed here, by a copy of the metric that gets all micro-batches of a batch; the second is
computed across ranks (``results.metrics``).
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
    """The ``distributed_available_fn`` of metrics that must not gather states from other ranks."""
    return False


class BatchMetrics:
    """Computes metrics on a batch, from the arguments that a step passes to their ``forward``.

    Args:
        module: the user's module, which holds the metrics.

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
        """Begin a batch: forget the previous one."""
        self._has.clear()

    def want(self, name: str, metric: Metric) -> None:
        """Record that the step logs a metric whose value on the batch is needed."""
        self._wanted[name] = metric
        if not any(metric is known for known in self._metrics or ()):
            self._metrics = None  # a new metric, which is recorded from the next micro-batch on

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context around a step on a micro-batch that records the inputs of metrics."""
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
        """A metric's value on the micro-batches since :meth:`begin`; ``None`` if it is no number."""
        if name not in self._has:
            return None
        value = self._copies[name].compute()
        return value.detach().reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else None


def _fresh(metric: Metric) -> Metric:
    """Copy a metric with empty states: its present states may belong to an autograd graph, and could not be copied."""
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
    """Stand-in for a metric, which is passed to Lightning's ``self.log`` in its place.

    Args:
        name: of the metric in the module.
        metric: the metric.
        compute: returns the metric's value over an epoch, given its name and itself.
    """

    full_state_update = False

    def __init__(self, name: str, metric: Metric, compute: Callable[[str, Metric], Any]) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        # In a function, because as an attribute the metric would become a submodule, and would be moved with this one.
        self._of = lambda: metric
        self._name = name
        self._ask = compute

    def is_of(self, metric: Metric) -> bool:
        """Whether this stands for ``metric``."""
        return self._of() is metric

    @property
    def device(self) -> torch.device:
        """Device of the metric."""
        return self._of().device

    def of_batch(self, value: float | None) -> None:
        """Set the metric's value on the logged batch, where Lightning reads it: in the cache of ``forward``."""
        self.update()
        vars(self)["_forward_cache"] = None if value is None else torch.tensor(value, device=self.device)

    def update(self) -> None:
        """Does nothing: steps update the metric itself."""

    def compute(self) -> Any:
        """The value over the epoch."""
        return self._ask(self._name, self._of())

    def reset(self) -> None:
        """Reset this and the metric."""
        super().reset()
        self._of().reset()
