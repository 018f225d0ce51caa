"""Sends what the user's steps keep in the module to the ranks where the steps did not run.

A common way to collect results over an epoch is a list: ``validation_step`` appends to ``self.losses``, and
``on_validation_epoch_end`` reads it. The whole step runs on the last stage only, which rank zero serves; the hook runs on all
ranks, and what they log or decide has to be the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.messages.tensor_trees import receive_tree, send_tree
from lightning_sentinel.pipeline.results.changing import Change, Picture, changes, picture
from lightning_sentinel.pipeline.results.telling import NoData, decoded, encoded
from lightning_sentinel.pipeline.stages.partition import layer_names
from lightning_sentinel.pipeline.step_attributes import Holder, kept_by, put

__all__ = ["SharedStepState"]


class SharedStepState(L.Callback):
    """Sends what changed on the last stage in an epoch to the other ranks of its pipeline, before the epoch-end hook.

    It sends data (:mod:`~lightning_sentinel.pipeline.step_attributes`) in attributes and buffers that exist on those ranks too.
    Values that such a rank has changed itself, in a hook or at the beginning of a step, are left alone there.

    Args:
        mesh: all workers.
        banned: returns the workers that do not send.
        waiting: a context entered around waits for other ranks.
    """

    def __init__(
        self, mesh: Mesh, banned: Callable[[], Collection[Worker]], waiting: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._mesh = mesh
        self._banned = banned
        self._waiting = waiting
        self._before: dict[str, dict[str, Picture]] = {}
        self._own: dict[str, list[Change]] = {}
        """This rank's own changes in an unfinished epoch that its snapshots do not show any more."""
        self._said: set[str] = set()

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._before.pop(str(trainer.state.stage), None)
        self._own.pop(str(trainer.state.stage), None)

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Take snapshots before the first batch, after the hooks at the epoch's start, which run on all ranks."""
        stage = str(trainer.state.stage)
        if stage not in self._before:
            self._before[stage] = {name: picture(holder.value) for name, holder in _step_attributes(pl_module).items()}

    def _share(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        before = self._before.pop(str(trainer.state.stage), None)
        kept = _step_attributes(pl_module)
        changed: list[Change] = []
        if before is not None:
            for name, holder in kept.items():
                changed += changes(name, before.get(name), holder.value)
        changed += self._own.pop(str(trainer.state.stage), [])
        worker = self._mesh.worker(trainer.global_rank)
        source = self._source(worker.replica)
        with self._waiting():
            for replica in range(self._mesh.replicas):
                self._send(self._source(replica), replica, trainer.global_rank, changed)
            told = _read(receive_tree(source), source, pl_module.device) if trainer.global_rank != source else []
        touched = {change.name for change in told} & kept.keys()
        # For an enclosing epoch, such as training around validation, values set here must not count as this rank's own changes.
        for stage, around in self._before.items():
            for name in touched:
                self._own.setdefault(stage, []).extend(changes(name, around.get(name), kept[name].value))
        for name, keys, value in told:
            if any(change.overlaps(name, keys) for change in changed) or (name in kept and put(kept[name], keys, value)):
                continue
            if worker == Worker(0, 0):  # one of the ranks where the value cannot be set
                there = f"a {type(kept[name].value).__name__}" if name in kept else "nothing"
                self._say(name, f"there is {there} of that name where steps do not run", warnings.warn)
        for around in self._before.values():
            around.update({name: picture(kept[name].value) for name in touched})

    def _source(self, replica: int) -> int:
        """The rank of the last stage that sends its changes to the other ranks of a pipeline."""
        last = self._mesh.stages - 1
        banned = self._banned()
        honest = [worker for worker in self._mesh.workers if worker.stage == last and worker not in banned]
        own = Worker(last, replica)
        return self._mesh.rank(own if own in honest else honest[0])

    def _send(self, source: int, replica: int, rank: int, changed: list[Change]) -> None:
        others = [other for other in self._mesh.pipeline_ranks(replica) if other != source]
        if rank != source or not others:
            return
        sent = []
        for name, keys, value in changed:
            try:
                sent.append([name, [encoded(key) for key in keys], encoded(value)])
            except NoData as error:
                self._say(name, f"it holds {error}", rank_zero_warn)
        for other in others:
            send_tree(sent, other)

    def _say(self, name: str, why: str, warn: Callable[[str], Any]) -> None:
        if name not in self._said:
            self._said.add(name)
            warn(
                f"self.{name} has changed in an epoch. If a step has changed it, which runs whole on the last stage only, then rank"
                f" zero has it, and other ranks of the pipeline do not get it: {why}. Where they need it, keep numbers, text,"
                " tensors or NumPy arrays, in lists, dicts, tuples or sets that __init__ makes, or a torchmetrics object."
            )

    on_train_epoch_start = on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _begin
    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _look  # type: ignore[assignment]
    on_train_epoch_end = on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = _share


def _read(sent: Any, source: int, device: torch.device) -> list[Change]:
    """Decode the changes that another rank sent."""
    try:
        told = [Change(str(name), tuple(map(decoded, keys)), decoded(value, device)) for name, keys, value in sent]
        hash(tuple(change.keys for change in told))
    except (TypeError, ValueError, MalformedMessageError) as error:
        raise MalformedMessageError(f"Rank {source} does not tell what its steps keep. {error}", rank=source) from error
    return told


def _step_attributes(module: L.LightningModule) -> dict[str, Holder]:
    return kept_by(module, layer_names(module))
