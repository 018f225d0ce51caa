"""The part of the strategy that steps the optimizer: it reduces the gradients, and clips those of all stages together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.gradients.clean_fractions import CleanFractionTally
from lightning_sentinel.pipeline.gradients.stash import scale_gradients
from lightning_sentinel.strategy.data import PipelineData

__all__ = ["OptimizerSteps"]


class OptimizerSteps(PipelineData):
    """Reduces gradients, calls Lightning's hooks in their order, and steps the optimizer."""

    _clean_fractions: CleanFractionTally
    _has_gradients: bool = False
    """Whether any batch since the last optimizer step has made gradients; the same on all ranks."""
    _has_been_left: bool = False
    """Whether the user was warned of a step that left the weights as they are."""

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: L.LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        if self._by_hand:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._virtual:
            return self._running_engine.apply_gradients(self._evaluating(optimizer, closure), **kwargs)
        result = closure()
        if self._make_ready(optimizer):
            with self._in_step():
                self._running_engine.apply_gradients()
        return result

    def _evaluating(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure with which an optimizer evaluates the batch, as often as it likes."""
        evaluations = 0

        def evaluate() -> Any:
            nonlocal evaluations
            if evaluations and self._trainer.accumulate_grad_batches == 1:
                # The engine adds to the gradients that are there, and Lightning's closure zeroes them too late.
                self._running_engine.discard_gradients()
            elif evaluations:
                # Lightning's closure adds to the sum over batches, which by now is a mean over replicas: make it a sum again.
                scale_gradients([one for group in optimizer.param_groups for one in group["params"]], self.mesh.replicas)
            evaluations += 1
            result = closure()
            self._make_ready(optimizer)
            return result

        return evaluate

    def _make_ready(self, optimizer: Optimizer) -> bool:
        """Reduce and clip the gradients of all batches since the last step, for the optimizer.

        Returns:
            whether there are gradients to step with; if not, none are left.
        """
        engine = self._running_engine
        fractions = self._clean_fractions.take(engine.left_out)
        if not self._has_gradients:
            # training_step has returned None for every batch. Torch's optimizers leave weights without gradients as they are.
            self._call_hooks(optimizer)
            return False
        self._has_gradients = False
        if fractions is None:
            if not self._has_been_left:
                self._has_been_left = True
                rank_zero_warn(
                    f"Some stage had no honest gradient in the step that ended with batch {self.step - 1}, so the weights were left"
                    " as they are, and so they will be by later steps of which that is true. If this goes on, look at"
                    " sentinel/anomaly_score: the training may have diverged."
                )
            engine.discard_gradients()
            return False
        with self._in_step():
            engine.reduce_gradients(fractions)
        self._call_hooks(optimizer)
        with self._clipping_as_one():
            trainer = self._trainer
            call._call_lightning_module_hook(
                trainer,
                "configure_gradient_clipping",
                optimizer,
                gradient_clip_val=trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            )
        return True

    def _call_hooks(self, optimizer: Optimizer) -> None:
        call._call_callback_hooks(self._trainer, "on_before_optimizer_step", optimizer)
        call._call_lightning_module_hook(self._trainer, "on_before_optimizer_step", optimizer)

    @contextmanager
    def _clipping_as_one(self) -> Iterator[None]:
        """A context for Lightning's hook ``configure_gradient_clipping``: ``self.clip_gradients`` clips over all stages in it.

        Raises:
            ConfigurationError: if the hook has changed gradients itself, because it sees only those of one stage.
        """
        module = self.lightning_module
        assert module is not None
        before = self._gradients(module)

        def clip(
            _: Optimizer,
            gradient_clip_val: float = 0.0,
            gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
        ) -> None:
            nonlocal before
            self._require_unchanged(module, before)
            if gradient_clip_val > 0:
                with self._in_step():
                    self._running_engine.clip_gradients(float(gradient_clip_val), gradient_clip_algorithm == "value")
            before = self._gradients(module)

        # Patched on the instance, as Lightning does to call through DDP's wrapper: module.clip_gradients ends in this method.
        plugin = vars(self.precision_plugin)
        plugin["clip_gradients"] = clip
        try:
            yield
        finally:
            del plugin["clip_gradients"]
        self._require_unchanged(module, before)

    @staticmethod
    def _gradients(module: Module) -> list[tuple[int, int]]:
        gradients = (parameter.grad for parameter in module.parameters())
        return [(id(gradient), -1 if gradient is None else gradient._version) for gradient in gradients]

    def _require_unchanged(self, module: Module, before: list[tuple[int, int]]) -> None:
        whole = self._virtual or self.mesh.stages == 1
        if not whole and self._gradients(module) != before:
            raise ConfigurationError(
                f"{type(module).__name__}.configure_gradient_clipping has changed gradients itself, but it sees those of one stage"
                " only, whose norm is not that of the whole model. Let it call self.clip_gradients(optimizer,"
                " gradient_clip_val=..., gradient_clip_algorithm=...), which clips over all stages."
            )
