from __future__ import annotations

import math
import pickle
from collections.abc import Collection, Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torchmetrics import Metric, MetricCollection

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.metrics import (
    DetectionDelay,
    DetectionF1,
    DetectionPrecision,
    DetectionRecall,
    FalsePositiveRate,
)

mpl.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

MESH = Mesh(stages=4, replicas=3)
EVERYBODY = frozenset(MESH.workers)
NOBODY: frozenset[Worker] = frozenset()
CLASSES = [DetectionPrecision, DetectionRecall, DetectionF1, FalsePositiveRate]

Run = tuple[Collection[Worker], Collection[Worker]]


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def drawn_runs(count: int, seed: int = 0) -> list[Run]:
    rng = np.random.default_rng(seed)

    def draw() -> set[Worker]:
        return {MESH.worker(int(rank)) for rank in np.flatnonzero(rng.random(MESH.size) < 0.4)}

    return [(draw(), draw()) for _ in range(count)]


def by_hand(cls: type[Metric], runs: list[Run]) -> float:
    tp = sum(len(set(detected) & set(malicious)) for detected, malicious in runs)
    fp = sum(len(set(detected) - set(malicious)) for detected, malicious in runs)
    fn = sum(len(set(malicious) - set(detected)) for detected, malicious in runs)
    honest = sum(MESH.size - len(set(malicious)) for _, malicious in runs)
    if cls is FalsePositiveRate:
        return fp / honest
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    if cls is DetectionF1:
        return 2 * precision * recall / (precision + recall)
    return precision if cls is DetectionPrecision else recall


def metric_of(cls: type[Metric], runs: list[Run]) -> Any:
    metric = cls(stages=MESH.stages, replicas=MESH.replicas)
    for run in runs:
        metric.update(*run)
    return metric


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("runs", [drawn_runs(1), drawn_runs(1, seed=3), drawn_runs(8, seed=1)])
def test_it_is_what_one_counts_by_hand(cls: type[Metric], runs: list[Run]) -> None:
    value = metric_of(cls, runs).compute()
    assert value.shape == ()
    assert value.item() == pytest.approx(by_hand(cls, runs))


@pytest.mark.parametrize("validate_args", [True, False])
@pytest.mark.parametrize("cls", CLASSES)
def test_arguments_are_those_of_torchmetrics(cls: type[Metric], validate_args: bool) -> None:
    for value in (0, 1):
        metric = cls(1, 1, validate_args=validate_args, zero_division=value)
        metric.update(NOBODY, {Worker(0, 0)} if cls in (FalsePositiveRate, DetectionPrecision) else NOBODY)
        assert metric.compute() == value
    with pytest.raises(ValueError, match="zero_division"):
        cls(1, 1, zero_division=0.5)


SOME = frozenset({Worker(0, 0), Worker(3, 2)})


@pytest.mark.parametrize(
    ("detected", "malicious", "precision", "recall", "f1", "rate"),
    [
        pytest.param(NOBODY, NOBODY, 1, 1, 1, 0, id="a clean run"),
        pytest.param(NOBODY, SOME, 1, 0, 0, 0, id="all missed"),
        pytest.param(SOME, NOBODY, 0, 1, 0, 2 / 12, id="only false alarms"),
        pytest.param(SOME, SOME, 1, 1, 1, 0, id="perfect"),
        pytest.param(EVERYBODY, SOME, 2 / 12, 1, 2 * 2 / 14, 1, id="everybody accused"),
        pytest.param(EVERYBODY, EVERYBODY, 1, 1, 1, 0, id="nobody honest"),
        pytest.param(NOBODY, EVERYBODY, 1, 0, 0, 0, id="nobody honest, nobody found"),
    ],
)
def test_edges(
    detected: Collection[Worker], malicious: Collection[Worker], precision: float, recall: float, f1: float, rate: float
) -> None:
    values = [metric_of(cls, [(detected, malicious)]).compute().item() for cls in CLASSES]
    assert values == pytest.approx([precision, recall, f1, rate])


@pytest.mark.parametrize("cls", CLASSES)
def test_merging_two_is_updating_one(cls: type[Metric]) -> None:
    runs = drawn_runs(7)
    first, second = metric_of(cls, runs[:3]), metric_of(cls, runs[3:])
    first.merge_state(second)
    assert first.compute() == metric_of(cls, runs).compute()


@pytest.mark.parametrize("cls", CLASSES)
def test_calling_it_judges_the_run_and_accumulates(cls: type[Metric]) -> None:
    runs = drawn_runs(2)
    metric = metric_of(cls, [])
    assert [metric(*run).item() for run in runs] == pytest.approx([by_hand(cls, [run]) for run in runs])
    assert metric.compute().item() == pytest.approx(by_hand(cls, runs))


@pytest.mark.parametrize("cls", CLASSES)
def test_reset_forgets(cls: type[Metric]) -> None:
    metric = metric_of(cls, drawn_runs(4))
    metric.reset()
    run = drawn_runs(1, seed=5)
    metric.update(*run[0])
    assert metric.compute().item() == pytest.approx(by_hand(cls, run))


@pytest.mark.parametrize("cls", CLASSES)
def test_pickle_and_state_dict_round_trip(cls: type[Metric]) -> None:
    metric, other = metric_of(cls, drawn_runs(3)), metric_of(cls, [])
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()
    assert metric.state_dict() == {}
    metric.persistent(True)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    other.update(NOBODY, NOBODY)
    metric.update(NOBODY, NOBODY)
    assert other.compute() == metric.compute()


@pytest.mark.parametrize("cls", CLASSES)
def test_a_worker_outside_the_mesh_is_refused_and_leaves_no_trace(cls: type[Metric]) -> None:
    metric = metric_of(cls, drawn_runs(1))
    value = metric.compute()
    with pytest.raises(ConfigurationError, match="not in the mesh"):
        metric.update({Worker(4, 0)}, NOBODY)
    assert metric.compute() == value


@pytest.mark.parametrize("cls", [*CLASSES, DetectionDelay])
def test_a_mesh_without_workers_is_refused(cls: type[Metric]) -> None:
    with pytest.raises(ConfigurationError):
        cls(stages=1, replicas=0)


@pytest.mark.parametrize("cls", CLASSES)
def test_plot_returns_a_figure(cls: type[Metric]) -> None:
    metric = metric_of(cls, drawn_runs(2))
    figure, ax = metric.plot()
    figure.canvas.draw()
    assert ax.get_ylabel() == cls.__name__
    assert ax.get_lines()[0].get_ydata() == pytest.approx([metric.compute().item()])
    values = [metric(*run) for run in drawn_runs(3)]
    assert len(metric.plot(values)[1].get_lines()[0].get_ydata()) == 3


def test_all_of_them_share_one_collection() -> None:
    collection = MetricCollection([cls(stages=4, replicas=3) for cls in CLASSES])
    runs = drawn_runs(3)
    for run in runs:
        collection.update(*run)
    expected = {cls.__name__: pytest.approx(by_hand(cls, runs)) for cls in CLASSES}
    assert {name: value.item() for name, value in collection.compute().items()} == expected


A, B, C, D = Worker(0, 0), Worker(1, 1), Worker(2, 2), Worker(3, 0)


def test_delay_is_the_mean_over_those_who_were_caught() -> None:
    metric = DetectionDelay(stages=4, replicas=3)
    metric.update(started={A: 100, B: 200, C: 300}, banned={A: 104, B: 210})
    assert metric.compute().shape == ()
    assert metric.compute().item() == 7.0
    assert metric.missed == 1
    metric.update(started={D: 0}, banned={D: 1})
    assert metric.compute().item() == pytest.approx(np.mean([4, 10, 1]))


def test_a_ban_in_the_first_tampered_step_has_delay_0() -> None:
    metric = DetectionDelay(stages=4, replicas=3)
    metric.update({A: 5}, {A: 5})
    assert metric.compute().item() == 0.0


def test_false_bans_are_neither_delays_nor_misses() -> None:
    metric = DetectionDelay(stages=4, replicas=3)
    metric.update(started={A: 100, B: 100}, banned={A: 99, B: 102, C: 150})
    assert metric.compute().item() == 2.0
    assert metric.missed == 0


@pytest.mark.parametrize(("started", "missed"), [({}, 0), ({A: 3}, 1)])
def test_delay_is_nan_when_nobody_was_caught(started: dict[Worker, int], missed: int) -> None:
    metric = DetectionDelay(stages=4, replicas=3)
    metric.update(started, {})
    assert math.isnan(metric.compute().item())
    assert metric.missed == missed


def test_delay_refuses_a_worker_outside_the_mesh() -> None:
    metric = DetectionDelay(stages=4, replicas=3)
    with pytest.raises(ConfigurationError, match="not in the mesh"):
        metric.update({A: 1}, {Worker(0, 3): 2})
    assert metric.missed == 0


def test_delay_merges_resets_and_pickles() -> None:
    first, second = DetectionDelay(stages=4, replicas=3), DetectionDelay(stages=4, replicas=3)
    first.update({A: 0, B: 0}, {A: 2})
    second.update({A: 0, B: 0, C: 0}, {A: 5, B: 8})
    first.merge_state(second)
    assert first.compute().item() == 5.0
    assert first.missed == 2
    twin = pickle.loads(pickle.dumps(first))
    assert (twin.compute(), twin.missed) == (first.compute(), first.missed)
    first.reset()
    assert first.missed == 0
    first.update({A: 1}, {A: 2})
    assert first.compute().item() == 1.0


def test_calling_the_delay_returns_that_of_the_run() -> None:
    metric = DetectionDelay(stages=4, replicas=3)
    assert metric({A: 0}, {A: 2}).item() == 2.0
    assert metric({A: 0, B: 0}, {A: 6}).item() == 6.0
    assert metric.compute().item() == 4.0
    assert metric.missed == 1


def test_delay_state_dict_and_plot() -> None:
    metric, other = DetectionDelay(stages=4, replicas=3), DetectionDelay(stages=4, replicas=3)
    metric.update({A: 0, B: 0}, {A: 2})
    metric.persistent(True)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    assert (other.metric_state["missed"], other.mean_value) == (metric.missed, metric.mean_value)
    figure, ax = metric.plot()
    figure.canvas.draw()
    assert ax.get_ylabel() == "DetectionDelay"
    assert torch.isfinite(metric.compute())
