from __future__ import annotations

import pytest

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.statements import Moment, RowStatement
from tests.trust.statements import NOW, ROW, SIGNAL, VOTE


@pytest.mark.parametrize("run", [b"", bytes(15), bytes(17)])
def test_a_run_has_sixteen_bytes(run: bytes) -> None:
    with pytest.raises(MalformedMessageError, match=f"A run is named by {len(run)} bytes"):
        Moment(run, 0, 0)


def test_their_words() -> None:
    signal = "activation signal from stage 1 to 2, lane 0, micro-batch 3, of step 12, attempt 0"
    assert str(SIGNAL) == f"{signal}, by worker (stage 1, replica 0)"
    assert str(ROW) == "row of step 12, attempt 0, by worker (stage 1, replica 0)"
    assert str(VOTE) == f"vote on the {signal}, by worker (stage 1, replica 2)"


def test_their_subjects_differ() -> None:
    others = [RowStatement(NOW, Worker(1, 1), ROW.row, ROW.table_before), RowStatement(Moment(bytes(16), 12, 0), *parts(ROW))]
    assert len({one.subject for one in (SIGNAL, ROW, VOTE, *others)}) == 5


def parts(row: RowStatement) -> tuple[object, ...]:
    return row.sender, row.row, row.table_before
