"""Steps the optimizer: reduces gradients, calls Lightning's hooks in their order, and clips the gradients of all stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.nn import Module
from torch.optim import Optimizer

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.gradients.stash import scale_gradients
from lightning_sentinel.strategy.mesh_steps import MeshSteps
from lightning_sentinel.strategy.run_state import RunState

__all__ = ["OptimizerSteps"]


class OptimizerSteps:
    """The optimizer steps of one run.

    Args:
        run: the state of the run.
        trainer: the Trainer of the run.
        steps: the run's steps, which have made the gradients.
        precision: the Trainer's precision plugin.
    """

    def __init__(self, run: RunState, trainer: L.Trainer, steps: MeshSteps, precision: Precision) -> None:
        self._run = run
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._steps = steps
        self._precision = precision
        self._has_been_left = False
        """Whether the user was warned of a step that left the weights as they are."""

    def step(self, optimizer: Optimizer, closure: Callable[[], Any], options: dict[str, Any]) -> Any:
        """Evaluate the closure, make its gradients ready, and step the optimizer. Returns what Lightning's ``optimizer_step`` does.

        Args:
            optimizer: the user's optimizer.
            closure: Lightning's closure, which runs ``training_step`` and ``backward``.
            options: further arguments of the optimizer's ``step``.
        """
        gradients = self._run.running_engine.gradients
        if self._run.settings.virtual:
            return gradients.apply(self._evaluating(optimizer, closure), **options)
        result = closure()
        if self._make_ready(optimizer):
            with self._run.stepping():
                gradients.apply()
        return result

    def _evaluating(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure with which an optimizer evaluates the batch, as often as it likes."""
        evaluations = 0

        def evaluate() -> Any:
            nonlocal evaluations
            if evaluations and self._trainer.accumulate_grad_batches == 1:
                # The engine adds to the gradients that are there, and Lightning's closure zeroes them too late.
                self._run.running_engine.gradients.discard()
            elif evaluations:
                # Lightning's closure adds to the sum over batches, which by now is a mean over replicas: make it a sum again.
                scale_gradients([one for group in optimizer.param_groups for one in group["params"]], self._run.mesh.replicas)
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
        gradients = self._run.running_engine.gradients
        fractions = self._steps.clean_fractions.take(gradients.left_out)
        if not self._steps.has_gradients:
            # training_step has returned None for every batch. Torch's optimizers leave weights without gradients as they are.
            self._call_hooks(optimizer)
            return False
        self._steps.has_gradients = False
        if fractions is None:
            if not self._has_been_left:
                self._has_been_left = True
                rank_zero_warn(
                    f"Some stage had no honest gradient in the step that ended with batch {self._run.step - 1}, so the weights were"
                    " left as they are, and so they will be by later steps of which that is true. If this goes on, look at"
                    " sentinel/anomaly_score: the training may have diverged."
                )
            gradients.discard()
            return False
        with self._run.stepping():
            gradients.reduce(fractions)
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
        """A context for the hook ``configure_gradient_clipping``: ``self.clip_gradients`` clips over all stages in it.

        Raises:
            ConfigurationError: if the hook has changed gradients itself, because it sees only those of one stage.
        """
        module = self._module
        gradients = self._run.running_engine.gradients
        before = self._versions(module)

        def clip(
            _: Optimizer,
            gradient_clip_val: float = 0.0,
            gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
        ) -> None:
            nonlocal before
            self._require_unchanged(module, before)
            if gradient_clip_val > 0:
                with self._run.stepping():
                    gradients.clip(float(gradient_clip_val), by_value=gradient_clip_algorithm == "value")
            before = self._versions(module)

        # Patched on the instance, as Lightning does to call through DDP's wrapper: module.clip_gradients ends in this method.
        plugin = vars(self._precision)
        plugin["clip_gradients"] = clip
        try:
            yield
        finally:
            del plugin["clip_gradients"]
        self._require_unchanged(module, before)

    @staticmethod
    def _versions(module: Module) -> list[tuple[int, int]]:
        """Identity and version of each gradient, which any change of it changes."""
        gradients = (parameter.grad for parameter in module.parameters())
        return [(id(gradient), -1 if gradient is None else gradient._version) for gradient in gradients]

    def _require_unchanged(self, module: Module, before: list[tuple[int, int]]) -> None:
        whole = self._run.settings.virtual or self._run.mesh.stages == 1
        if not whole and self._versions(module) != before:
            raise ConfigurationError(
                f"{type(module).__name__}.configure_gradient_clipping has changed gradients itself, but it sees those of one stage"
                " only, whose norm is not that of the whole model. Let it call self.clip_gradients(optimizer,"
                " gradient_clip_val=..., gradient_clip_algorithm=...), which clips over all stages."
            )
