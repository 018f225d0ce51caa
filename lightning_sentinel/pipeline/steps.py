"""The user's own step functions, run around a pipeline.

Inside a step ``self(x)`` (or ``self.net(x)``) calls the *entry* of the pipeline. On the first stage the call tells what goes into
the pipeline and the step is left at that point; on the last stage it answers with what came out, and the step goes on to its loss.
The step itself, its preprocessing and its logging stay as the user wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.pipeline.batch_metrics import BatchMetrics
from lightning_sentinel.pipeline.keeping import remembered
from lightning_sentinel.pipeline.logs import LogRecorder
from lightning_sentinel.pipeline.statistics import MetricStates

__all__ = ["StepRunner", "checked_signal", "input_gradient", "loss_of"]


class _InputCaptured(BaseException):
    """Leaves a step once its pipeline input is known; no ``Exception``, so that the step's own handlers let it pass."""

    def __init__(self, value: Any) -> None:
        self.value = value


class StepRunner:
    """Runs a LightningModule's steps on either end of its pipeline.

    Args:
        module: the user's module.
        entry: the module whose ``forward`` is the whole pipeline: the ``nn.Sequential``, or the LightningModule itself.
        layers: names of the pipeline's layers in the module.
    """

    def __init__(self, module: L.LightningModule, entry: nn.Module, layers: Collection[str] = ()) -> None:
        self._module = module
        self._entry, self._layers = entry, layers
        self._metrics = BatchMetrics(module)
        self.recorder = LogRecorder(module, self._metrics)
        self.leaves_out = False
        """Whether any micro-batch of a training step may not count."""
        self._states = MetricStates(module)
        self.gather: Callable[..., Any] | None = None
        """Takes the place of the module's ``all_gather`` in steps."""

    def new_records(self) -> None:
        """Forget what the previous batch logged."""
        self.recorder = LogRecorder(self._module, self._metrics)
        self._states.forget()

    @property
    def stops(self) -> bool:
        """Whether a step has asked for the end of training."""
        trainer = self._module._trainer
        return trainer is not None and bool(trainer.should_stop)

    def input_of(self, step: str, arguments: tuple[Any, ...]) -> Any:
        """What the step puts into the pipeline.

        Args:
            step: ``"training_step"`` and the like.
            arguments: of the step; the first is the micro-batch.

        Returns:
            the argument of the call; of ``self(x, y)`` the tuple ``(x, y)``, for the first layer of ``configure_pipeline``.

        Raises:
            PipelineModelError: if the step never calls the pipeline.
        """

        def capture(*inputs: Any, **named: Any) -> Any:
            several = len(inputs) > 1 and self._entry is self._module
            if named or not (several or len(inputs) == 1):
                raise PipelineModelError(
                    f"{self._call} was called with {len(inputs)} positional and {len(named)} named arguments. A pipeline takes one"
                    " tensor (or one tuple of tensors): pass a single argument."
                )
            raise _InputCaptured(inputs if several else inputs[0])

        with self._redirected(capture, log=_discard):
            try:
                getattr(self._module, step)(*arguments)
            except _InputCaptured as captured:
                return captured.value
        raise PipelineModelError(
            f"{type(self._module).__name__}.{step} never called {self._call}, so nothing goes into the pipeline. Call it once;"
            " to skip batches return -1 from on_train_batch_start, or leave them out of the data."
        )

    def finish(self, step: str, arguments: tuple[Any, ...], output: Tensor, samples: int, counts: Tensor) -> Any:
        """Run the step with the pipeline's output.

        Args:
            output: what came out of the last stage for this micro-batch.
            samples: size of the micro-batch.
            counts: 0-dim bool, whether what it logs counts.

        Returns:
            what the step returns.
        """
        answers = iter((output,))

        def answer(*_: Any, **__: Any) -> Tensor:
            try:
                return next(answers)
            except StopIteration:
                raise PipelineModelError(
                    f"{type(self._module).__name__}.{step} called {self._call} more than once. A pipeline runs once for each"
                    " micro-batch: concatenate the inputs, and split the output."
                ) from None

        self.recorder.begin(samples, counts, training=step == "training_step")
        before = self._states.copies() if self.leaves_out else []
        with self._redirected(answer, log=self.recorder.log), self.recorder.listening():
            result = getattr(self._module, step)(*arguments)
        self._states.put_back(before, counts)
        return result

    def end_step(self) -> None:
        """Let metrics forget what did not count."""
        self._states.end_step()

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Run steps inside without a trace: in what is logged, in the states of torchmetrics, and in what steps keep."""
        recorder, self.recorder = self.recorder, LogRecorder(self._module)
        restore, restore_metrics = remembered(self._module, self._layers), self.remember_metrics()
        trainer = self._module._trainer
        stops = trainer is not None and trainer.should_stop
        try:
            yield
        finally:
            self.recorder = recorder
            restore_metrics()
            restore()
            if trainer is not None:
                trainer.should_stop = stops

    def remember_metrics(self) -> Callable[[], None]:
        """Take note of the states of the module's torchmetrics. Returns what brings them back."""
        metrics = [metric for metric in self._module.modules() if isinstance(metric, Metric)]
        before = [{name: _copied(value) for name, value in vars(metric).items()} for metric in metrics]

        def restore() -> None:
            for metric, state in zip(metrics, before):
                vars(metric).update(state)

        return restore

    @property
    def _call(self) -> str:
        return "self(x)" if self._entry is self._module else "its nn.Sequential"

    @contextmanager
    def _redirected(self, forward: Callable[..., Any], log: Callable[..., None]) -> Iterator[None]:
        # Attributes of the instances, not of the classes: what Lightning does to send a call through DDP's wrapper.
        gather = self._module.all_gather if self.gather is None else self.gather
        module = self._module
        with _attribute(self._entry, "forward", forward), _attribute(module, "log", log), _attribute(module, "all_gather", gather):
            yield


def _discard(*_: Any, **__: Any) -> None:
    """The first stage sees a step only up to the pipeline; what it logs there is logged again on the last."""


def _copied(value: Any) -> Any:
    """What a metric holds may belong to a graph, which cannot be copied; what it was made of stays itself.

    So does what it has in a list, all that it has seen: it adds to that, and does not write over it.
    """
    if isinstance(value, dict):
        copy = value.copy()
        copy.update((name, _copied(entry)) for name, entry in value.items())
        return copy
    if isinstance(value, list):
        return value.copy()
    return value.detach().clone() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else value


@contextmanager
def _attribute(owner: nn.Module, name: str, value: Any) -> Iterator[None]:
    before: Mapping[str, Any] = {name: vars(owner)[name]} if name in vars(owner) else {}
    vars(owner)[name] = value
    try:
        yield
    finally:
        del vars(owner)[name]
        vars(owner).update(before)


def loss_of(result: Any, step: str) -> Tensor:
    """The loss in what a training step returned.

    Raises:
        PipelineModelError: if there is none.
    """
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not torch.is_floating_point(loss):
        raise PipelineModelError(
            f"{step} returned {type(result).__name__}, in which there is no scalar loss. Return the loss, or a dict with the key"
            " 'loss'. Skipping a batch by returning None is not possible in a pipeline, because the stages before are waiting for"
            " its gradient."
        )
    return loss.reshape(())


def checked_signal(output: Any, layer: str, stage: int) -> Tensor:
    """What a stage returned, if it can cross a boundary.

    Args:
        output: of the stage.
        layer: name of its last layer.
        stage: its number.

    Raises:
        PipelineModelError: if it is no floating-point tensor.
    """
    if isinstance(output, Tensor) and output.is_floating_point():
        return output
    what = f"a tensor of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
    raise PipelineModelError(
        f"Layer {layer}, the last of stage {stage}, returned {what}. Between stages travels one floating-point tensor: let the"
        " layer return one (masks and positions can be computed again in each stage)."
    )


def input_gradient(inputs: Tensor, stage: int) -> Tensor:
    """The gradient of what a stage was given, after its backward pass.

    Raises:
        PipelineModelError: if there is none.
    """
    if inputs.grad is None:
        raise PipelineModelError(
            f"The input of stage {stage} received no gradient: its layers do not use it. Every layer must depend on the output of"
            " the one before."
        )
    return inputs.grad
