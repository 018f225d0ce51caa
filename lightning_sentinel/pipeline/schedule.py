"""DeepSpeed's 1F1B schedules with instructions for simulated attacks and for verification.

An attack happens just before a signal is sent, verification just after it was received. DeepSpeed's instructions carry only a
buffer id; ours carry the micro-batch as well, because table rows and attacks refer to micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.runtime.pipe import schedule as ds

__all__ = [
    "InferenceSchedule",
    "TamperActivation",
    "TamperGradient",
    "TrainSchedule",
    "VerifyActivation",
    "VerifyGradient",
]


class TamperActivation(ds.BufferOpInstruction):  # type: ignore[misc]
    """Let a simulated adversary alter the activation about to be sent."""


class TamperGradient(ds.BufferOpInstruction):  # type: ignore[misc]
    """Let a simulated adversary alter the gradient about to be sent."""


class VerifyActivation(ds.BufferOpInstruction):  # type: ignore[misc]
    """Verify the activation that was just received."""


class VerifyGradient(ds.BufferOpInstruction):  # type: ignore[misc]
    """Verify the gradient that was just received."""


_BEFORE = {ds.SendActivation: TamperActivation, ds.SendGrad: TamperGradient}
_AFTER = {ds.RecvActivation: VerifyActivation, ds.RecvGrad: VerifyGradient}
# The strategy reduces gradients and steps the optimizer itself, between Lightning's hooks.
_LEFT_TO_THE_STRATEGY = (ds.ReduceTiedGrads, ds.ReduceGrads, ds.OptimizerStep)


def _extended(command: ds.PipeInstruction, current: int, previous: int) -> Iterator[ds.PipeInstruction]:
    """Yield a DeepSpeed instruction with ours around it. A sent signal belongs to the previous micro-batch."""
    kind = type(command)
    if kind in _LEFT_TO_THE_STRATEGY:
        return
    buffer = command.kwargs["buffer_id"]
    if kind in _BEFORE:
        yield _BEFORE[kind](buffer, micro_batch=previous)
    yield kind(buffer, micro_batch=previous if kind in _BEFORE else current)
    if kind in _AFTER:
        yield _AFTER[kind](buffer, micro_batch=current)


class TrainSchedule(ds.TrainSchedule):  # type: ignore[misc]
    """One forward and one backward pass of every micro-batch, without the optimizer step."""

    def steps(self) -> Iterator[list[ds.PipeInstruction]]:
        previous = -1
        for step_id, commands in enumerate(super().steps()):
            current, _ = self._step_to_micro_batch(step_id)
            yield [ours for command in commands for ours in _extended(command, current, previous)]
            previous = current


class InferenceSchedule(ds.InferenceSchedule):  # type: ignore[misc]
    """Forward passes only. Nothing is verified or tampered with: evaluation does not reach the weights."""

    def steps(self) -> Iterator[list[ds.PipeInstruction]]:
        for step_id, commands in enumerate(super().steps()):
            current = step_id - self.stage_id
            yield [
                type(command)(
                    command.kwargs["buffer_id"],
                    micro_batch=current - 1 if isinstance(command, ds.SendActivation) else current,
                )
                for command in commands
            ]
