"""What the user's step logs on the last stage, brought to every rank.

A step runs once for each micro-batch, and only on the last stage, while every rank takes part in what Lightning makes of logged
values. So ``self.log`` is recorded there, reduced over the micro-batches and replicas that count, and replayed on every rank as if
the step had run once on the whole batch.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Number
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sentinel.errors import PipelineModelError

__all__ = ["LogRecorder", "LogSchema", "replay", "silence_misleading_warnings"]

_BEHIND_REDUCE_FX = ("enable_graph", "sync_dist", "sync_dist_group", "add_dataloader_idx", "batch_size", "metric_attribute")
_REDUCTIONS = ("mean", "sum", "max", "min")
# Passed on to Lightning as they are; the others are either meaningless after the reduction or set by the replay.
_PASSED_ON = ("prog_bar", "logger", "on_step", "on_epoch", "add_dataloader_idx")


@dataclass(frozen=True)
class LogSchema:
    """Names and options of what a step logs, without the values: the same on every rank.

    Args:
        entries: for each name its reduction, the options for ``self.log``, and the attribute path of a torchmetrics object.
    """

    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def encode(self) -> bytes:
        return json.dumps(self.entries, sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> LogSchema:
        return cls(json.loads(data))

    @property
    def fingerprint(self) -> int:
        """24 bits, so that it survives a float32 column of a collective; 0 for an empty schema."""
        return zlib.crc32(self.encode()) & 0xFFFFFF if self.entries else 0

    @property
    def names(self) -> list[str]:
        """Names that have values; a torchmetrics object is synchronised by Lightning itself."""
        return sorted(name for name, entry in self.entries.items() if entry["metric"] is None)

    def reduce(self, vectors: Tensor) -> dict[str, tuple[float, float]]:
        """Values over ranks.

        Args:
            vectors: ``(ranks, 2 * len(names))``, as :meth:`LogRecorder.vector` gives them, on the host.

        Returns:
            for each name that was logged somewhere its value and the number of samples behind it.
        """
        values, weights = vectors.unflatten(1, (-1, 2)).unbind(-1)
        reduced = {}
        for index, name in enumerate(self.names):
            value, weight = values[:, index], weights[:, index]
            logged = weight > 0
            if not logged.any():
                continue
            value, weight = value[logged], weight[logged]
            how = self.entries[name]["reduce_fx"]
            result = (value * weight).sum() / weight.sum() if how == "mean" else getattr(value, how)()
            reduced[name] = (result.item(), weight.sum().item())
        return reduced


class LogRecorder:
    """Takes the place of ``LightningModule.log`` while a step runs on a micro-batch.

    Args:
        module: the user's module, to find the attribute of a logged metric.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self._module = module
        self._entries: dict[str, dict[str, Any]] = {}
        self._values: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.samples = 1
        self.counts = torch.tensor(True)

    def begin(self, samples: int, counts: Tensor) -> None:
        """The next calls come from a micro-batch of ``samples`` samples; ``counts`` (0-dim bool) is false if it is tainted."""
        self.samples, self.counts = samples, counts

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
        self._entries[name] = {"reduce_fx": _reduction(name, reduce_fx), "metric": metric} | {"options": entry}
        if metric is not None:
            return
        if not isinstance(value, (Tensor, Number)) or (isinstance(value, Tensor) and value.numel() != 1):
            raise PipelineModelError(
                f"self.log({name!r}, {value!r}): in a pipeline a logged value is a number, a tensor with one element or a"
                " torchmetrics Metric. Log its elements under names of their own, or use self.log_dict."
            )
        weight = torch.as_tensor(options.get("batch_size") or self.samples) * self.counts.float()
        tensor = torch.as_tensor(value, device=self.counts.device).detach().float().reshape(())
        self._values.setdefault(name, []).append((torch.where(self.counts, tensor, 0.0), weight))

    @property
    def schema(self) -> LogSchema:
        return LogSchema(self._entries)

    def vector(self) -> Tensor:
        """Value and weight of each name, reduced over this rank's micro-batches: ``(2 * len(names),)`` on their device."""
        parts = []
        for name in self.schema.names:
            values, weights = (torch.stack(column) for column in zip(*self._values[name]))
            parts += [self._reduced(values, weights, self._entries[name]["reduce_fx"]), weights.sum()]
        return torch.stack(parts) if parts else torch.empty(0, device=self.counts.device)

    @staticmethod
    def _reduced(values: Tensor, weights: Tensor, how: str) -> Tensor:
        if how == "mean":
            return (values * weights).sum() / weights.sum().clamp(min=1e-12)
        if how == "sum":
            return values.sum()
        excluded = values.new_tensor(torch.inf if how == "min" else -torch.inf)
        kept = torch.where(weights > 0, values, excluded)
        return kept.amin() if how == "min" else kept.amax()

    def _attribute_of(self, name: str, metric: Metric, options: Mapping[str, Any]) -> str:
        if options.get("metric_attribute"):
            return str(options["metric_attribute"])
        for attribute, child in self._module.named_modules():
            if child is metric:
                return attribute
        raise PipelineModelError(
            f"self.log({name!r}, <{type(metric).__name__}>): the metric is no attribute of {type(self._module).__name__}, so the"
            " other ranks cannot find theirs. Assign it in __init__: self.my_metric = ..."
        )


def _reduction(name: str, reduce_fx: Any) -> str:
    how = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", repr(reduce_fx))
    how = {"avg": "mean", "amax": "max", "amin": "min"}.get(how.lower(), how.lower())
    if how not in _REDUCTIONS:
        raise PipelineModelError(
            f"self.log({name!r}, reduce_fx={reduce_fx!r}): values are reduced over micro-batches and replicas before Lightning"
            f" sees them, which works for {', '.join(_REDUCTIONS)}."
        )
    return how


def replay(module: L.LightningModule, schema: LogSchema, reduced: Mapping[str, tuple[float, float]], *, ran_here: bool) -> None:
    """Log on this rank what the last stages logged. To be called where ``self.log`` may be called.

    Args:
        schema: what was logged.
        reduced: the values, as :meth:`LogSchema.reduce` gives them.
        ran_here: whether this rank has a last stage, on which the step itself updated its metrics.
    """
    for name, entry in schema.entries.items():
        if entry["metric"] is not None:
            metric = cast(Metric, module.get_submodule(entry["metric"]))
            if not ran_here:
                # Empty here, and it stays so: Lightning adds up the states of all ranks before it computes. But a result that it
                # has cached must go, or this rank would sit out the collective of those on which the metric was updated.
                metric.reset()
            module.log(name, metric, **entry["options"])
        elif name in reduced:
            value, samples = reduced[name]
            options = dict(entry["options"])
            module.log(name, value, reduce_fx=entry["reduce_fx"], batch_size=max(1, round(samples)), **options)


def silence_misleading_warnings() -> None:
    """Warnings that are right elsewhere.

    Replayed values are reduced already, replayed metrics are empty on most ranks, and a run that is resumed finds its place in the
    data (:mod:`lightning_sentinel.pipeline.checkpoints.resumption`).
    """
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self.log\(.*sync_dist=True")
    warnings.filterwarnings("ignore", message="The ``compute`` method of metric .* was called before the ``update``")
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
