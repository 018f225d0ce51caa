"""From single runs to tables: comparison with the clean run, then means over seeds."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from lightning_sentinel.benchmarks.detection.measures import Measures
from lightning_sentinel.benchmarks.detection.scenarios import NO_ATTACK, Scenario

__all__ = ["Group", "Row", "as_csv", "as_json", "grouped", "rows"]


@dataclass(frozen=True)
class Row:
    """One run beside those that it is compared with.

    Args:
        scenario: what was run.
        measures: what came of it.
        clean: the same training with nobody malicious; ``None`` if that run is missing.
        unprotected: the same attack with nobody looking on; ``None`` if that run is missing.
    """

    scenario: Scenario
    measures: Measures
    clean: Measures | None
    unprotected: Measures | None

    @property
    def gap(self) -> float | None:
        """Validation loss above that of the clean run; infinite where training diverged."""
        return _gap(self.measures, self.clean)

    @property
    def unprotected_gap(self) -> float | None:
        """What the attack costs where nobody looks on."""
        return _gap(self.unprotected, self.clean) if self.scenario.attacked else None

    @property
    def flat(self) -> dict[str, Any]:
        """One level of plain values, for files. A validation loss or a gap is empty where training diverged."""
        scenario = self.scenario
        measures = asdict(self.measures)
        iterations = self.measures.iterations
        measures["iterations"] = " ".join(map(str, iterations))
        measures["guilty"] = " ".join(f"{stage}:{replica}" for stage, replica in self.measures.guilty)
        measures["banned_at"] = " ".join(f"{stage}:{replica}@{step}" for stage, replica, step in self.measures.banned_at)
        for long in ("flagged_at", "works", "norms"):  # in the run's own file
            del measures[long]
        training = asdict(scenario.training)
        del training["steps"]  # the measured number of steps bears the name
        return {
            "attack": scenario.attack,
            "direction": scenario.direction if scenario.attacked else "",
            "variant": scenario.variant,
            "method": scenario.method,
            "seed": scenario.seed,
            "fraction": scenario.fraction,
            **training,
            **measures,
            "iterations_mean": fmean(iterations) if iterations else None,
            "iterations_median": median(iterations) if iterations else None,
            "iterations_max": max(iterations, default=None),
            "false_positive_rate": ratio(self.measures.honest_flagged, self.measures.honest_signals),
            "detection_rate": ratio(self.measures.tampered_flagged, self.measures.tampered_signals),
            "audit_share": ratio(self.measures.audits, self.measures.signals),
            "clean_loss": self.clean.validation_loss if self.clean else None,
            "loss_gap": _finite(self.gap),
            "unprotected_loss_gap": _finite(self.unprotected_gap),
            "key": scenario.key,
        }


def _gap(run: Measures | None, clean: Measures | None) -> float | None:
    if run is None or clean is None or clean.validation_loss is None:
        return None
    return float("inf") if run.validation_loss is None else run.validation_loss - clean.validation_loss


def _finite(value: float | None) -> float | None:
    return None if value == float("inf") else value


def ratio(part: int, whole: int) -> float | None:
    """``None`` where there is nothing to take a share of."""
    return part / whole if whole else None


def rows(scenarios: Iterable[Scenario], results: Mapping[str, Measures]) -> list[Row]:
    """Every run that was made, in the order of the scenarios."""
    return [
        Row(run, results[run.key], results.get(run.clean.key), results.get(run.unprotected.key))
        for run in scenarios
        if run.key in results
    ]


@dataclass(frozen=True)
class Group:
    """The runs that differ in nothing but the seed.

    Example:
        >>> run = Measures([[1, 0]], [[1, 0, 61]], 1.0, 1.0, 1.0, [2], 0, 100, 1, 2, 2, 5, 200, 60, 2.5, 0.1)
        >>> clean = Measures([], [], 1.0, 1.0, 1.0, [], 0, 0, 0, 0, 0, 0, 200, 60, 2.25, 0.1)
        >>> scenario = Scenario("audited", 0, attack="zeros", spec="zeros", direction="gradient")
        >>> group = Group((Row(scenario, run, clean, None),))
        >>> group.f1, group.iterations, group.false_positive_rate, group.audit_share, group.gap
        (1.0, 2.0, 0.01, 0.025, 0.25)
    """

    rows: tuple[Row, ...]

    @property
    def scenario(self) -> Scenario:
        """That of the first seed."""
        return self.rows[0].scenario

    @property
    def name(self) -> tuple[str, str, str]:
        """Attack, direction and variant."""
        first = self.scenario
        return first.attack, first.direction if first.attacked else "", first.variant

    @property
    def f1(self) -> float | None:
        """Mean over seeds; ``None`` where nobody was malicious."""
        return self._mean("f1") if self.scenario.attacked else None

    @property
    def recall(self) -> float | None:
        """Mean over seeds; ``None`` where nobody was malicious."""
        return self._mean("recall") if self.scenario.attacked else None

    @property
    def iterations(self) -> float | None:
        """Mean over all malicious workers that were banned."""
        found = [iterations for row in self.rows for iterations in row.measures.iterations]
        return fmean(found) if found else None

    @property
    def false_positive_rate(self) -> float | None:
        return self._share("honest_flagged", "honest_signals")

    @property
    def detection_rate(self) -> float | None:
        """Share of the tampered signals that were flagged."""
        return self._share("tampered_flagged", "tampered_signals")

    @property
    def false_bans(self) -> float:
        """A run, on average."""
        return self._mean("false_bans")

    @property
    def audit_share(self) -> float | None:
        return self._share("audits", "signals")

    @property
    def gap(self) -> float | None:
        """Mean over seeds; infinite if one diverged."""
        return _mean_of(row.gap for row in self.rows)

    @property
    def unprotected_gap(self) -> float | None:
        return _mean_of(row.unprotected_gap for row in self.rows)

    def _mean(self, name: str) -> float:
        return fmean(getattr(row.measures, name) for row in self.rows)

    def _share(self, part: str, whole: str) -> float | None:
        return ratio(sum(getattr(row.measures, part) for row in self.rows), sum(getattr(row.measures, whole) for row in self.rows))


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def grouped(runs: Sequence[Row]) -> list[Group]:
    """Runs that differ only in the seed, together; groups in the order of their first run."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in runs:
        scenario = row.scenario
        direction = scenario.direction if scenario.attack != NO_ATTACK else ""
        groups.setdefault((scenario.attack, direction, scenario.variant, scenario.method), []).append(row)
    return [Group(tuple(members)) for members in groups.values()]


def as_csv(runs: Sequence[Row]) -> str:
    """One line a run."""
    flat = [row.flat for row in runs]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]) if flat else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def as_json(runs: Sequence[Row]) -> str:
    """One object a run."""
    return json.dumps([row.flat for row in runs], indent=1, allow_nan=False) + "\n"
