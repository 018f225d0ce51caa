"""The command: from its arguments to runs, tables, figures and, for the quick suite, an exit status."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_sentinel import attacks as library
from lightning_sentinel.benchmarks.detection.attacks import STEERING, WITHIN, attack_named
from lightning_sentinel.benchmarks.detection.backdoor_table import backdoor_table
from lightning_sentinel.benchmarks.detection.bars import misses
from lightning_sentinel.benchmarks.detection.figures import draw, require_matplotlib
from lightning_sentinel.benchmarks.detection.measures import Measures
from lightning_sentinel.benchmarks.detection.results import Group, as_csv, as_json, grouped, rows
from lightning_sentinel.benchmarks.detection.rivals_table import beside_rivals
from lightning_sentinel.benchmarks.detection.runs import Campaign, Folder, write_atomically
from lightning_sentinel.benchmarks.detection.scenarios import METHODS, Scenario, choose
from lightning_sentinel.benchmarks.detection.suites import SUITES, Request, scenarios
from lightning_sentinel.benchmarks.detection.tables import markdown, terminal
from lightning_sentinel.errors import ConfigurationError, SentinelError

__all__ = ["detection"]

_DIRECTIONS = ("activation", "gradient", "both")
_SHOWN_OF_A_FAILURE = 3
_TABLE_WIDTH = 140


def detection(
    suite: Literal[
        "attacks",
        "mixed",
        "share",
        "ablation",
        "replicas",
        "collusion",
        "places",
        "insiders",
        "tolerance",
        "faults",
        "contributions",
        "backdoor",
        "strength",
        "clean",
        "quick",
    ] = "attacks",
    quick: bool = False,
    output: Path = Path("benchmark-detection"),
    stages: int | None = None,
    replicas: int | None = None,
    micro_batches: int | None = None,
    fraction: float | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    warmup_steps: int | None = None,
    methods: list[str] | str | None = None,
    attacks: list[str] | str | None = None,
    directions: list[str] | str | None = None,
    model: Literal["llama", "gpt"] | None = None,
    data: Literal["code", "prose", "code+prose"] | None = None,
    workers: int | None = None,
) -> None:
    """Measure which attacks are found, how soon, and at what cost, in a mesh that is simulated on this machine.

    Every run trains a small language model honestly, lets some workers tamper from then on, and is compared with the same training
    without an attack. A setting that is left out is that of the suite. A run that is already in the output folder, with the same
    settings and the same versions of this package, Python and torch, is not made again: the same command goes on where it was
    stopped, and suites share runs. If the package's code has changed and its version has not, choose another folder.

    Args:
        suite: which question to answer: each attack by itself, malicious workers that do different things, the share of malicious
            workers, parts of the detector left out, the number of replicas, workers that act together, workers at the ends of the
            pipeline, in one pipeline or that start late, those who know more than they should or lie as auditors,
            those who err by as much as audits let pass, processors that multiply wrongly, those who corrupt weight gradients
            inside their stage or move its weights towards a backdoor, the strength of an attack, or nobody malicious at all.
        quick: the suite "quick" in a few minutes, with an exit status of 1 if detection got worse.
        output: folder for results; nothing is written outside it.
        stages: pipeline stages, 8 in most suites.
        replicas: pipelines, 8 in most suites.
        micro_batches: number of micro-batches of a replica in a step, 2 in most suites.
        fraction: share of malicious workers in each middle stage, 0.375 in most suites.
        seeds: runs that differ only in the seed, 3 in most suites.
        steps: under attack, 60 in most suites.
        warmup_steps: honest steps before, 60 in most suites.
        methods: of unprotected, paper, sentinel, audited and duplicated; as a list, or separated by commas.
        attacks: by name, as a list, or separated by commas.
        directions: of activation, gradient and both; as a list, or separated by commas.
        model: architecture; llama in all suites.
        data: what is learned: Python's sources, the English of its manual, or one and then the other.
        workers: processes with one thread each, as many as there are cores by default; 0 runs everything in this process.

    Raises:
        ConfigurationError: if a value cannot work.
        MissingExtraError: without matplotlib.
        SentinelError: if runs failed; the others are kept and shown.
    """
    name = "quick" if quick else suite
    if quick and suite not in ("attacks", "quick"):
        raise ConfigurationError(f"quick=True contradicts suite={suite!r}: it is a suite of its own. Leave one of the two out.")
    chosen = {
        "stages": stages,
        "replicas": replicas,
        "micro_batches": micro_batches,
        "steps": steps,
        "warmup_steps": warmup_steps,
        "model": model,
        "data": data,
    }
    given = {setting: value for setting, value in chosen.items() if value is not None}
    request = _request(name, given, fraction, seeds, _names(methods), _names(attacks), _names(directions))
    workers = _workers(workers)
    require_matplotlib()
    runs = scenarios(name, request)
    folder = Folder(output)
    groups, failures = _make(runs, folder, workers)
    _write(name, groups, output / name)
    if failures:
        raise SentinelError(_failed(failures, len(runs)))
    if name == "quick" and (found := misses(groups)):
        raise SystemExit("Detection is worse than it must be:\n" + "\n".join(f"  {miss}" for miss in found))


def _request(
    suite: str,
    training: dict[str, Any],
    fraction: float | None,
    seeds: int | None,
    methods: Sequence[str] | None,
    attacks: Sequence[str] | None,
    directions: Sequence[str] | None,
) -> Request:
    """The suite's defaults with what the user gave."""
    default = choose("suite", suite, SUITES)
    for method in methods or ():
        choose("methods", method, METHODS)
    for direction in directions or ():
        choose("directions", direction, dict.fromkeys(_DIRECTIONS))
    if seeds is not None and seeds < 1:
        raise ConfigurationError(f"seeds={seeds} cannot work: it must be at least 1.")
    specs = default.attacks if attacks is None else {name: attack_named(name) for name in attacks}
    for spec in specs.values():
        if spec not in (WITHIN | STEERING).values():
            library.resolve(spec)
    return Request(
        training=replace(default.training, **training),
        fraction=default.fraction if fraction is None else fraction,
        seeds=default.seeds if seeds is None else seeds,
        methods=default.methods if methods is None else methods,
        attacks=specs,
        directions=default.directions if directions is None else directions,
    )


def _names(given: list[str] | str | None) -> list[str] | None:
    """A list, or names separated by commas."""
    if given is None:
        return None
    names = given.split(",") if isinstance(given, str) else given
    return [name.strip() for name in names if name.strip()]


def _workers(given: int | None) -> int:
    if given is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if given < 0:
        raise ConfigurationError(f"workers={given} cannot work: it must be at least 1, or 0 for this process alone.")
    return given


def _make(runs: Sequence[Scenario], folder: Folder, workers: int) -> tuple[list[Group], dict[str, str]]:
    """Make the runs under a progress bar.

    Returns:
        the results, and the failures: name to reason.
    """
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    campaign = Campaign(runs, folder, workers)
    finished = sum(folder.run(run).is_file() for run in runs)
    with Progress(*columns, console=console, disable=finished == len(runs)) as progress:
        task = progress.add_task("starting", total=len(runs) - finished)

        def show(run: Scenario, result: Measures | str) -> None:
            line = f"{run.name}: {_short(result)}"
            progress.update(task, advance=1, description=line)
            # Where there is no bar to look at, and for what must not scroll away with it.
            if isinstance(result, str) or not console.is_terminal:
                console.print(line, highlight=False, markup=False)

        if finished:
            console.print(f"{finished} of {len(runs)} runs are in {folder.path} already.", highlight=False)
        campaign.report = show
        try:
            results = campaign.run()
        except KeyboardInterrupt:
            kept = sum(folder.run(run).is_file() for run in runs)
            message = f"Stopped. {kept} of {len(runs)} runs are kept in {folder.path}; the same command makes the others."
            raise SystemExit(message) from None
    names = {run.key: run.name for run in runs}
    return grouped(rows(runs, results)), {names[key]: reason for key, reason in campaign.failures.items()}


def _short(result: Measures | str) -> str:
    if isinstance(result, str):
        return f"failed: {result.strip().splitlines()[-1]}"
    loss = "diverged" if result.validation_loss is None else f"loss {result.validation_loss:.3f}"
    return f"F1 {100 * result.f1:.0f}, {result.false_bans} false bans, {loss}"


def _write(suite: str, groups: Sequence[Group], folder: Path) -> None:
    """Write the tables and figures of the runs that are finished."""
    if not groups:
        return
    title = SUITES[suite].about
    console = Console()
    if not console.is_terminal:
        # A file or a pipe has no width of its own, and the one that is guessed is too narrow.
        console = Console(width=_TABLE_WIDTH)
    console.print(terminal(title, groups))
    runs = [row for group in groups for row in group.rows]
    write_atomically(folder / "results.csv", as_csv(runs))
    write_atomically(folder / "results.json", as_json(runs))
    write_atomically(folder / "table.md", markdown(title, groups))
    if suite == "faults":
        write_atomically(folder / "rivals.md", beside_rivals(title, groups))
    if suite == "backdoor":
        write_atomically(folder / "backdoor.md", backdoor_table(title, groups))
    draw(suite, groups, folder)
    console.print(f"Written to {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}", highlight=False)


def _failed(failures: dict[str, str], total: int) -> str:
    shown = [f"{name}:\n{reason.rstrip()}" for name, reason in list(failures.items())[:_SHOWN_OF_A_FAILURE]]
    others = len(failures) - len(shown)
    more = [f"and {others} more"] if others else []
    head = f"{len(failures)} of {total} runs failed; the others are kept, and the same command makes these again."
    return "\n\n".join([head, *shown, *more])
