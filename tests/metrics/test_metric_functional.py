from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.metrics.functional import confusion, nanmax


def test_confusion_marks_the_ranks_of_the_workers() -> None:
    mesh = Mesh(stages=3, replicas=2)
    detected, malicious = {Worker(0, 1), Worker(2, 0)}, [Worker(2, 1)]
    preds, target = confusion(detected, malicious, mesh)
    assert preds.dtype == target.dtype == torch.bool
    assert preds.tolist() == [worker in detected for worker in mesh.workers]
    assert target.tolist() == [worker in malicious for worker in mesh.workers]


def test_confusion_of_nobody() -> None:
    preds, target = confusion(set(), frozenset(), Mesh(2, 2))
    assert preds.shape == target.shape == (4,)
    assert not preds.any() and not target.any()


def test_confusion_counts_a_worker_that_is_named_twice_once() -> None:
    preds, _ = confusion([Worker(0, 0), Worker(0, 0)], [], Mesh(2, 2))
    assert preds.sum() == 1


@pytest.mark.parametrize("stranger", [Worker(2, 0), Worker(0, 2), Worker(-1, 0)])
@pytest.mark.parametrize("side", [0, 1])
def test_confusion_refuses_a_worker_outside_the_mesh(stranger: Worker, side: int) -> None:
    sets = [{stranger}, set()] if side == 0 else [set(), {stranger}]
    with pytest.raises(ConfigurationError, match="not in the mesh"):
        confusion(*sets, Mesh(2, 2))


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_nanmax_is_numpys(dim: int) -> None:
    values = np.random.default_rng(0).normal(size=(7, 5, 3)).astype("float32")
    values[values > 0.3] = np.nan
    values[0] = np.nan
    values[1, 1] = np.inf
    values[:, 2, 2] = np.nan
    expected = np.nanmax(values, axis=dim)
    assert np.isnan(expected).any() and np.isinf(expected).any()
    np.testing.assert_array_equal(nanmax(torch.from_numpy(values), dim).numpy(), expected)


def test_nanmax_of_a_scalar_pair_keeps_the_number() -> None:
    assert nanmax(torch.tensor([math.nan, -3.0])).item() == -3.0
