"""Computes torchmetrics objects from the states on the ranks that ran steps, and sends the values to all ranks.

By default a metric gathers its states from all ranks. Most ranks have none, because no step ran there, and list states cannot be
gathered from them. So metrics do not gather by themselves. Instead, the ranks of the last stage that have updated a metric and are
not banned compute its value here, and broadcast it to all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torchmetrics import Metric, MetricCollection

from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.batch_metrics import alone
from lightning_sentinel.pipeline.data.feeding import gather_numbers
from lightning_sentinel.pipeline.messages.tensor_trees import broadcast_tree
from lightning_sentinel.pipeline.processes.wire import Wire, is_connected, world
from lightning_sentinel.pipeline.results.absent_metrics import NothingHere
from lightning_sentinel.pipeline.results.telling import NoData, decoded, encoded
from lightning_sentinel.pipeline.stages.partition import layer_names

__all__ = ["SharedMetrics"]


class SharedMetrics(L.Callback):
    """Computes the metrics that steps updated in an epoch, before the module's epoch-end hook and when Lightning asks for them.

    Args:
        mesh: all workers.
        banned: returns the workers whose values do not count.
        waiting: a context entered around waits for other ranks.
        timeout: how long the ranks that compute a metric wait for each other.
    """

    def __init__(
        self,
        mesh: Mesh,
        banned: Callable[[], Collection[Worker]],
        waiting: Callable[[], AbstractContextManager[Any]],
        timeout: timedelta,
    ) -> None:
        self._mesh = mesh
        self._banned = banned
        self._waiting = waiting
        self._timeout = timeout
        self._before: dict[str, dict[str, int]] = {}
        self._known: set[str] = set()
        """Metrics whose values all ranks have, until the next batch."""
        self._said: set[str] = set()
        self._absent: set[str] = set()
        """Metrics that were computed on a rank where no step runs, and warned about."""
        self._latest = ""
        self._lent: dict[str, list[Metric]] = {}
        """Metrics that hold a value received from other ranks, by the kind of epoch (train, validate, ...) that it is of."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        worker = self._mesh.worker(world().rank)
        for name, part in pl_module.named_modules():
            if isinstance(part, Metric):
                part.distributed_available_fn = alone
                if worker.stage < self._mesh.stages - 1:
                    part.distributed_available_fn = NothingHere(name, part, worker.stage, self._before, self._absent)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._before.pop(str(trainer.state.stage), None)

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Record update counts before the first batch, after the hooks at the epoch's start, which run on all ranks."""
        self._known.clear()
        stage = self._latest = str(trainer.state.stage)
        if stage not in self._before:
            for metric in self._lent.pop(stage, ()):
                if metric._computed is not None and metric.update_count == 1:
                    # The received value is of the previous epoch.
                    metric._computed = None
                    metric._update_count = 0
            self._before[stage] = {name: metric.update_count for name, metric in _metrics_of(pl_module).items()}

    def _share(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        before = self._before.pop(str(trainer.state.stage), {})
        metrics = {name: one for name, one in _metrics_of(pl_module).items() if name in before and name not in self._known}
        updated = [metric.update_called and metric.update_count != before[name] for name, metric in metrics.items()]
        for name, failure in self._exchange(metrics, updated).items():
            if name not in self._said:
                # No error, because the user may never ask for the value.
                self._said.add(name)
                rank_zero_warn(f"self.{name} could not be computed at the end of the epoch: {failure}.")

    def value_of(self, name: str, metric: Metric) -> Any:
        """A metric's value over all replicas. To be called by all ranks; at the end of an epoch in any order."""
        failure = None if name in self._known else self._exchange({name: metric}, [metric.update_called]).get(name)
        if failure is not None:
            raise PipelineModelError(f"self.{name}, a {type(metric).__name__} that was logged, could not be computed: {failure}.")
        return metric.compute()

    def _exchange(self, metrics: Mapping[str, Metric], updated: Sequence[bool]) -> dict[str, str]:
        """Give all ranks the values of metrics that steps updated. Returns, for each that could not be computed, the reason."""
        if not metrics:
            return {}
        rank = world().rank
        last = self._mesh.stages - 1
        banned = self._banned()
        with self._waiting():
            everyone = gather_numbers([int(one) for one in updated])
            healthy = [other for other in self._mesh.stage_ranks(last) if self._mesh.worker(other) not in banned]
            ran = {name: tuple(r for r in healthy if everyone[r][number]) for number, name in enumerate(metrics)}
            # Only updated metrics: a validation within a training epoch must leave the training metrics for that epoch's end.
            self._known.update(name for name, ranks in ran.items() if ranks)
            said = {}
            for name, ranks in ran.items():
                wire = world().among(ranks, self._timeout) if len(ranks) > 1 else None
                if rank in ranks:
                    said[name] = _computed(metrics[name], wire)
            told: dict[str, list[Any]] = {}
            for source in sorted({ranks[0] for ranks in ran.values() if ranks}):
                told |= broadcast_tree({name: one for name, one in said.items() if ran[name][0] == source}, source)
        for name, (value, failure) in told.items():
            if not failure and rank not in ran[name]:
                metric = metrics[name]
                if not metric.update_called:
                    self._lent.setdefault(self._latest, []).append(metric)
                metric._computed = decoded(value, metric.device)
                metric._update_count = max(1, metric.update_count)
        return {name: failure for name, (_, failure) in told.items() if failure}

    on_train_epoch_start = on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _begin
    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _look  # type: ignore[assignment]
    on_train_epoch_end = on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = _share


def _metrics_of(module: L.LightningModule) -> dict[str, Metric]:
    """Metrics by name, except those inside other metrics or in layers of the pipeline."""
    found: dict[str, Metric] = {}
    apart = layer_names(module)
    for part in module.modules():
        if isinstance(part, MetricCollection):
            # Metrics in a compute group share another's states, and get them when the collection's values are read.
            list(part.values(copy_state=False))
    for name, part in module.named_modules():
        if isinstance(part, Metric) and not any(name.startswith(f"{other}.") for other in (*found, *apart)):
            found[name] = part
    return found


def _computed(metric: Metric, wire: Wire | None) -> list[Any]:
    """The encoded value, and an empty text or the reason why there is no value."""
    parts = [part for part in metric.modules() if isinstance(part, Metric)]
    before = [(part.process_group, part.distributed_available_fn) for part in parts]
    for part in parts:
        # Drop the cached value: one rank may have one and another none, and then not all would gather.
        part._computed = None
        part.process_group = part.process_group or (None if wire is None else wire.group)
        part.distributed_available_fn = is_connected if part.process_group is not None else alone
    try:
        metric._computed = metric.compute()
        return [encoded(metric._computed), ""]
    except NoData as error:
        return [None, f"its value holds {error}"]
    except Exception as error:
        return [None, f"{type(error).__name__}: {error}"]
    finally:
        for part, (own, available) in zip(parts, before):
            part.process_group = own
            part.distributed_available_fn = available
