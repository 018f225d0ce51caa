"""The part of the strategy that is about the optimizer's step: gradients of all stages are reduced, and clipped as one."""

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
    """Reduces gradients, calls Lightning's hooks in their order, and steps."""

    _clean_fractions: CleanFractionTally
    _has_gradients: bool = False
    """Whether any batch since the last step has made some; the same on all ranks."""
    _has_been_left: bool = False
    """Whether it was said that weights were left as they are."""

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
        """What an optimizer evaluates the batch with, as often as it likes."""
        evaluations = 0

        def evaluate() -> Any:
            nonlocal evaluations
            if evaluations and self._trainer.accumulate_grad_batches == 1:
                # The engine adds to what is there, and Lightning's closure zeroes that too late.
                self._running_engine.discard_gradients()
            elif evaluations:
                # Lightning's closure would add to the sum over batches, which is a mean over replicas by now.
                scale_gradients([one for group in optimizer.param_groups for one in group["params"]], self.mesh.replicas)
            evaluations += 1
            result = closure()
            self._make_ready(optimizer)
            return result

        return evaluate

    def _make_ready(self, optimizer: Optimizer) -> bool:
        """Bring what batches have left in gradients to where an optimizer wants it.

        Returns:
            whether there is anything to step with; else there are no gradients.
        """
        engine = self._running_engine
        shares = self._clean_fractions.take(engine.left_out)
        if not self._has_gradients:
            # training_step has returned None for every batch. Torch's optimizers leave weights without gradients as they are.
            self._call_hooks(optimizer)
            return False
        self._has_gradients = False
        if shares is None:
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
            engine.reduce_gradients(shares)
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
        """Around ``configure_gradient_clipping``: what ``self.clip_gradients`` asks for is done over all stages.

        Raises:
            ConfigurationError: if the hook has changed gradients itself, of which it sees those of one stage only.
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

        # On the instance, as Lightning sends calls through DDP's wrapper: this is where module.clip_gradients ends.
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
