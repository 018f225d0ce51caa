"""Runs scenarios on all cores and keeps what came of each in a file of its own, so that nothing is measured twice.

::

    output/warmups/<key>.ckpt    honest warm-ups, which many runs go on from
    output/task_vectors/<key>.pt  directions in which attackers move weights
    output/runs/<key>.json       one run: its settings, the versions it was measured with, what was measured
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import signal
import traceback
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_sentinel.benchmarks.detection.backdoor import train_task_vectors
from lightning_sentinel.benchmarks.detection.measures import Measures, measure
from lightning_sentinel.benchmarks.detection.scenarios import Scenario, versions
from lightning_sentinel.benchmarks.detection.training import train_warmup

__all__ = ["Campaign", "Folder"]


@dataclass(frozen=True)
class Folder:
    """Where results are kept.

    Args:
        path: nothing is written outside it.
    """

    path: Path

    def warmup(self, scenario: Scenario) -> Path:
        return self.path / "warmups" / f"{scenario.warmup_key}.ckpt"

    def task_vectors(self, scenario: Scenario) -> Path:
        return self.path / "task_vectors" / f"{scenario.warmup_key}-{'-'.join(map(str, scenario.attacked_stages))}.pt"

    def run(self, scenario: Scenario) -> Path:
        return self.path / "runs" / f"{scenario.key}.json"

    def read(self, scenario: Scenario) -> Measures | None:
        """What was measured before, if anything."""
        file = self.run(scenario)
        return Measures(**json.loads(file.read_text())["measures"]) if file.is_file() else None

    def write(self, scenario: Scenario, measures: Measures) -> None:
        """Whole or not at all, whenever the process ends."""
        record = {
            "name": scenario.name,
            "settings": scenario.settings,
            "versions": versions(),
            "measures": asdict(measures),
        }
        write_atomically(self.run(scenario), json.dumps(record, indent=1, allow_nan=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Through a temporary file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(text)
    temporary.replace(path)


def perform(scenario: Scenario, folder: Folder) -> Measures:
    """In a worker process: make a run and keep its measures."""
    warmup = folder.warmup(scenario)
    vectors = folder.task_vectors(scenario) if scenario.moves_weights else None
    if vectors is not None and not vectors.is_file():
        train_task_vectors(scenario, warmup, vectors)
    measures = measure(scenario, None if scenario.remembers else warmup, vectors)
    folder.write(scenario, measures)
    # A Trainer and what hangs on it are a ring of references; a process makes hundreds of them.
    gc.collect()
    return measures


def warm_up(scenario: Scenario, folder: Folder) -> None:
    """In a worker process: train a warm-up."""
    train_warmup(scenario, folder.warmup(scenario))


@dataclass
class Campaign:
    """Makes those of a list of runs that were not made before.

    Args:
        scenarios: the runs.
        folder: where they are kept.
        workers: processes, with one thread each; 0 is this process, to look into a run with a debugger.
        report: called after each run with its scenario and what came of it, or why it failed.
    """

    scenarios: Sequence[Scenario]
    folder: Folder
    workers: int
    report: Callable[[Scenario, Measures | str], None] = lambda scenario, result: None
    failures: dict[str, str] = field(default_factory=dict)
    """Key of the run to the reason."""

    _RESTARTS = 2

    def run(self) -> dict[str, Measures]:
        """All runs, those of earlier commands included.

        Returns:
            key to measures; runs that failed are missing, and in ``failures``.

        Raises:
            KeyboardInterrupt: if the user stops it. What is finished is kept.
        """
        results = {run.key: found for run in self.scenarios if (found := self.folder.read(run)) is not None}
        missing = [run for run in self.scenarios if run.key not in results]
        for _ in range(self._RESTARTS + 1):
            if not missing:
                break
            executor = self._executor(len(missing))
            try:
                self._run(executor, missing, results)
            except BrokenProcessPool:
                # A process died, by a signal or for want of memory, and took the pool with it: go on with a new one.
                results.update({run.key: found for run in missing if (found := self.folder.read(run)) is not None})
            except BaseException:
                _stop(executor)
                raise
            executor.shutdown()
            missing = [run for run in missing if run.key not in results and run.key not in self.failures]
        for run in missing:
            self._fail(run, "a worker process died again and again; with fewer --workers each has more memory")
        return results

    def _executor(self, runs: int) -> Executor:
        if self.workers == 0:
            return _ThisProcess()
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(min(self.workers, runs), context, initializer=_start_worker)

    def _run(self, executor: Executor, runs: Iterable[Scenario], results: dict[str, Measures]) -> None:
        """Warm-ups first; a run starts as soon as its warm-up is there."""
        waiting: dict[str, list[Scenario]] = {}
        pending: dict[Future[Any], tuple[Scenario, bool]] = {}
        for run in runs:
            if not run.needs_warmup or self.folder.warmup(run).is_file():
                pending[executor.submit(perform, run, self.folder)] = (run, False)
            else:
                waiting.setdefault(run.warmup_key, []).append(run)
        for first, *_ in waiting.values():
            pending[executor.submit(warm_up, first, self.folder)] = (first, True)
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in [one for one in pending if one in done]:
                run, is_warmup = pending.pop(future)
                affected = waiting.pop(run.warmup_key) if is_warmup else [run]
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise error
                if error is not None:
                    for one in affected:
                        self._fail(one, "".join(traceback.format_exception(error)))
                elif is_warmup:
                    for one in affected:
                        pending[executor.submit(perform, one, self.folder)] = (one, False)
                else:
                    results[run.key] = future.result()
                    self.report(run, results[run.key])

    def _fail(self, run: Scenario, reason: str) -> None:
        self.failures[run.key] = reason
        self.report(run, reason)


def _start_worker() -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches every process of the terminal; what becomes of the workers is the first one's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stop(executor: Executor) -> None:
    """At once: a run that is half done is worth nothing."""
    processes = list((getattr(executor, "_processes", None) or {}).values())
    executor.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        # Lightning would answer SIGTERM by finishing its step. Files are written whole or not at all.
        process.kill()


class _ThisProcess(Executor):
    """Runs what it is given at once, here."""

    def submit(self, fn: Callable[..., object], /, *args: object, **kwargs: object) -> Future[object]:  # type: ignore[override]
        future: Future[object] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future
