"""The user's own step functions, run around a pipeline.

Inside a step ``self(x)`` (or ``self.net(x)``) calls the *entry* of the pipeline. The call tells what goes into the pipeline, and
the step waits there. On the first stage it is left at that point; on the last stage it is answered with what came out, and goes on
to its loss. A process that has both ends runs a step once. The step itself, its preprocessing and its logging stay as the user
wrote them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.pipeline.batch_metrics import BatchMetrics
from lightning_sentinel.pipeline.logger_calls import LoggerCalls
from lightning_sentinel.pipeline.logs import LoggingMicroBatch, LogRecorder
from lightning_sentinel.pipeline.running_statistics import MetricStates
from lightning_sentinel.pipeline.step_attributes import keepers, remembered
from lightning_sentinel.pipeline.suspension import Suspended

__all__ = ["NeverCalledError", "StepOutputError", "StepRun", "StepRunner", "checked_signal", "fetches", "input_gradient", "loss_of"]


_MOST = 2**16
"""Elements of one tensor that are copied in every batch."""


def fetches(module: L.LightningModule, step: str) -> bool:
    """Whether a step takes ``dataloader_iter``, and gets its batch from there."""
    return bool(is_param_in_hook_signature(getattr(module, step), "dataloader_iter", explicit=True))


class NeverCalledError(PipelineModelError):
    """A step has ended without a call of the pipeline."""


class StepOutputError(PipelineModelError, MisconfigurationException):
    """``training_step`` has returned what is no loss; under the name, too, by which Lightning calls it."""


class StepRun:
    """A step on one micro-batch, which has run up to its call of the pipeline, or to its end if there is none.

    Args:
        runner: of the step.
        step: ``"training_step"`` and the like.
        arguments: of the step; the first is the micro-batch.
        recorder: of what it logs; ``None`` hears nothing.
        micro_batch: whose values it logs.
        draws_on: whose random numbers the step goes on with where it stood when it called the pipeline.
    """

    def __init__(
        self,
        runner: StepRunner,
        step: str,
        arguments: tuple[Any, ...],
        recorder: LogRecorder | None,
        micro_batch: LoggingMicroBatch,
        draws_on: torch.device | None,
    ) -> None:
        self.step = step
        self._runner = runner
        self._recorder = recorder
        self._micro_batch = micro_batch
        self._answered = False
        self._arithmetic = _arithmetic()
        self._hooks = _saving_hooks()
        self._records_gradients = torch.is_grad_enabled()
        given = (runner.batches_from(arguments, step),) if fetches(runner.module, step) else arguments
        self._suspended = Suspended(lambda: getattr(runner.module, step)(*given), draws_on)
        with self._running():
            self._suspended.start()

    @property
    def waits(self) -> bool:
        """Whether the step has called the pipeline, and waits for what comes out."""
        return self._suspended.waits

    @property
    def inputs(self) -> Any:
        """What goes into the pipeline: the argument of the call; of ``self(x, y)`` the tuple ``(x, y)``, for the first layer.

        Raises:
            NeverCalledError: if the step has not called it.
        """
        if self.waits:
            return self._suspended.value
        raise NeverCalledError(
            f"{self._runner.name_of(self.step)} never called {self._runner.call}, so nothing goes into the pipeline. Call it once;"
            " its layers cannot be called apart, because they are in different processes. To skip batches return -1 from"
            " on_train_batch_start, or leave them out of the data."
        )

    @property
    def result(self) -> Any:
        """What a step has returned that did not call the pipeline, or was finished."""
        assert not self.waits, "a step that waits has not returned"
        return self._suspended.value

    def finish(self, output: Any, counts: Tensor) -> Any:
        """Go on with the pipeline's output, if the step waits for it.

        Args:
            output: what came out of the last stage for this micro-batch; ``None`` if nothing went in.
            counts: 0-dim bool, whether what it logs counts.

        Returns:
            what the step returns.
        """
        self._micro_batch.counts = counts
        if self.waits:
            if output is None:
                raise PipelineModelError(
                    f"{self._runner.name_of(self.step)} called {self._runner.call} on the last stage, and not on the first. Let it"
                    " depend on the batch and its numbers alone whether the step calls it, which are the same on both."
                )
            self._answered = True
            states = self._runner.states
            before = states.copies() if self._runner.leaves_out else []
            with self._running():
                self._suspended.go_on(output)
            states.put_back(before, counts)
        return self.result

    def abandon(self) -> None:
        """Leave the step at its call; its ``finally`` clauses run."""
        with self._running():
            self._suspended.abandon()

    @contextmanager
    def _running(self) -> Iterator[None]:
        recorder = self._recorder
        with ExitStack() as stack:
            if recorder is not None:
                recorder.begin(self._micro_batch)
                stack.enter_context(recorder.listening())
            # Of what predict_step logs nothing would become, and Lightning says so.
            log = None if self.step == "predict_step" else _discard if recorder is None else recorder.log
            stack.enter_context(self._runner.redirected(self._entered, log))
            yield

    def _entered(self, *inputs: Any, **named: Any) -> Any:
        """In place of the entry's ``forward``."""
        where = self._runner.name_of(self.step)
        if self._answered and self._runner.whole:
            return self._runner.forward(*inputs, **named)
        if self._answered:
            raise PipelineModelError(
                f"{where} called {self._runner.call} more than once. A pipeline runs once for each micro-batch: concatenate the"
                " inputs, and split the output."
            )
        if self._arithmetic != _arithmetic():
            raise PipelineModelError(
                f"{where} called {self._runner.call} inside torch.autocast, which other stages know nothing of. Use"
                " Trainer(precision='bf16-mixed'), or enter it in the forward() of the layers that it is meant for."
            )
        if self._hooks != _saving_hooks():
            raise PipelineModelError(
                f"{where} called {self._runner.call} inside torch.utils.checkpoint, or hooks on what a backward pass needs, which"
                " other stages know nothing of. Use SentinelStrategy(activation_checkpointing=True)."
            )
        if self._records_gradients and not torch.is_grad_enabled():
            raise PipelineModelError(
                f"{where} called {self._runner.call} where no gradients are recorded, but other stages record them all the same."
                " Freeze layers with requires_grad_(False) instead of torch.no_grad()."
            )
        return self._suspended.ask(self._runner.given(inputs, named))


class StepRunner:
    """Runs a LightningModule's steps on either end of its pipeline.

    Args:
        module: the user's module.
        entry: the module whose ``forward`` is the whole pipeline: an ``nn.Sequential``, a network, or the LightningModule itself;
            ``None`` if steps run as they are.
        layers: names of the pipeline's layers in the module.
        whole: whether one process has the only stage, so that what calls the entry once more is run there and then.
    """

    def __init__(
        self, module: L.LightningModule, entry: nn.Module | None, layers: Collection[str] = (), whole: bool = False
    ) -> None:
        self.module = module
        self.whole = whole
        self.forward: Callable[..., Any] = module if entry is None else entry.forward
        """The entry's own."""
        self._entry = entry
        path = next((name for name, child in module.named_modules() if child is entry), "")
        self.call = f"self{'.' * bool(path)}{path.replace('._orig_mod', '')}(x)"
        """How the user writes the call of the pipeline."""
        self._metrics = BatchMetrics(module)
        self.recorder = LogRecorder(module, self._metrics)
        self.calls = LoggerCalls()
        """What steps say to loggers by themselves."""
        self._keepers = keepers(module, layers)
        self.leaves_out = False
        """Whether any micro-batch of a training step may not count."""
        self.states = MetricStates(module)
        """What metrics hold, without what does not count."""
        self.more: Iterator[Any] | None = None
        """Where a step that takes ``dataloader_iter`` finds more than its batch, if that is one micro-batch in this process."""
        self.gather: Callable[..., Any] | None = None
        """Takes the place of the module's ``all_gather`` in steps."""
        self.signals: Callable[[], Sequence[int]] = tuple
        """How many signals of each kind this process has had."""

    def new_records(self) -> None:
        """Forget what the previous batch logged."""
        self.recorder = LogRecorder(self.module, self._metrics)
        self.states.forget()

    @property
    def stops(self) -> bool:
        """Whether a step has asked for the end of training."""
        trainer = self.module._trainer
        return trainer is not None and bool(trainer.should_stop)

    def start(self, step: str, arguments: tuple[Any, ...], samples: int, draws_on: torch.device | None = None) -> StepRun:
        """Run a step up to its call of the pipeline, to be finished.

        Args:
            step: ``"training_step"`` and the like.
            arguments: of the step; the first is the micro-batch.
            samples: size of the micro-batch.
            draws_on: where the step's random numbers are to be what they are if nothing is drawn between its two halves.
        """
        micro_batch = LoggingMicroBatch(samples, step=step)
        return StepRun(self, step, arguments, self.recorder, micro_batch, draws_on)

    def input_of(self, step: str, arguments: tuple[Any, ...]) -> Any:
        """What a step puts into the pipeline; the step is left there, and finished where the output is.

        Raises:
            NeverCalledError: if the step never calls the pipeline.
        """
        run = StepRun(self, step, arguments, None, LoggingMicroBatch(), None)
        inputs = run.inputs
        run.abandon()
        return inputs

    def name_of(self, step: str) -> str:
        """How errors call a step."""
        return f"{type(self.module).__name__}.{step}"

    def given(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """What goes into the pipeline, of what its entry was called with."""
        given = list(inputs)
        if named and self._entry is not None and not isinstance(self._entry, nn.Sequential):
            # By name, but in the order of the entry's own arguments, because layers are handed them in order.
            order = list(inspect.signature(type(self._entry).forward).parameters)[1:]
            while len(given) < len(order) and order[len(given)] in named:
                given.append(named[order[len(given)]])
        several = len(given) > 1 and not isinstance(self._entry, nn.Sequential)
        if len(given) != len(inputs) + len(named) or not (several or len(given) == 1):
            raise PipelineModelError(
                f"{self.call} was called with {len(inputs)} positional and {len(named)} named arguments. A pipeline takes one"
                " tensor (or one tuple of tensors): pass a single argument."
            )
        return tuple(given) if several else given[0]

    def batches_from(self, arguments: tuple[Any, ...], step: str) -> Iterator[tuple[Any, ...]]:
        """A ``dataloader_iter`` whose first batch is a micro-batch."""
        yield arguments
        if self.more is None:
            raise PipelineModelError(
                f"{self.name_of(step)} has asked dataloader_iter for more than one batch. A pipeline runs it for each micro-batch"
                " of one: call next() once; or use SentinelStrategy(replicas=1, micro_batches=1, engine='virtual')."
            )
        yield from self.more

    @property
    def own_backward(self) -> Callable[[Tensor], None] | None:
        """The module's ``backward``, if it has one of its own."""
        return self.module.backward if is_overridden("backward", self.module, L.LightningModule) else None

    def end_step(self) -> None:
        """Let metrics forget what did not count."""
        self.states.end_step()

    @contextmanager
    def redirected(self, forward: Callable[..., Any], log: Callable[..., None] | None) -> Iterator[None]:
        """While a step runs: calls of the entry and of ``self.log`` come to us, or stay Lightning's."""
        # Attributes of the instances, not of the classes: what Lightning does to send a call through DDP's wrapper.
        with ExitStack() as stack:
            if self._entry is not None:
                self.forward = self._entry.forward
                stack.enter_context(_attribute(self._entry, "forward", forward))
            if self._entry is not None and self._entry._compiled_call_impl is not None:
                # A module that was compiled in place has its call compiled, around its forward.
                stack.enter_context(_attribute(self._entry, "_compiled_call_impl", None))
            if log is not None:
                stack.enter_context(_attribute(self.module, "log", log))
            trainer = self.module._trainer
            stack.enter_context(self.calls.redirected(() if trainer is None else trainer.loggers))
            if self.gather is not None:
                stack.enter_context(_attribute(self.module, "all_gather", self.gather))
            yield

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Run steps inside without a trace: in what is logged, in the states of torchmetrics, and in what steps keep."""
        recorder, self.recorder = self.recorder, LogRecorder(self.module)
        calls, self.calls = self.calls, LoggerCalls()
        restore = self.remember(most=None)
        try:
            yield
        finally:
            restore()
            self.recorder, self.calls = recorder, calls

    def remember(self, most: int | None = _MOST) -> Callable[[], None]:
        """Take note of what steps keep, and hold what they say to loggers. Returns what undoes what they do from here on.

        Args:
            most: elements of one tensor to copy, because this comes before every batch that may be done again.
        """
        self.calls.hold()
        trainer = self.module._trainer
        stops = trainer is not None and trainer.should_stop
        restore = remembered(self.module, keeping=self._keepers, most=most)
        restore_metrics = self._remember_metrics()

        def undo() -> None:
            restore_metrics()
            restore()
            self.calls.hold()
            if trainer is not None:
                trainer.should_stop = stops

        return undo

    def make_calls(self) -> None:
        """Let loggers hear what steps have said to them: what they did counts."""
        self.calls.make()

    def _remember_metrics(self) -> Callable[[], None]:
        """Take note of the states of the module's torchmetrics. Returns what brings them back."""
        metrics = [metric for metric in self.module.modules() if isinstance(metric, Metric)]
        before = [{name: _copied(value) for name, value in vars(metric).items()} for metric in metrics]

        def restore() -> None:
            for metric, state in zip(metrics, before):
                vars(metric).update(state)

        return restore


def _discard(*_: Any, **__: Any) -> None:
    """The first stage sees a step only up to the pipeline; what it logs there is logged again on the last."""


def _arithmetic() -> tuple[Any, ...]:
    """What the thread computes in."""
    kinds = ("cpu", "cuda")
    return tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)


def _saving_hooks() -> Any:
    """What the thread does with tensors that it saves for a backward pass."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if hooks is None else hooks(False)


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
        raise StepOutputError(
            f"{step} returned {type(result).__name__}, in which there is no scalar loss. It must return a Tensor, a dict, or None,"
            " which leaves the micro-batch out; in a dict the 'loss' key needs to be present."
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
