"""The part of the strategy that handles data: which ranks read batches, and which ranks get the results of steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torchmetrics import Metric
from typing_extensions import override

from lightning_sentinel.pipeline.checkpoints.resumption import data_generators, set_data_generators
from lightning_sentinel.pipeline.data.agreeing import split_alike
from lightning_sentinel.pipeline.data.batch_splitting import BatchSplitter, SplitBatch
from lightning_sentinel.pipeline.data.feeding import Feed, is_even, refuse_other_replicas, seed_workers, source_of
from lightning_sentinel.pipeline.data.reading import Source
from lightning_sentinel.pipeline.logs import LogReplay
from lightning_sentinel.pipeline.messages.containers import leaves_of
from lightning_sentinel.pipeline.messages.tensor_trees import broadcast_tree
from lightning_sentinel.pipeline.results.all_predictions import complete_predictions
from lightning_sentinel.pipeline.results.metrics import SharedMetrics
from lightning_sentinel.pipeline.results.step_state import SharedStepState
from lightning_sentinel.pipeline.step_results import StepOutcome
from lightning_sentinel.pipeline.steps import StepRunner, fetches
from lightning_sentinel.strategy.checkpoints import StageCheckpoints
from lightning_sentinel.strategy.listening import listened_to
from lightning_sentinel.strategy.signals import DeferredSignals

__all__ = ["PipelineData"]


class PipelineData(StageCheckpoints):
    """Feeds the pipelines, and sends to all ranks what steps return and keep."""

    _uneven: bool = False
    """Whether replicas may have batches of different sizes; the same on all ranks."""
    _listened_to: frozenset[str] = frozenset()
    _splitter: BatchSplitter
    _sources: dict[tuple[str, int], Source]
    """What is known of each loader, by step and number."""
    _compared: set[tuple[str, int]]
    """Loaders, by step and number, for which the batches of both ends of a pipeline have been compared in this epoch."""
    _loaded: Any = None
    """The current batch on the host, before it was moved to the device; ``None`` if it was not moved."""
    _signals: DeferredSignals
    _shared_metrics: SharedMetrics | None = None
    _replay: LogReplay
    _steps: StepRunner | None = None

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """All stages of a pipeline see the same samples; a virtual mesh takes all samples."""
        if self._virtual:
            return {"num_replicas": 1, "rank": 0}
        return {"num_replicas": self.mesh.replicas, "rank": self.worker.replica}

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Only the ends of a pipeline read data, and all replicas stop together."""
        dataloader = super().process_dataloader(dataloader)
        with self._watching():
            refuse_other_replicas(dataloader, **self.distributed_sampler_kwargs, gathers=not self._virtual)
        if self._virtual:
            return dataloader
        trainer = self._trainer
        mesh = self.mesh
        seed_workers(dataloader, self.worker.replica)
        with self._watching():
            even, lengths = is_even(dataloader)
        reads = self._all_read
        splitter = self._splitter
        even = even and not splitter.by_module
        self._uneven |= not even
        if even and reads:
            return dataloader
        length = None if min(lengths) < 0 else min(lengths) if trainer.training else max(lengths)

        def training() -> bool:
            return bool(trainer.training)

        return Feed(dataloader, mesh, self.worker, splitter, reads, even, length, training, self.root_device, self._watching)

    @property
    def _samples_are_handed_out(self) -> bool:
        """Whether any worker may have to send samples: to a worker that takes over after a ban, or to an auditor."""
        response = self.response
        mesh = self.mesh
        found = mesh.replicas > 1 and (response.ban_after is not None or response.audit_rate_of(mesh) is not None)
        return self.verification is not None and (found or bool(response.banned) or response.ledger is not None)

    @property
    def _all_read(self) -> bool:
        """Whether workers in the middle of a pipeline read data too."""
        return self.mesh.stages < _STAGES_WITH_A_MIDDLE or self._samples_are_handed_out

    @property
    def _reads(self) -> bool:
        """Whether this rank reads data."""
        return self._virtual or self._all_read or self.worker.stage in (0, self.mesh.stages - 1)

    def _learn_how_to_deal(self) -> None:
        """Learn how the module splits batches; to be called when a run begins, before it asks for its data."""
        assert self.lightning_module is not None
        self._splitter = BatchSplitter(self.lightning_module)
        self._uneven = False
        self._sources = {}
        self._compared = set()

    def _share_generators(self) -> None:
        """Give all ranks rank zero's states of the random generators; a collective."""
        if self._virtual:
            return
        cuda = self.root_device.type == "cuda"
        mine = data_generators() | ({"cuda": torch.cuda.get_rng_state(self.root_device)} if cuda else {})
        with self._watching():
            states = broadcast_tree(mine, 0)
        set_data_generators(states)
        if cuda:
            torch.cuda.set_rng_state(states["cuda"], self.root_device)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        # A batch on the host can be read without waiting for a device.
        on_host = self.root_device.type != "cpu" and not any(getattr(leaf, "device", _HOST) != _HOST for leaf in leaves_of(batch))
        self._loaded = batch if on_host else None
        return super().batch_to_device(batch, device, dataloader_idx)

    @property
    def _comes_as_loaded(self) -> bool:
        """Whether the batch on the device has the values that it had on the host."""
        module = self.lightning_module
        assert module is not None
        changing = "transfer_batch_to_device", "on_after_batch_transfer"
        # Hooks of a data module replace the module's.
        sources = (module, L.LightningModule), (getattr(self._trainer, "datamodule", None), L.LightningDataModule)
        changed = any(is_overridden(hook, one, kind) for hook in changing for one, kind in sources if one is not None)
        return self._loaded is not None and not changed

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._compare_again("training_step")

    @override
    def on_validation_start(self) -> None:
        self._compare_again("validation_step")

    def _compare_again(self, step: str) -> None:
        """Compare both ends anew in the next batch of each of the step's loaders, which is the first of an epoch."""
        self._compared = {key for key in self._compared if key[0] != step}

    def _split(self, step: str, arguments: tuple[Any, ...]) -> SplitBatch:
        """This replica's batch in micro-batches, and the sizes of all replicas' micro-batches, the same on all ranks."""
        key = (step, arguments[2] if len(arguments) > 2 else 0)
        if key not in self._sources:
            self._sources[key] = self._source_of(step, arguments[2] if len(arguments) > 2 else None)
        first = key not in self._compared
        self._compared.add(key)
        batch = arguments[0]
        source = self._sources[key]
        waits = first and not self._comes_as_loaded
        loaded, self._loaded = self._loaded, None
        if self._virtual:
            split = self._splitter.undealt if self._is_undealt(step) else self._splitter.dealt_to
            return split(batch, source, self.mesh.replicas, self.micro_batches)
        # A rank that does not read has a placeholder of zeros, which shows only the size of the batch.
        splitter = self._splitter if self._reads else BatchSplitter(None)
        return split_alike(
            batch,
            loaded,
            partial(splitter.whole, source=source),
            self.micro_batches,
            self.mesh,
            self.worker,
            reads=self._reads,
            asks=first or self._uneven,
            waits=waits,
            travels=first and self._samples_are_handed_out and self.mesh.replicas > 1,
            by_module=self._splitter.by_module,
            banned=self.ledger.banned,
        )

    def _is_undealt(self, step: str) -> bool:
        """Whether a step gets the whole batch, as each evaluation step on a virtual mesh does."""
        return self._virtual and (step != "training_step" or self.mesh.replicas == self.micro_batches == 1)

    def _source_of(self, step: str, number: int | None) -> Source:
        """What is known of the loader of a step's batches; ``number`` selects it where loaders are read one after the other."""
        loaders = getattr(self._trainer, _LOADERS[step])
        if step == "training_step":
            return source_of(loaders)
        one_by_one = CombinedLoader(loaders, "sequential").flattened
        if number is None and len(one_by_one) > 1:
            return source_of(loaders)
        return source_of(one_by_one[number or 0])

    def _arguments(self, step: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of a step, the batch first. A step that takes ``dataloader_iter`` gets a new one for each micro-batch."""
        assert self.lightning_module is not None
        arguments = (*args, *kwargs.values())
        if not fetches(self.lightning_module, step):
            return arguments
        assert self._steps is not None
        self._steps.more = arguments[0] if self._is_undealt(step) else None
        return tuple(next(arguments[0]))

    # ------------------------------------------------------------------------------------------------------ results of steps

    def _agree_on_listeners(self) -> None:
        # All ranks take part in a broadcast that one of them wants.
        wanted = listened_to(self._trainer)
        steps = ("training_step", "validation_step", "test_step")
        self._listened_to = frozenset(step for step in steps if self.reduce_boolean_decision(step in wanted, all=False))
        self._running_engine.keeps_results = "training_step" in self._listened_to

    def _returned(self, step: str) -> Any:
        """What the user's step returned for this replica's batch, if a hook of any rank receives it."""
        if step not in self._listened_to:
            return None
        return move_data_to_device(self._running_engine.returned(), self.root_device)

    def _share_step_state(self) -> None:
        if self._virtual:
            return
        callbacks: list[L.Callback] = self._trainer.callbacks  # type: ignore[attr-defined]
        shared = next((callback for callback in callbacks if isinstance(callback, SharedMetrics)), None)
        if shared is None:
            shared = SharedMetrics(self.mesh, lambda: self.ledger.banned, self._watching, self.timeout)
            # First, so that the hooks of all other callbacks see the shared state.
            callbacks[:0] = [SharedStepState(self.mesh, lambda: self.ledger.banned, self._watching), shared]
        self._shared_metrics = shared

    def _take_in(self, outcome: StepOutcome) -> None:
        """Do on this rank what the step did on the rank where it ran: log, hand on process signals, and stop the training."""
        self._replay(outcome.schema, outcome.logged)
        self._signals.heard = outcome.signals
        if outcome.stops:
            self._trainer.should_stop = True

    def _value_of(self, name: str, metric: Metric) -> Any:
        """The value of a logged metric over an epoch."""
        return metric.compute() if self._shared_metrics is None else self._shared_metrics.value_of(name, metric)

    @override
    def on_train_end(self) -> None:
        self._share_generators()

    @override
    def on_test_end(self) -> None:
        self._share_generators()

    @override
    def on_validation_end(self) -> None:
        if self._trainer.state.fn == TrainerFn.VALIDATING:
            self._share_generators()

    @override
    def on_predict_end(self) -> None:
        self._share_generators()
        if not self._virtual:
            with self._at_work():
                complete_predictions(self._trainer, self.mesh, self.ledger.banned)


_HOST = torch.device("cpu")
_STAGES_WITH_A_MIDDLE = 3
_LOADERS = {
    "training_step": "train_dataloader",
    "validation_step": "val_dataloaders",
    "test_step": "test_dataloaders",
    "predict_step": "predict_dataloaders",
}
