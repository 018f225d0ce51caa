"""Who computes a metric where no step runs is told, once and only in the middle of an epoch."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torchmetrics import MeanMetric

from lightning_sentinel.pipeline.batch_metrics import alone
from lightning_sentinel.pipeline.results.absent_metrics import NothingHere


@pytest.fixture
def metric() -> MeanMetric:
    return MeanMetric()


def computed(metric: MeanMetric) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metric.compute()
    return [str(one.message) for one in caught if "in the middle of an epoch" in str(one.message)]


def test_it_is_said_once_where_nothing_was_seen(metric: MeanMetric) -> None:
    under_way: set[str] = set()
    metric.distributed_available_fn = NothingHere("mean", metric, 1, under_way, set())
    assert computed(metric) == []
    metric._computed = None
    under_way.add("train")
    (text,) = computed(metric)
    assert "self.mean.compute()" in text and "stage 1 runs no whole step" in text and "on_step=True" in text
    metric._computed = None
    assert computed(metric) == []


def test_what_a_hook_has_updated_is_computed_without_a_word(metric: MeanMetric) -> None:
    metric.distributed_available_fn = NothingHere("mean", metric, 0, {"train"}, set())
    metric.update(torch.tensor(3.0))
    assert computed(metric) == [] and float(metric.compute()) == 3


def test_copies_are_of_no_run(metric: MeanMetric) -> None:
    metric.distributed_available_fn = NothingHere("mean", metric, 0, {"train"}, set())
    assert copy.deepcopy(metric).distributed_available_fn is alone
    assert pickle.loads(pickle.dumps(metric)).distributed_available_fn is alone
