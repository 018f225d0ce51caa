"""Feeds the pipelines: which ranks read data, and how each step's batch is split into micro-batches."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_sentinel.pipeline.checkpoints.resumption import Unopened
from lightning_sentinel.pipeline.data.agreeing import split_alike
from lightning_sentinel.pipeline.data.batch_splitting import BatchSplitter, SplitBatch
from lightning_sentinel.pipeline.data.feeding import Feed, ReadingProcess, is_even, refuse_other_replicas, seed_workers, source_of
from lightning_sentinel.pipeline.data.reading import Source
from lightning_sentinel.pipeline.messages.containers import leaves_of
from lightning_sentinel.pipeline.steps import StepRunner, fetches
from lightning_sentinel.strategy.run_state import RunState

__all__ = ["PipelineData", "loader_number", "sampler_arguments"]


def loader_number(arguments: tuple[Any, ...]) -> int | None:
    """The number of the data loader in the arguments of a step; ``None`` if there is only one."""
    return arguments[2] if len(arguments) > 2 else None


def sampler_arguments(run: RunState) -> dict[str, Any]:
    """The arguments of a distributed sampler: all stages of a pipeline see the same samples; a virtual mesh takes all samples."""
    if run.settings.virtual:
        return {"num_replicas": 1, "rank": 0}
    return {"num_replicas": run.mesh.replicas, "rank": run.processes.worker.replica}


class PipelineData:
    """The data of one run.

    Args:
        run: the state of the run.
        trainer: the Trainer of the run.
        steps: runs the user's steps.
    """

    def __init__(self, run: RunState, trainer: L.Trainer, steps: StepRunner) -> None:
        self._run = run
        self._trainer = trainer
        self.steps = steps
        self._virtual = run.settings.virtual
        self._splitter = BatchSplitter(steps.module)
        self._uneven = False
        """Whether replicas may have batches of different sizes; the same on all ranks."""
        self._sources: dict[tuple[str, int], Source] = {}
        """What is known of each loader, by step and number."""
        self._compared: set[tuple[str, int]] = set()
        """Loaders, by step and number, for which the batches of both ends of a pipeline have been compared in this epoch."""
        self._loaded: Any = None
        """The current batch on the host, before it was moved to the device; ``None`` if it was not moved."""

    # -------------------------------------------------------------------------------------------------------------- loaders

    def process(self, loader: object, resumes: bool) -> object:
        """Wrap a loader: only the ends of a pipeline read data, and all replicas stop together.

        Args:
            loader: the user's loader.
            resumes: whether the run's position in the data is yet to be restored; till then the loader stays unopened.
        """
        if self._trainer.training:
            self._run.position.begin()
        ready = self._fed(loader)
        return Unopened(ready) if resumes and self._trainer.training and not isinstance(ready, _Stateful) else ready

    def _fed(self, loader: object) -> object:
        processes = self._run.processes
        with processes.watching():
            refuse_other_replicas(loader, **sampler_arguments(self._run), gathers=not self._virtual)
        if self._virtual:
            return loader
        trainer = self._trainer
        seed_workers(loader, processes.worker.replica)
        with processes.watching():
            even, lengths = is_even(loader)
        reads = self._all_read
        splitter = self._splitter
        even = even and not splitter.by_module
        self._uneven |= not even
        if even and reads:
            return loader
        length = None if min(lengths) < 0 else min(lengths) if trainer.training else max(lengths)

        def training() -> bool:
            return bool(trainer.training)

        process = ReadingProcess(processes.mesh, processes.worker, processes.device, processes.watching)
        return Feed(loader, process, splitter, reads, even, length, training)

    @property
    def _samples_are_handed_out(self) -> bool:
        """Whether any worker may have to send samples: to a worker that takes over after a ban, or to an auditor."""
        settings = self._run.settings
        response = settings.response
        mesh = self._run.mesh
        found = mesh.replicas > 1 and (response.ban_after is not None or response.audit_rate_of(mesh) is not None)
        return settings.verification is not None and (found or bool(response.banned) or response.ledger is not None)

    @property
    def _all_read(self) -> bool:
        """Whether workers in the middle of a pipeline read data too."""
        return self._run.mesh.stages < _STAGES_WITH_A_MIDDLE or self._samples_are_handed_out

    @property
    def _reads(self) -> bool:
        """Whether this rank reads data."""
        return self._virtual or self._all_read or self._run.processes.worker.stage in (0, self._run.mesh.stages - 1)

    # -------------------------------------------------------------------------------------------------------------- batches

    def keep_loaded(self, batch: Any) -> None:
        """Keep a batch that is about to be moved to a device: on the host it can be read without waiting for the device."""
        on_host = not any(getattr(leaf, "device", _HOST) != _HOST for leaf in leaves_of(batch))
        self._loaded = batch if on_host and self._run.processes.device.type != "cpu" else None

    @property
    def _comes_as_loaded(self) -> bool:
        """Whether the batch on the device has the values that it had on the host."""
        changing = "transfer_batch_to_device", "on_after_batch_transfer"
        # Hooks of a data module replace the module's.
        datamodule = getattr(self._trainer, "datamodule", None)
        sources = (self.steps.module, L.LightningModule), (datamodule, L.LightningDataModule)
        changed = any(is_overridden(hook, one, kind) for hook in changing for one, kind in sources if one is not None)
        return self._loaded is not None and not changed

    def compare_again(self, step: str) -> None:
        """Compare both ends anew in the next batch of each of the step's loaders, which is the first of an epoch."""
        self._compared = {key for key in self._compared if key[0] != step}

    def split(self, step: str, arguments: tuple[Any, ...]) -> SplitBatch:
        """This replica's batch in micro-batches, and the sizes of all replicas' micro-batches, the same on all ranks."""
        number = loader_number(arguments)
        key = (step, number or 0)
        if key not in self._sources:
            self._sources[key] = self._source_of(step, number)
        first = key not in self._compared
        self._compared.add(key)
        batch = arguments[0]
        source = self._sources[key]
        waits = first and not self._comes_as_loaded
        loaded = self._loaded
        self._loaded = None
        mesh = self._run.mesh
        micro_batches = self._run.settings.micro_batches
        if self._virtual:
            split = self._splitter.undealt if self._is_undealt(step) else self._splitter.dealt_to
            return split(batch, source, mesh.replicas, micro_batches)
        # A rank that does not read has a placeholder of zeros, which shows only the size of the batch.
        splitter = self._splitter if self._reads else BatchSplitter(None)
        return split_alike(
            batch,
            loaded,
            partial(splitter.whole, source=source),
            micro_batches,
            mesh,
            self._run.processes.worker,
            reads=self._reads,
            asks=first or self._uneven,
            waits=waits,
            travels=first and self._samples_are_handed_out and mesh.replicas > 1,
            by_module=self._splitter.by_module,
            banned=self._run.ledger.banned,
        )

    def _is_undealt(self, step: str) -> bool:
        """Whether a step gets the whole batch, as each evaluation step on a virtual mesh does."""
        return self._virtual and (step != "training_step" or self._run.mesh.replicas == self._run.settings.micro_batches == 1)

    def _source_of(self, step: str, number: int | None) -> Source:
        """What is known of the loader of a step's batches; ``number`` selects it where loaders are read one after the other."""
        loaders = getattr(self._trainer, _LOADERS[step])
        if step == "training_step":
            return source_of(loaders)
        one_by_one = CombinedLoader(loaders, "sequential").flattened
        if number is None and len(one_by_one) > 1:
            return source_of(loaders)
        return source_of(one_by_one[number or 0])

    def arguments(self, step: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of a step, the batch first. A step that takes ``dataloader_iter`` gets a new one for each micro-batch."""
        arguments = (*args, *kwargs.values())
        if not fetches(self.steps.module, step):
            return arguments
        self.steps.more = arguments[0] if self._is_undealt(step) else None
        return tuple(next(arguments[0]))


_HOST = torch.device("cpu")
_STAGES_WITH_A_MIDDLE = 3
_LOADERS = {
    "training_step": "train_dataloader",
    "validation_step": "val_dataloaders",
    "test_step": "test_dataloaders",
    "predict_step": "predict_dataloaders",
}
