"""The summary of the whole module, for callbacks that ask after this process has only its own stage of it."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary import ModelSummary as Summary
from lightning.pytorch.utilities.model_summary import summarize

from lightning_sentinel.pipeline.stages.partition import is_cut

__all__ = ["show_whole_module"]

_ATTRIBUTE = "_sentinel_summaries"


class _Remembered:
    """The values that ``ModelSummary`` reads from a summary, computed while the module was whole."""

    def __init__(self, summary: Summary) -> None:
        self._data = summary._get_summary_data()
        self.total_parameters = summary.total_parameters
        self.trainable_parameters = summary.trainable_parameters
        self.model_size = summary.model_size
        self.total_training_modes = summary.total_training_modes
        self.total_flops = summary.total_flops

    def _get_summary_data(self) -> list[tuple[str, list[str]]]:
        return self._data


def show_whole_module(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Let the ``ModelSummary`` callbacks of a Trainer show the module as it is before it is cut.

    A module that was cut for an earlier run is shown as it was then, if that run had such a callback with the same depth.
    """
    remembered: dict[int, _Remembered] = vars(module).setdefault(_ATTRIBUTE, {})
    whole = not is_cut(module)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if not isinstance(callback, ModelSummary) or not callback._max_depth:
            continue
        depth = callback._max_depth
        if whole and depth not in remembered:
            remembered[depth] = _Remembered(summarize(module, max_depth=depth))
        if depth in remembered:
            vars(callback)["_summary"] = _Answer(remembered[depth])


class _Answer:
    """A function that returns a summary, and can be pickled with its callback."""

    def __init__(self, summary: _Remembered) -> None:
        self._summary = summary

    def __call__(self, *_: Any) -> _Remembered:
        return self._summary
