from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.verification import COLUMNS, SignalTable
from lightning_sentinel.verification.features import FEATURES
from lightning_sentinel.verification.table import signal_rows
from lightning_sentinel.wiring import Wiring


def test_rows_are_in_the_order_of_the_columns() -> None:
    rows = signal_rows(
        torch.arange(2.0 * len(FEATURES)).view(2, -1),
        torch.tensor([7.5, 0.25]),
        torch.tensor([2, -1]),
        torch.tensor([True, False]),
        torch.tensor([False, True]),
        positions=11,
        channels=5,
    )
    assert (rows.shape, rows.dtype) == ((2, len(COLUMNS)), torch.float32)
    one, other = (dict(zip(COLUMNS, row.tolist())) for row in rows)
    assert one == {
        **{name: float(index) for index, name in enumerate(FEATURES)},
        "score": 7.5,
        "worst": 2.0,
        "flagged": 1.0,
        "tainted": 0.0,
        "positions": 11.0,
        "channels": 5.0,
    }
    assert other == {
        **{name: float(len(FEATURES) + index) for index, name in enumerate(FEATURES)},
        "score": 0.25,
        "worst": -1.0,
        "flagged": 0.0,
        "tainted": 1.0,
        "positions": 11.0,
        "channels": 5.0,
    }


def test_columns_are_read_by_name() -> None:
    rows = torch.rand(4, 3, 2, len(COLUMNS), generator=torch.Generator().manual_seed(0))
    for name in ("flagged", "tainted"):
        rows[..., COLUMNS.index(name)] = (rows[..., COLUMNS.index(name)] > 0.5).float()
    table = SignalTable(rows)
    for index, name in enumerate(COLUMNS):
        np.testing.assert_array_equal(table.column(name).numpy(), rows.numpy()[..., index])
    np.testing.assert_array_equal(table.features.numpy(), rows.numpy()[..., : len(FEATURES)])
    assert table.flagged.dtype == table.tainted.dtype == torch.bool
    np.testing.assert_array_equal(table.flagged.numpy(), rows.numpy()[..., COLUMNS.index("flagged")] == 1)


def test_a_workers_score_is_the_highest_that_could_be_verified() -> None:
    mesh = Mesh(stages=3, replicas=2)
    rows = torch.rand(4, 2, 3, len(COLUMNS), generator=torch.Generator().manual_seed(1))
    tainted = rows[..., COLUMNS.index("tainted")]
    tainted.fill_(0)
    tainted[2, 1, 0] = 1
    tainted[1, 0] = 1
    expected = np.full((3, 2, 2), math.nan, dtype="float32")
    for index, (sender, direction) in enumerate([(0, 0), (1, 0), (1, 1), (2, 1)]):
        for replica in range(2):
            scores = [rows[index, replica, m, COLUMNS.index("score")].item() for m in range(3) if not tainted[index, replica, m]]
            expected[sender, replica, direction] = max(scores, default=math.nan)
    assert np.isnan(expected).sum() == 2 * 2 + 1
    np.testing.assert_array_equal(SignalTable(rows).worker_scores(mesh, Wiring.of(mesh)).numpy(), expected)


def test_a_mesh_of_one_stage_has_no_scores() -> None:
    table = SignalTable(torch.empty(0, 2, 3, len(COLUMNS)))
    assert table.worker_scores(Mesh(1, 2), Wiring.of(Mesh(1, 2))).isnan().all()


def test_scores_belong_to_those_who_served_the_lanes() -> None:
    mesh, rows = Mesh(stages=2, replicas=3), torch.zeros(2, 3, 1, len(COLUMNS))
    rows[..., COLUMNS.index("score")] = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    wiring = dataclasses.replace(Wiring.of(mesh), serving=((2, 1, 0), (1, 0, 2)))
    scores = SignalTable(rows).worker_scores(mesh, wiring)
    expected = [[3, 2, 1], [5, 4, 6]]
    np.testing.assert_array_equal(scores[0, :, 0].numpy(), expected[0])
    np.testing.assert_array_equal(scores[1, :, 1].numpy(), expected[1])
    assert scores[0, :, 1].isnan().all() and scores[1, :, 0].isnan().all()


def test_rows_by_samples_are_put_in_the_order_of_lanes() -> None:
    mesh = Mesh(stages=2, replicas=3)
    wiring = Wiring.of(mesh, {Worker(0, 1)}, micro_batches=2)
    rows = torch.arange(2.0 * 3 * 2 * len(COLUMNS)).view(2, 3, 2, len(COLUMNS))
    table = SignalTable.by_samples(rows, wiring)
    assert table.rows.shape == (2, 3, 3, len(COLUMNS))
    for (replica, number), (lane, slot) in wiring.places.items():
        assert torch.equal(table.rows[:, lane, slot], rows[:, replica, number])
    empty = [(1, 0), (1, 1), (1, 2)]
    assert all(table.tainted[:, lane, slot].all() for lane, slot in empty) and wiring.work[1] == ()
