"""What the user's steps keep in attributes of the module, brought to the ranks where the steps did not run.

A common way to work on a whole epoch is a list: ``validation_step`` appends to ``self.losses``, and ``on_validation_epoch_end``
looks at it. The step runs to its end on the last stage only, the hook runs on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import lightning as L
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.messages.parcels import receive_parcel, send_parcel
from lightning_sentinel.pipeline.results.joining import plain

__all__ = ["SharedStepState"]

_KINDS = (list, dict, int, float, str, Tensor)


class SharedStepState(L.Callback):
    """Brings what changed on the last stage in an epoch to the other ranks of its pipeline, before the epoch's end is told.

    That are public attributes of the module that are lists, dicts, numbers, text or tensors, and hold nothing else. On a rank where
    an attribute has changed as well it is left alone.

    Args:
        mesh: all workers.
        banned: those whose word does not count.
        waiting: entered around waits for others.
    """

    def __init__(
        self, mesh: Mesh, banned: Callable[[], Collection[Worker]], waiting: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._mesh, self._banned, self._waiting = mesh, banned, waiting
        self._before: dict[str, dict[str, Any]] = {}

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._before[str(trainer.state.stage)] = {name: _copied(value) for name, value in _attributes(pl_module).items()}

    def _share(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        before, now = self._before.pop(str(trainer.state.stage), {}), _attributes(pl_module)
        changed = {name for name, value in now.items() if name not in before or not _same(before[name], value)}
        with self._waiting():
            found = self._exchanged(
                {name: plain(now[name]) for name in sorted(changed) if _is_plain(now[name])}, trainer.global_rank
            )
        for name, value in found.items():
            if name not in changed:
                _put(pl_module, name, move_data_to_device(value, pl_module.device))

    def _exchanged(self, changed: dict[str, Any], rank: int) -> dict[str, Any]:
        last, banned = self._mesh.stages - 1, self._banned()
        honest = [worker for worker in self._mesh.workers if worker.stage == last and worker not in banned]
        found: dict[str, Any] = {}
        for replica in range(self._mesh.replicas):
            own = Worker(last, replica)
            source = self._mesh.rank(own if own in honest else honest[0])
            others = [other for other in self._mesh.pipeline_ranks(replica) if other != source]
            if rank == source:
                for other in others:
                    send_parcel(changed, other)
            elif rank in others:
                found = receive_parcel(source)
        return found

    on_train_epoch_start = on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _begin
    on_train_epoch_end = on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = _share


def _attributes(module: L.LightningModule) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and isinstance(value, _KINDS)}


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict)) else value


def _same(before: Any, now: Any) -> bool:
    if type(before) is not type(now):
        return False
    if isinstance(now, dict):
        return before.keys() == now.keys() and all(before[key] is now[key] for key in now)
    if isinstance(now, list):
        return len(before) == len(now) and all(one is other for one, other in zip(before, now))
    return before is now if isinstance(now, Tensor) else bool(before == now)


def _is_plain(value: Any) -> bool:
    """Whether nothing is lost on the way."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and _is_plain(entry) for key, entry in value.items())
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def _put(module: L.LightningModule, name: str, value: Any) -> None:
    """Into the list or dict that is there, because others may hold it too."""
    there = vars(module).get(name)
    if isinstance(there, list) and isinstance(value, list):
        there[:] = value
    elif isinstance(there, dict) and isinstance(value, dict):
        there.clear()
        there.update(value)
    else:
        vars(module)[name] = value
