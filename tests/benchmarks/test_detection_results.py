"""From runs to tables, against numbers made by hand."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_sentinel.benchmarks.detection import figures
from lightning_sentinel.benchmarks.detection.bars import Bar, misses
from lightning_sentinel.benchmarks.detection.measures import Measures
from lightning_sentinel.benchmarks.detection.results import Group, as_csv, as_json, grouped, rows
from lightning_sentinel.benchmarks.detection.scenarios import Scenario
from lightning_sentinel.benchmarks.detection.tables import markdown, terminal
from lightning_sentinel.errors import MissingExtraError


def measures(**changes: Any) -> Measures:
    settings: dict[str, Any] = {
        "guilty": [[1, 0], [2, 1]],
        "banned_at": [[1, 0, 61], [2, 1, 63]],
        "precision": 1.0,
        "recall": 1.0,
        "f1": 1.0,
        "iterations": [2, 4],
        "false_bans": 0,
        "honest_signals": 100,
        "honest_flagged": 1,
        "tampered_signals": 10,
        "tampered_flagged": 9,
        "audits": 10,
        "signals": 200,
        "steps": 60,
        "validation_loss": 2.5,
        "seconds_per_step": 0.1,
    }
    return Measures(**(settings | changes))


def attack(method: str, seed: int, direction: str = "gradient") -> Scenario:
    return Scenario(method, seed, attack="x10", spec={"name": "scale", "factor": 10.0}, direction=direction, fraction=0.25)


CLEAN = {0: 2.0, 1: 2.25}
RUNS = [
    (attack("audited", 0), measures()),
    (
        attack("audited", 1),
        measures(f1=0.5, iterations=[9], false_bans=3, honest_signals=300, honest_flagged=7, audits=0, steps=20),
    ),
    (attack("unprotected", 0), measures(validation_loss=4.0, honest_signals=0, f1=0.0, iterations=[], audits=0)),
    (attack("unprotected", 1), measures(validation_loss=5.0, honest_signals=0, f1=0.0, iterations=[], audits=0)),
    (
        Scenario("sentinel", 0),
        measures(guilty=[], banned_at=[[3, 1, 80]], f1=0.0, iterations=[], false_bans=1, validation_loss=2.01),
    ),
    *((Scenario("unprotected", seed), measures(guilty=[], validation_loss=loss)) for seed, loss in CLEAN.items()),
]
"""Two seeds of an attack, and a clean verified run."""


@pytest.fixture
def groups() -> dict[tuple[str, str], Group]:
    made = grouped(rows([run for run, _ in RUNS], {run.key: found for run, found in RUNS}))
    return {(group.scenario.attack, group.scenario.method): group for group in made}


def test_means_over_seeds(groups: dict[tuple[str, str], Group]) -> None:
    group = groups["x10", "audited"]
    assert len(group.rows) == 2
    assert group.f1 == pytest.approx(0.75)
    assert group.iterations == pytest.approx((2 + 4 + 9) / 3)
    assert group.false_positive_rate == pytest.approx(8 / 400)
    assert group.detection_rate == pytest.approx(18 / 20)
    assert group.false_bans == pytest.approx(1.5)
    assert group.audit_share == pytest.approx(10 / 400)
    assert group.gap == pytest.approx((0.5 + 0.25) / 2)
    assert group.unprotected_gap == pytest.approx((2.0 + 2.75) / 2)


def test_where_nobody_is_malicious_there_is_no_f1(groups: dict[tuple[str, str], Group]) -> None:
    group = groups["none", "sentinel"]
    assert (group.f1, group.iterations, group.unprotected_gap, group.false_bans) == (None, None, None, 1.0)
    assert group.gap == pytest.approx(0.01)


def test_what_cannot_be_compared_is_left_open() -> None:
    run = attack("sentinel", 0)
    (row,) = rows([run], {run.key: measures()})
    assert (row.gap, row.unprotected_gap) == (None, None)


def test_a_training_that_diverged_is_called_so() -> None:
    run, clean = attack("sentinel", 0), Scenario("unprotected", 0)
    found = {run.key: measures(validation_loss=None), clean.key: measures()}
    (group,) = grouped(rows([run], found))
    assert "diverged" in markdown("Title", [group])
    assert json.loads(as_json(group.rows))[0]["loss_gap"] is None


def test_the_table_has_a_line_for_every_attack_and_a_column_for_every_method(groups: dict[tuple[str, str], Group]) -> None:
    text = markdown("How well?", list(groups.values()))
    assert text.startswith(
        "# How well?\n\n8 stages x 8 replicas; 2 micro-batches of 2 x 32 bytes of code a replica and step; llama of width 64;"
        " 60 honest steps, then 60; 25 % malicious in each middle stage; seeds 0, 1.\n"
    )
    lines = text[text.index("| attack |") :].splitlines()
    assert len(lines) == 2 + 2
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["x10", "gradient", "+2.375", "75.0 / 5.0 / 1.5 / 2.5 % / +0.375", "-"]
    assert terminal("How well?", list(groups.values())).row_count == 2


def test_kinds_of_attacks_are_summed_up(groups: dict[tuple[str, str], Group]) -> None:
    other = replace(attack("audited", 0), attack="x1.1", direction="activation")
    better = Group(tuple(rows([other], {other.key: measures(iterations=[1], validation_loss=2.0)})))
    page = markdown("Which?", [groups["x10", "audited"], groups["x10", "unprotected"], better, groups["none", "sentinel"]])
    published, unprotected, subtle = (line.split(" | ") for line in page.splitlines() if "published" in line or "subtle" in line)
    # Two seeds of one attack: F1 1 and 0.5, bans after 2, 4 and 9 steps, 0 and 3 honest ones, 10 of 400 signals audited.
    assert published == ["| published", "audited", "75.0, 75.0", "5.0", "1.50", "2.5 %", "+0.375, +0.375 |"]
    assert unprotected == ["| published", "unprotected", "", "", "", "", "+2.375, +2.375 |"]
    assert subtle[:4] == ["| subtle", "audited", "100.0, 100.0", "1.0"]


def test_files_have_one_entry_for_every_run(groups: dict[tuple[str, str], Group]) -> None:
    runs = [row for group in groups.values() for row in group.rows]
    lines = list(csv.DictReader(io.StringIO(as_csv(runs))))
    entries = json.loads(as_json(runs))
    assert len(lines) == len(entries) == len(RUNS)
    first = entries[0]
    assert (first["attack"], first["method"], first["seed"], first["guilty"]) == ("x10", "audited", 0, "1:0 2:1")
    assert (first["iterations_mean"], first["iterations_median"], first["iterations_max"]) == (3.0, 3.0, 4)
    assert (first["clean_loss"], first["loss_gap"], first["unprotected_loss_gap"]) == (2.0, 0.5, 2.0)
    assert first["false_positive_rate"] == 0.01
    assert lines[0]["banned_at"] == "1:0@61 2:1@63"
    assert {line["key"] for line in lines} == {run.key for run, _ in RUNS}


def test_a_missed_bar_names_the_attack_the_value_and_the_bar(groups: dict[tuple[str, str], Group]) -> None:
    bars = [
        Bar("audited", "f1", 0.99, at_least=True),
        Bar("audited", "false_bans", 1.5),
        Bar("audited", "audit_share", 0.02),
        Bar("sentinel", "f1", 0.99, at_least=True),
        Bar("sentinel", "false_bans", 0.0),
    ]
    assert misses(groups.values(), bars) == [
        "audited, gradient x10: f1 is 0.750 and must be at least 0.99",
        "audited, gradient x10: audit_share is 0.025 and must be at most 0.02",
        "sentinel, none: false_bans is 1.000 and must be at most 0",
    ]


@pytest.mark.parametrize(("suite", "files"), [("attacks", {"f1.png"}), ("strength", {"f1.png", "harm.png"})])
def test_figures(suite: str, files: set[str], groups: dict[tuple[str, str], Group], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = figures.draw(suite, list(groups.values()), tmp_path)
    assert {file.name for file in drawn} == files == {file.name for file in tmp_path.iterdir()}
    assert all(file.stat().st_size > 5000 for file in drawn)


def test_nothing_is_drawn_where_nobody_attacks(groups: dict[tuple[str, str], Group], tmp_path: Path) -> None:
    assert figures.draw("clean", [groups["none", "sentinel"]], tmp_path) == []


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib.*pip install 'lightning-sentinel\[report\]'"):
        figures.require_matplotlib()


def test_an_order_of_runs_is_kept() -> None:
    runs = [attack("audited", seed, direction) for direction in ("gradient", "activation") for seed in (0, 1)]
    made = grouped(rows(runs, {run.key: replace(measures(), steps=1) for run in runs}))
    assert [group.scenario.direction for group in made] == ["gradient", "activation"]
