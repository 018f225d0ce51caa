"""Runs the user's step functions around a pipeline.

Inside a step ``self(x)`` (or ``self.net(x)``) calls the *entry* of the pipeline. The step is suspended at this call, whose argument
is the pipeline's input. On the first stage the step is abandoned there; on the last stage the call returns the pipeline's output,
and the step goes on to its loss. A process that has both ends runs a step once. The step itself, its preprocessing and its logging
stay as the user wrote them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import torch
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

__all__ = ["NeverCalledError", "StepRun", "StepRunner", "fetches"]


_MOST = 2**16
"""Largest tensor, in elements, that is copied in every batch."""


def fetches(module: L.LightningModule, step: str) -> bool:
    """Whether a step takes ``dataloader_iter`` and fetches its batch itself."""
    return bool(is_param_in_hook_signature(getattr(module, step), "dataloader_iter", explicit=True))


class NeverCalledError(PipelineModelError):
    """A step ended without calling the pipeline."""


class StepRun:
    """A step on one micro-batch, which has run up to its call of the pipeline, or to its end without one.

    Args:
        runner: of the module's steps.
        step: ``"training_step"`` and the like.
        arguments: of the step; the first is the micro-batch.
        recorder: records what the step logs; ``None`` records nothing.
        micro_batch: whose values it logs.
        draws_on: a device whose random number generators the step resumes with the states they had at its call of the pipeline.
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
        """Whether the step has called the pipeline and waits for its output."""
        return self._suspended.waits

    @property
    def inputs(self) -> Any:
        """The pipeline's input: the argument of the call; for ``self(x, y)`` the tuple ``(x, y)``, for the first layer.

        Raises:
            NeverCalledError: if the step has not called the pipeline.
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
        """The return value of a step that was finished or did not call the pipeline."""
        assert not self.waits, "a step that waits has not returned"
        return self._suspended.value

    def finish(self, output: Any, counts: Tensor) -> Any:
        """Resume the step with the pipeline's output, if it waits for one.

        Args:
            output: of the last stage for this micro-batch; ``None`` if the pipeline had no input.
            counts: 0-dim bool, whether the values that the step logs count.

        Returns:
            the step's return value.
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
        """End the step at its call of the pipeline; its ``finally`` clauses run."""
        with self._running():
            self._suspended.abandon()

    @contextmanager
    def _running(self) -> Iterator[None]:
        recorder = self._recorder
        with ExitStack() as stack:
            if recorder is not None:
                recorder.begin(self._micro_batch)
                stack.enter_context(recorder.listening())
            # predict_step must not log, and Lightning's own log says so.
            log = None if self.step == "predict_step" else _discard if recorder is None else recorder.log
            stack.enter_context(self._runner.redirected(self._entered, log))
            yield

    def _entered(self, *inputs: Any, **named: Any) -> Any:
        """Replaces the entry's ``forward``: suspends the step and returns the pipeline's output."""
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
    """Runs a LightningModule's steps on the first or last stage of its pipeline.

    Args:
        module: the user's module.
        entry: the module whose ``forward`` is the whole pipeline: an ``nn.Sequential``, a network, or the LightningModule itself;
            ``None`` if steps run unchanged.
        layers: names of the pipeline's layers in the module.
        whole: whether one process has the only stage, so that further calls of the entry run directly.
    """

    def __init__(
        self, module: L.LightningModule, entry: nn.Module | None, layers: Collection[str] = (), whole: bool = False
    ) -> None:
        self.module = module
        self.whole = whole
        self.forward: Callable[..., Any] = module if entry is None else entry.forward
        """The entry's own ``forward``."""
        self._entry = entry
        self.recorder = LogRecorder(module, BatchMetrics(module))
        self.calls = LoggerCalls()
        """Direct calls of loggers by steps."""
        self._keepers = keepers(module, layers)
        self.leaves_out = False
        """Whether micro-batches of a training step may be left out."""
        self.states = MetricStates(module)
        """The states of metrics, without micro-batches that are left out."""
        self.more: Iterator[Any] | None = None
        """Further batches for a step that takes ``dataloader_iter``, if its batch is one micro-batch in this process."""
        self.gather: Callable[..., Any] | None = None
        """Replaces the module's ``all_gather`` in steps."""
        self.signals: Callable[[], Sequence[int]] = tuple
        """Returns how many process signals (such as SIGTERM) of each kind this process has received."""

    @property
    def call(self) -> str:
        """How the user writes the call of the pipeline."""
        path = next((name for name, child in self.module.named_modules() if child is self._entry), "")
        return f"self{'.' * bool(path)}{path.replace('._orig_mod', '')}(x)"

    def new_records(self) -> None:
        """Drop the log records and metric records of the previous batch."""
        self.recorder = self.recorder.next()
        self.states.forget()

    @property
    def stops(self) -> bool:
        """Whether a step has asked for the end of training."""
        trainer = self.module._trainer
        return trainer is not None and bool(trainer.should_stop)

    def start(self, step: str, arguments: tuple[Any, ...], samples: int, draws_on: torch.device | None = None) -> StepRun:
        """Run a step up to its call of the pipeline; :meth:`StepRun.finish` resumes it.

        Args:
            step: ``"training_step"`` and the like.
            arguments: of the step; the first is the micro-batch.
            samples: number of samples in the micro-batch.
            draws_on: a device whose random numbers in the step are as if none were drawn while it is suspended.
        """
        micro_batch = LoggingMicroBatch(samples, step=step)
        return StepRun(self, step, arguments, self.recorder, micro_batch, draws_on)

    def input_of(self, step: str, arguments: tuple[Any, ...]) -> Any:
        """Run a step up to its call of the pipeline and return the input. The step is abandoned here; the last stage finishes it.

        Raises:
            NeverCalledError: if the step never calls the pipeline.
        """
        run = StepRun(self, step, arguments, None, LoggingMicroBatch(), None)
        inputs = run.inputs
        run.abandon()
        return inputs

    def name_of(self, step: str) -> str:
        """Name of a step for errors."""
        return f"{type(self.module).__name__}.{step}"

    def given(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """The pipeline's input, from the arguments of the call of its entry."""
        given = list(inputs)
        if named and self._entry is not None and not isinstance(self._entry, nn.Sequential):
            # Sort named arguments into the order of the entry's signature, because layers get them by position.
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
        """A ``dataloader_iter`` that yields the micro-batch first."""
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
        """Remove micro-batches that were left out from the states of metrics."""
        self.states.end_step()

    @contextmanager
    def redirected(self, forward: Callable[..., Any], log: Callable[..., None] | None) -> Iterator[None]:
        """A context around a step that redirects the entry's ``forward`` and ``self.log``; ``log=None`` keeps Lightning's."""
        # Set on the instances, not on the classes, as Lightning does to send a call through DDP's wrapper.
        with ExitStack() as stack:
            if self._entry is not None:
                self.forward = self._entry.forward
                stack.enter_context(_attribute(self._entry, "forward", forward))
            if self._entry is not None and self._entry._compiled_call_impl is not None:
                # A module compiled in place would call its compiled function instead of forward.
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
        """A context that undoes the side effects of steps: logged values, torchmetrics states, and values kept in the module."""
        recorder = self.recorder
        self.recorder = LogRecorder(self.module)
        calls = self.calls
        self.calls = LoggerCalls()
        restore = self.remember(most=None)
        try:
            yield
        finally:
            restore()
            self.recorder = recorder
            self.calls = calls

    def remember(self, most: int | None = _MOST) -> Callable[[], None]:
        """Save what steps keep, and hold back their logger calls. Returns a function that undoes their effects from here on.

        Args:
            most: largest tensor to copy, in elements; limited because this runs before every batch that may be repeated.
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
        """Make the logger calls that were held back, because the batch counts."""
        self.calls.make()

    def _remember_metrics(self) -> Callable[[], None]:
        """Save the states of the module's torchmetrics objects. Returns a function that restores them."""
        metrics = [metric for metric in self.module.modules() if isinstance(metric, Metric)]
        before = [{name: _copied(value) for name, value in vars(metric).items()} for metric in metrics]

        def restore() -> None:
            for metric, state in zip(metrics, before):
                vars(metric).update(state)

        return restore


def _discard(*_: Any, **__: Any) -> None:
    """Ignore ``self.log`` on the first stage, which runs a step only up to the pipeline: the last stage logs it again."""


def _arithmetic() -> tuple[Any, ...]:
    """The thread's autocast settings."""
    kinds = ("cpu", "cuda")
    return tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)


def _saving_hooks() -> Any:
    """The thread's hooks on tensors saved for the backward pass."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if hooks is None else hooks(False)


def _copied(value: Any) -> Any:
    """Copy a metric's attribute. Tensors are detached, because tensors in an autograd graph cannot be deep-copied.

    Parameters and modules are shared with the original. So are the entries of lists: a metric appends to a list state, but does not
    overwrite its entries.
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
