"""What the user's step logs on the last stage, brought to every rank.

A step runs once for each micro-batch, and only on the last stage, while every rank takes part in what Lightning makes of logged
values. So ``self.log`` is recorded there, reduced over the micro-batches and replicas that count, and replayed on every rank as if
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
# Passed on to Lightning as they are; the others are either meaningless after the reduction or set by the replay.
_PASSED_ON = ("prog_bar", "logger", "on_step", "on_epoch", "add_dataloader_idx")


class LogCallError(PipelineModelError, MisconfigurationException):
    """``self.log`` was called in a way that Lightning refuses as well, under the name by which it calls it."""


class LoggedValueError(PipelineModelError, ValueError):
    """What was logged is no value; Lightning says ``ValueError``."""


class _Logged(NamedTuple):
    """One name over the micro-batches of a rank, of which those that are left out weigh nothing.

    Args:
        value: weighted by samples, if it is a mean.
        samples: how many.
        by_said: the mean as it is weighted by the batch sizes that the step gave.
        said: their sum; 0 if it gave none, or those of the micro-batches.
        least: of them.
        most: of them.
    """

    value: Tensor
    samples: Tensor
    by_said: Tensor
    said: Tensor
    least: Tensor
    most: Tensor

    def over_ranks(self, how: str) -> tuple[float, float]:
        """The value and its weight in the epoch, of ``(ranks,)`` each."""
        if how != "mean":
            return getattr(self.value, how)().item(), self.samples.sum().item()
        said = self.said > 0
        constant = bool(said.any()) and self.least[said].amin() == self.most[said].amax()
        if not said.any() or constant:
            # A batch size that is always the same is that of the batch, of which the step has seen a micro-batch at a time.
            mean = (self.value * self.samples).sum() / self.samples.sum()
            samples = self.samples.sum()
            return mean.item(), (self.most[said].amax() if constant else samples).item()
        weight = torch.where(said, self.said, self.samples)
        mean = (torch.where(said, self.by_said, self.value) * weight).sum() / weight.sum()
        return mean.item(), weight.sum().item()


@dataclass(eq=False)
class LoggingMicroBatch:
    """Whose values are logged.

    Args:
        samples: of the micro-batch.
        counts: 0-dim bool, false if it is tainted; ``None`` as long as nobody knows, because the step has not come back from the
            pipeline. What such a step has logged weighs nothing.
        step: which step logs.
    """

    samples: int = 1
    counts: Tensor | None = None
    step: str = "validation_step"

    @property
    def training(self) -> bool:
        """Whether the step trains."""
        return self.step == "training_step"


class _OfMicroBatch(NamedTuple):
    """One value that a step logged.

    Args:
        value: 0-dim.
        micro_batch: on which.
        said: the batch size that the step gave, or as many samples as the micro-batch has.
    """

    value: Tensor
    micro_batch: LoggingMicroBatch
    said: int


@dataclass(frozen=True)
class LogSchema:
    """Names and options of what a step logs, without the values: the same on every rank.

    Args:
        entries: for each name its reduction, the options for ``self.log``, the attribute path of a torchmetrics object, and whether
            that has a value for the batch.
    """

    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def encode(self) -> bytes:
        return json.dumps(self.entries, sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> LogSchema:
        """The inverse of :meth:`encode`, of bytes that another rank sent.

        Raises:
            MalformedMessageError: if they say anything but how names are to be logged.
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
        """24 bits, so that it survives a float32 column of a collective; 0 for an empty schema."""
        return zlib.crc32(self.encode()) & 0xFFFFFF if self.entries else 0

    @property
    def names(self) -> list[str]:
        """Names that have values for a batch; what a torchmetrics object is over an epoch is worked out at its end."""
        return sorted(name for name, entry in self.entries.items() if entry["metric"] is None or entry["by_batch"])

    @property
    def width(self) -> int:
        """Numbers that a rank's values take."""
        return len(_Logged._fields) * len(self.names)

    def reduce(self, vectors: Tensor) -> dict[str, tuple[float, float]]:
        """Values over ranks.

        Args:
            vectors: ``(ranks, width)``, as :meth:`LogRecorder.vector` gives them, on the host.

        Returns:
            for each name that was logged somewhere its value and its weight in the epoch.
        """
        columns = vectors.unflatten(1, (-1, len(_Logged._fields)))
        reduced = {}
        for index, name in enumerate(self.names):
            logged = columns[columns[:, index, 1] > 0, index]
            if len(logged):
                reduced[name] = _Logged(*logged.unbind(-1)).over_ranks(self.entries[name]["reduce_fx"])
        return reduced


def _is_entry(entry: Any) -> bool:
    metric, options = entry["metric"], entry["options"]
    known = entry.keys() == {"reduce_fx", "metric", "by_batch", "options"} and (metric is None or isinstance(metric, str))
    return known and entry["reduce_fx"] in _REDUCTIONS and all(name in _PASSED_ON for name in dict(options))


class LogRecorder:
    """Takes the place of ``LightningModule.log`` while a step runs on a micro-batch.

    Args:
        module: the user's module, to find the attribute of a logged metric.
        metrics: the values of metrics on a batch; ``None`` if nobody wants to know them.
    """

    def __init__(self, module: L.LightningModule, metrics: BatchMetrics | None = None) -> None:
        self._module = module
        self._metrics = metrics
        self._entries: dict[str, dict[str, Any]] = {}
        self._values: dict[str, list[_OfMicroBatch]] = {}
        self._logging = LoggingMicroBatch(counts=torch.tensor(True))
        if metrics is not None:
            metrics.begin()

    def begin(self, micro_batch: LoggingMicroBatch) -> None:
        """The next calls come from this micro-batch, for the first time or again."""
        self._logging = micro_batch

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Around a step: what it gives to its metrics is their value on the batch."""
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
        # A copy, because the step may go on to work on the tensor itself.
        tensor = torch.as_tensor(value).detach().to(torch.float32, copy=True).reshape(())
        self._note(name, tensor, int(options.get("batch_size") or self._logging.samples))

    def _note(self, name: str, value: Tensor, said: int) -> None:
        self._values.setdefault(name, []).append(_OfMicroBatch(value, self._logging, said))

    @property
    def schema(self) -> LogSchema:
        return LogSchema(self._entries)

    def vector(self) -> Tensor:
        """What :class:`LogSchema` reduces of each name, over this rank's micro-batches: ``(width,)`` on their device."""
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
        compute: what a metric, given with its name, is over an epoch; all ranks ask together.
    """

    def __init__(self, module: L.LightningModule, compute: Callable[[str, Metric], Any]) -> None:
        self._module = module
        self._compute = compute
        self._metrics: dict[str, LoggedMetric] = {}

    def __call__(self, schema: LogSchema, reduced: Mapping[str, tuple[float, float]]) -> None:
        """Log a batch.

        Args:
            schema: what was logged.
            reduced: the values, as :meth:`LogSchema.reduce` gives them.
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
                # A tensor of the host, where whoever shows it wants it: of a number Lightning would make one of the device.
                size = max(1, round(samples))
                self._module.log(name, torch.tensor(value), reduce_fx=entry["reduce_fx"], batch_size=size, **options)


def silence_misleading_warnings() -> None:
    """Warnings that are right elsewhere.

    Replayed values are reduced already, and a run that is resumed finds its place in the data
    (:mod:`lightning_sentinel.pipeline.checkpoints.resumption`).
    """
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self.log\(.*sync_dist=True")
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
