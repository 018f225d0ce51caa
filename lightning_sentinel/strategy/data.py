"""The part of the strategy that is about data: who reads it, and who is given what came of it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning as L
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities.data import extract_batch_size
from typing_extensions import override

from lightning_sentinel.config import Response, Verification
from lightning_sentinel.mesh import Worker
from lightning_sentinel.pipeline.data.feeding import Feed, gather_numbers, is_even, seed_workers
from lightning_sentinel.pipeline.data.micro_batches import BatchSizes
from lightning_sentinel.pipeline.face import Engine
from lightning_sentinel.pipeline.results.all_predictions import complete_predictions
from lightning_sentinel.pipeline.results.step_state import SharedStepState
from lightning_sentinel.strategy.checkpoints import StageCheckpoints
from lightning_sentinel.strategy.listening import listened_to

__all__ = ["PipelineData"]


class PipelineData(StageCheckpoints):
    """Feeds the pipelines, and brings to all ranks what steps return and keep."""

    _uneven: bool = False
    """Whether replicas may have batches of different sizes; the same on all ranks."""
    _listened_to: frozenset[str] = frozenset()
    _micro_batches: int
    _verification: Verification | None
    _response: Response

    @property
    @abstractmethod
    def worker(self) -> Worker:
        """The worker that this process is."""

    @property
    @abstractmethod
    def _trainer(self) -> L.Trainer: ...

    @property
    @abstractmethod
    def _running_engine(self) -> Engine: ...

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """All stages of a pipeline see the same samples; a virtual mesh takes them all."""
        if self._virtual:
            return {"num_replicas": 1, "rank": 0}
        return {"num_replicas": self.mesh.replicas, "rank": self.worker.replica}

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Only the ends of a pipeline read data, and all replicas stop together."""
        dataloader = super().process_dataloader(dataloader)
        if self._virtual:
            return dataloader
        trainer, mesh = self._trainer, self.mesh
        seed_workers(dataloader, self.worker.replica)
        with self._watching():
            even, lengths = is_even(dataloader)
        self._uneven |= not even
        reads = mesh.stages < _STAGES_WITH_A_MIDDLE or self._samples_are_handed_out
        if even and reads:
            return dataloader
        length = None if min(lengths) < 0 else min(lengths) if trainer.training else max(lengths)

        def training() -> bool:
            return bool(trainer.training)

        return Feed(dataloader, mesh, self.worker, reads, even, length, training, self.root_device, self._watching)

    @property
    def _samples_are_handed_out(self) -> bool:
        """Whether any worker may be asked for samples: by who takes over after a ban, or by an auditor."""
        bans = self._response.ban_after is not None or self._response.audit_rate is not None or bool(self._response.banned)
        return self._verification is not None and (bans or self._response.ledger is not None)

    def _sizes(self, arguments: tuple[Any, ...]) -> BatchSizes:
        """How many samples each replica has, which all ranks are to see alike."""
        samples, replicas = extract_batch_size(arguments[0]), self.mesh.replicas
        everyone = [-(-samples // replicas) if self._virtual else samples] * replicas
        if self._uneven:
            # Of each replica what its first stage says.
            told = gather_numbers([samples])
            everyone = [told[rank][0] for rank in self.mesh.stage_ranks(0)]
        return BatchSizes.of(everyone, self._micro_batches)

    # ------------------------------------------------------------------------------------------------- what came of the data

    def _agree_on_listeners(self) -> None:
        # All take part in a broadcast that one of them wants.
        wanted = listened_to(self._trainer)
        steps = ("training_step", "validation_step", "test_step")
        self._listened_to = frozenset(step for step in steps if self.reduce_boolean_decision(step in wanted, all=False))
        self._running_engine.keeps_results = "training_step" in self._listened_to

    def _returned(self, step: str) -> Any:
        """What the user's step returned for this replica's batch, if somebody looks at it."""
        if step not in self._listened_to:
            return None
        return move_data_to_device(self._running_engine.returned(), self.root_device)

    def _share_step_state(self) -> None:
        callbacks: list[L.Callback] = self._trainer.callbacks  # type: ignore[attr-defined]
        if not self._virtual and not any(isinstance(callback, SharedStepState) for callback in callbacks):
            # First, so that the hooks of all others see it.
            callbacks.insert(0, SharedStepState(self.mesh, lambda: self.ledger.banned, self._watching))

    @override
    def on_predict_end(self) -> None:
        if not self._virtual:
            with self._at_work():
                complete_predictions(self._trainer, self.mesh, self.ledger.banned)


_STAGES_WITH_A_MIDDLE = 3
