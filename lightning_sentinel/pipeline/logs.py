"""Records what the user's step logs on the last stage, and replays it on every rank.

A step runs once per micro-batch, and only on the last stage, but every rank takes part in Lightning's handling of logged values. So
calls of ``self.log`` are recorded there, reduced over the micro-batches and replicas that count, and replayed on every rank as if
the step had run once on the whole batch.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Number
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from lightning_sentinel.errors import MalformedMessageError, PipelineModelError
from lightning_sentinel.pipeline.batch_metrics import BatchMetrics, LoggedMetric

__all__ = [
    "LogCallError",
    "LogRecorder",
    "LogReplay",
    "LogSchema",
    "LoggedValueError",
    "LoggingMicroBatch",
    "silence_misleading_warnings",
]

_BEHIND_REDUCE_FX = ("enable_graph", "sync_dist", "sync_dist_group", "add_dataloader_idx", "batch_size", "metric_attribute")
_REDUCTIONS = ("mean", "sum", "max", "min")
# Options passed on to Lightning unchanged; the others are either meaningless after the reduction or set by the replay.
_PASSED_ON = ("prog_bar", "logger", "on_step", "on_epoch", "add_dataloader_idx")


class LogCallError(PipelineModelError, MisconfigurationException):
    """``self.log`` was called in a way that Lightning refuses too; a subclass of Lightning's own exception for it."""


class LoggedValueError(PipelineModelError, ValueError):
    """The step logged an object that is no value; a subclass of ``ValueError``, which Lightning raises."""


class _Logged(NamedTuple):
    """The values logged under one name, reduced over a rank's micro-batches; those that are left out have weight 0.

    Args:
        value: the reduced value; a mean is weighted by samples.
        samples: number of samples.
        by_said: the mean weighted by the batch sizes that the step passed to ``self.log``.
        said: sum of these batch sizes; 0 if the step passed none, or those of the micro-batches.
        least: smallest of these batch sizes.
        most: largest of these batch sizes.
    """

    value: Tensor
    samples: Tensor
    by_said: Tensor
    said: Tensor
    least: Tensor
    most: Tensor

    def over_ranks(self, how: str) -> tuple[float, float]:
        """Reduce over ranks, with fields of shape ``(ranks,)``, to the value and its weight in the epoch."""
        if how != "mean":
            return getattr(self.value, how)().item(), self.samples.sum().item()
        said = self.said > 0
        constant = bool(said.any()) and self.least[said].amin() == self.most[said].amax()
        if not said.any() or constant:
            # A constant batch size is that of the whole batch, of which the step sees one micro-batch at a time.
            mean = (self.value * self.samples).sum() / self.samples.sum()
            samples = self.samples.sum()
            return mean.item(), (self.most[said].amax() if constant else samples).item()
        weight = torch.where(said, self.said, self.samples)
        mean = (torch.where(said, self.by_said, self.value) * weight).sum() / weight.sum()
        return mean.item(), weight.sum().item()


@dataclass(eq=False)
class LoggingMicroBatch:
    """The micro-batch whose values a step logs.

    Args:
        samples: number of samples in the micro-batch.
        counts: 0-dim bool, false if the micro-batch is tainted; ``None`` while that is unknown, because the pipeline has not
            returned its output. Until then, logged values have weight 0.
        step: name of the step.
    """

    samples: int = 1
    counts: Tensor | None = None
    step: str = "validation_step"

    @property
    def training(self) -> bool:
        """Whether the step is a training step."""
        return self.step == "training_step"


class _OfMicroBatch(NamedTuple):
    """One value that a step logged.

    Args:
        value: 0-dim.
        micro_batch: on which the step logged it.
        said: the batch size that the step passed, or else the number of samples in the micro-batch.
    """

    value: Tensor
    micro_batch: LoggingMicroBatch
    said: int


@dataclass(frozen=True)
class LogSchema:
    """Names and options of the values that a step logs, without the values: the same on every rank.

    Args:
        entries: for each name its reduction, the options for ``self.log``, the attribute path of a torchmetrics object, and whether
            the metric has a value for the batch.
    """

    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def encode(self) -> bytes:
        return json.dumps(self.entries, sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> LogSchema:
        """The inverse of :meth:`encode`, for bytes that another rank sent.

        Raises:
            MalformedMessageError: if the bytes are no valid schema.
        """
        try:
            entries = json.loads(data)
            if not all(_is_entry(entry) for entry in entries.values()):
                raise ValueError("an entry with other keys or values")
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise MalformedMessageError(f"What should describe logged values does not: {data[:80]!r} ({error}).") from error
        return cls(entries)

    @property
    def fingerprint(self) -> int:
        """A checksum of 24 bits, so that it survives a float32 column of a collective; 0 for an empty schema."""
        return zlib.crc32(self.encode()) & 0xFFFFFF if self.entries else 0

    @property
    def names(self) -> list[str]:
        """Names that have values for a batch. A torchmetrics object logged per epoch only has none: it is computed at the end."""
        return sorted(name for name, entry in self.entries.items() if entry["metric"] is None or entry["by_batch"])

    @property
    def width(self) -> int:
        """Length of the vector of a rank's values."""
        return len(_Logged._fields) * len(self.names)

    def reduce(self, vectors: Tensor) -> dict[str, tuple[float, float]]:
        """Reduce logged values over ranks.

        Args:
            vectors: ``(ranks, width)``, the result of :meth:`LogRecorder.vector` on each rank, on the host.

        Returns:
            for each name that some rank logged, its value and its weight in the epoch.
        """
        columns = vectors.unflatten(1, (-1, len(_Logged._fields)))
        reduced = {}
        for index, name in enumerate(self.names):
            logged = columns[columns[:, index, 1] > 0, index]
            if len(logged):
                reduced[name] = _Logged(*logged.unbind(-1)).over_ranks(self.entries[name]["reduce_fx"])
        return reduced


def _is_entry(entry: Any) -> bool:
    metric = entry["metric"]
    options = entry["options"]
    known = entry.keys() == {"reduce_fx", "metric", "by_batch", "options"} and (metric is None or isinstance(metric, str))
    return known and entry["reduce_fx"] in _REDUCTIONS and all(name in _PASSED_ON for name in dict(options))


class LogRecorder:
    """Replaces ``LightningModule.log`` while a step runs on a micro-batch.

    Args:
        module: the user's module, to find the attribute of a logged metric.
        metrics: computes the values of metrics on a batch; ``None`` if they are not needed.
    """

    def __init__(self, module: L.LightningModule, metrics: BatchMetrics | None = None) -> None:
        self._module = module
        self._metrics = metrics
        self._entries: dict[str, dict[str, Any]] = {}
        self._values: dict[str, list[_OfMicroBatch]] = {}
        self._logging = LoggingMicroBatch(counts=torch.tensor(True))
        if metrics is not None:
            metrics.begin()

    def next(self) -> LogRecorder:
        """A recorder for the next batch."""
        return LogRecorder(self._module, self._metrics)

    def begin(self, micro_batch: LoggingMicroBatch) -> None:
        """Attribute the next calls to this micro-batch, also when its step is resumed."""
        self._logging = micro_batch

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context around a step that records the inputs of its metrics, for their values on the batch."""
        if self._metrics is None:
            yield
            return
        with self._metrics.listening():
            yield

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        *others: Any,
        **options: Any,
    ) -> None:
        """The signature of ``LightningModule.log``, which takes its first options by position as well."""
        options |= {"prog_bar": prog_bar or None, "logger": logger, "on_step": on_step, "on_epoch": on_epoch}
        options |= dict(zip(_BEHIND_REDUCE_FX, others))
        entry = {key: options[key] for key in _PASSED_ON if options.get(key) is not None}
        metric = self._attribute_of(name, value, options) if isinstance(value, Metric) else None
        by_batch = metric is not None and (self._logging.training if on_step is None else on_step)
        if "/dataloader_idx_" in name:
            raise LogCallError(
                f"You called `self.log` with the key `{name}`, but it must not contain '/dataloader_idx_', which is added"
                " where there are several loaders. Name it otherwise."
            )
        how = _reduction(name, reduce_fx)
        described = {"reduce_fx": how, "metric": metric, "by_batch": by_batch, "options": entry}
        if self._entries.setdefault(name, described) != described:
            raise LogCallError(
                f"You called `self.log({name}, ...)` twice in `{self._logging.step}` with different arguments:"
                f" {self._entries[name]}, then {described}. Log it under another name, or with the same arguments."
            )
        if metric is not None:
            if by_batch and self._metrics is not None:
                self._metrics.want(metric, value)
            self._note(name, torch.zeros(()), self._logging.samples)
            return
        if not isinstance(value, (Tensor, Number)) or (isinstance(value, Tensor) and value.numel() != 1):
            raise LoggedValueError(
                f"`self.log({name}, {value})` was called, but {type(value).__name__} values cannot be logged: a tensor must have a"
                " single element, and else it is a number or a torchmetrics Metric. Log its elements under names of their own, or"
                " use self.log_dict."
            )
        # Copy, because the step may modify the tensor later.
        tensor = torch.as_tensor(value).detach().to(torch.float32, copy=True).reshape(())
        self._note(name, tensor, int(options.get("batch_size") or self._logging.samples))

    def _note(self, name: str, value: Tensor, said: int) -> None:
        self._values.setdefault(name, []).append(_OfMicroBatch(value, self._logging, said))

    @property
    def schema(self) -> LogSchema:
        return LogSchema(self._entries)

    def vector(self) -> Tensor:
        """The values of all names, reduced over this rank's micro-batches, for :meth:`LogSchema.reduce`: ``(width,)``."""
        parts = [torch.stack(self._reduced(name, self._entries[name])) for name in self.schema.names]
        return torch.cat(parts) if parts else torch.empty(0, device=_counts(self._logging).device)

    def _reduced(self, name: str, entry: Mapping[str, Any]) -> _Logged:
        logged = self._values[name]
        how = entry["reduce_fx"]
        included = torch.stack([_counts(one.micro_batch) for one in logged])
        values = torch.where(included, torch.stack([one.value.to(included.device) for one in logged]), 0.0)
        counts = included.float()
        samples = [one.micro_batch.samples for one in logged]
        said = [one.said for one in logged]
        weights = counts * counts.new_tensor(samples)
        nothing = counts.new_zeros(())
        total = weights.sum()
        if entry["metric"] is not None:
            value = None if self._metrics is None else self._metrics.value(entry["metric"])
            total, reduced = (nothing, nothing) if value is None else (total, value.to(total))
        elif how == "mean":
            reduced = (values * weights).sum() / total.clamp(min=1e-12)
            if said != samples:
                sizes = counts * counts.new_tensor(said)
                by_said = (values * sizes).sum() / sizes.sum().clamp(min=1e-12)
                return _Logged(reduced, total, by_said, sizes.sum(), *counts.new_tensor([min(said), max(said)]))
        elif how == "sum":
            reduced = values.sum()
        else:
            kept = torch.where(counts > 0, values, torch.inf if how == "min" else -torch.inf)
            reduced = kept.amin() if how == "min" else kept.amax()
        return _Logged(reduced, total, nothing, nothing, nothing, nothing)

    def _attribute_of(self, name: str, metric: Metric, options: Mapping[str, Any]) -> str:
        if options.get("metric_attribute"):
            return str(options["metric_attribute"])
        for attribute, child in self._module.named_modules():
            if child is metric:
                return attribute
        known = [attribute for attribute, child in self._module.named_modules() if isinstance(child, Metric)]
        named = f" or say which is meant, with `self.log({name}, ..., metric_attribute=name)` where `name` is one of {known}"
        raise LogCallError(
            f"self.log({name!r}, <{type(metric).__name__}>): the metric is no attribute of {type(self._module).__name__}, so that"
            " nobody else finds it. You can fix this by setting an attribute for the metric in your `LightningModule`:"
            f" self.my_metric = ... in __init__;{named if known else ' log that one'}."
        )


def _counts(micro_batch: LoggingMicroBatch) -> Tensor:
    return torch.tensor(False) if micro_batch.counts is None else micro_batch.counts


def _reduction(name: str, reduce_fx: Any) -> str:
    how = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", repr(reduce_fx))
    how = {"avg": "mean", "amax": "max", "amin": "min"}.get(how.lower(), how.lower())
    if how not in _REDUCTIONS:
        raise LogCallError(
            f"self.log({name!r}, reduce_fx={reduce_fx!r}): values are reduced over micro-batches and replicas before Lightning"
            f" sees them, and only `self.log({name}, ..., reduce_fx={{min,max,mean,sum}})` are supported. Choose one of them."
        )
    return how


class LogReplay:
    """Logs on this rank what the last stages logged. To be called where ``self.log`` may be called.

    Args:
        module: the user's module.
        compute: returns the value over an epoch of a metric, given its name and itself; all ranks call it together.
    """

    def __init__(self, module: L.LightningModule, compute: Callable[[str, Metric], Any]) -> None:
        self._module = module
        self._compute = compute
        self._metrics: dict[str, LoggedMetric] = {}

    def __call__(self, schema: LogSchema, reduced: Mapping[str, tuple[float, float]]) -> None:
        """Log a batch.

        Args:
            schema: names and options of the logged values.
            reduced: the values, from :meth:`LogSchema.reduce`.
        """
        for name, entry in schema.entries.items():
            path = entry["metric"]
            options = dict(entry["options"])
            if path is not None:
                real = cast(Metric, self._module.get_submodule(path))
                metric = self._metrics.get(path)
                if metric is None or not metric.is_of(real):
                    metric = self._metrics[path] = LoggedMetric(path, real, self._compute)
                metric.of_batch(reduced[name][0] if name in reduced else None)
                self._module.log(name, metric, metric_attribute=path, **options)
            elif name in reduced:
                value, samples = reduced[name]
                # A tensor on the host, where loggers and progress bars need it: Lightning would put a number on the device.
                size = max(1, round(samples))
                self._module.log(name, torch.tensor(value), reduce_fx=entry["reduce_fx"], batch_size=size, **options)


def silence_misleading_warnings() -> None:
    """Filter warnings that do not apply here.

    Replayed values are reduced already, and a resumed run restores its position in the data
    (:mod:`lightning_sentinel.pipeline.checkpoints.resumption`).
    """
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self.log\(.*sync_dist=True")
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
