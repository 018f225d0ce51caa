"""Raises an error for a call of the whole model on a process that has only one stage of it."""

from __future__ import annotations

from typing import Any, NoReturn

from lightning_sentinel.errors import PipelineModelError

__all__ = ["Elsewhere"]


class Elsewhere:
    """Replaces the ``forward`` of a module that was cut, outside of steps, where it would run the layers of one stage only.

    Args:
        name: of the module.
        stage: of this process.
        stages: number of stages in the pipeline.

    Example:
        >>> Elsewhere("Net", 1, 2)(3)
        Traceback (most recent call last):
        ...
        lightning_sentinel.errors.PipelineModelError: Net was called outside of a step, and this process has stage 1 of 2 only...
    """

    def __init__(self, name: str, stage: int, stages: int) -> None:
        self._name = name
        self._stage = stage
        self._stages = stages

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise PipelineModelError(
            f"{self._name} was called outside of a step, and this process has stage {self._stage} of {self._stages} only. In a step"
            " the whole pipeline answers, and trainer.predict asks it. For the whole model in one process let all ranks call"
            " trainer.strategy.whole_state_dict(), and load what it gives to rank zero into a new module; or"
            " trainer.save_checkpoint(path), and the class's load_from_checkpoint(path)."
        )
