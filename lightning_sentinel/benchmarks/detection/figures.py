"""Figures of the results, as PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sentinel.benchmarks.detection.results import Group
from lightning_sentinel.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "require_matplotlib"]

_DIVERGED = 10.0
"""Where a run that diverged is drawn, on an axis of loss gaps."""
_LEAST_GAP = 1e-3


def require_matplotlib() -> None:
    """Raise ``MissingExtraError`` without it: before the first run, not after the last."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "Drawing the results of the benchmark") from None


def draw(suite: str, groups: Sequence[Group], folder: Path) -> list[Path]:
    """Draw what a suite shows.

    Returns:
        the files; none where nobody was attacked and verified.
    """
    attacked = [group for group in groups if group.scenario.attacked and group.scenario.method != "unprotected"]
    if not attacked:
        return []
    figures = {"f1.png": _heatmap(attacked)}
    if suite == "strength":
        figures["harm.png"] = _harm(attacked)
    files = []
    for name, figure in figures.items():
        files.append(folder / name)
        figure.savefig(files[-1], dpi=150, bbox_inches="tight")
    return files


def _heatmap(groups: Sequence[Group]) -> Figure:
    """F1 of every attack, by method."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(group.name for group in groups))
    methods = list(dict.fromkeys(group.scenario.method for group in groups))
    values = [[math.nan] * len(methods) for _ in names]
    for group in groups:
        values[names.index(group.name)][methods.index(group.scenario.method)] = 100 * (group.f1 or 0.0)
    figure = Figure(figsize=(2.5 + 0.9 * len(methods), 1 + 0.26 * len(names)))
    axes = figure.subplots()
    image = axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(methods)), methods)
    axes.set_yticks(range(len(names)), [_label(*name) for name in names])
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if not math.isnan(value):
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8)
    axes.set_title("F1 over workers (%)")
    figure.colorbar(image, ax=axes)
    return figure


def _label(attack: str, direction: str, variant: str) -> str:
    return f"{direction} {attack}" + (f" ({variant})" if variant else "")


def _harm(groups: Sequence[Group]) -> Figure:
    """Whether what goes undetected is harmless: what an attack costs where nobody looks on, against how much of it is found."""
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(group.scenario.method for group in groups))
    figure = Figure(figsize=(4 * len(methods), 3.6))
    panels: Any = figure.subplots(1, len(methods), squeeze=False, sharey=True)[0]
    kinds = list(dict.fromkeys((_kind(group), group.scenario.direction) for group in groups))
    for method, axes in zip(methods, panels):
        for number, (kind, direction) in enumerate(kinds):
            mine = [g for g in groups if g.scenario.method == method and (_kind(g), g.scenario.direction) == (kind, direction)]
            mine = [group for group in mine if group.unprotected_gap is not None]
            harm = [min(_DIVERGED, max(_LEAST_GAP, group.unprotected_gap or 0.0)) for group in mine]
            found = [100 * (group.recall or 0.0) for group in mine]
            marker = "o" if direction == "activation" else "^"
            axes.plot(harm, found, marker, color=f"C{number % 10}", label=f"{direction} {kind}", alpha=0.8)
            for group, x, y in zip(mine, harm, found):
                axes.annotate(group.scenario.attack.split()[-1], (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axes.set_xscale("log")
        axes.set_xlim(_LEAST_GAP / 1.5, _DIVERGED * 1.5)
        axes.set_ylim(-5, 108)
        axes.set_title(method)
        axes.set_xlabel("loss gap unprotected (0.001 or less: left)")
    panels[0].set_ylabel("malicious workers banned (%)")
    panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _kind(group: Group) -> str:
    return group.scenario.attack.split()[0]
