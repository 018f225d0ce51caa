"""Whatever others put into the table of a step, a verdict comes of it, the same on all ranks."""

from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.config import Response
from lightning_sentinel.verification import COLUMNS, SignalTable
from lightning_sentinel.verification.outcomes import Outcome
from tests.pipeline.pipelines import MICRO_BATCHES, WARMUP, Pipelines, honest, planned

NUMBERS = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, -3.4e38, 17.0, 2.0**40]),
)
PLACES = st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 1), st.integers(0, len(COLUMNS) - 1))


def run_of(response: Response) -> Pipelines:
    pipelines = Pipelines(response).run(WARMUP + 2)
    pipelines.draw()
    for micro_batch in range(MICRO_BATCHES):
        pipelines.run_micro_batch(0, micro_batch, honest)
    pipelines.table = pipelines.exchange()
    return pipelines


RUNS = {
    "flags": run_of(Response(ban_after=1, audit_rate=None)),
    "audits": run_of(Response(audit_rate=0.5)),
    "log": run_of(Response("log", None, audit_rate=None)),
}


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    run=st.sampled_from(sorted(RUNS)),
    places=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 1), st.integers(0, len(COLUMNS) - 1)), max_size=40
    ),
    values=st.lists(NUMBERS, min_size=40, max_size=40),
    everything=st.one_of(st.none(), NUMBERS),
)
def test_no_table_crashes_a_guard(
    run: str, places: list[tuple[int, int, int, int]], values: list[float], everything: float | None
) -> None:
    pipelines = RUNS[run]
    rows = pipelines.table.rows.clone() if everything is None else torch.full_like(pipelines.table.rows, everything)
    for place, value in zip(places, values):
        rows[place] = value
    table = SignalTable.believed(rows)
    assert table.rows.isfinite().all() and table.column("positions").max() <= 2**20
    outcomes = []
    for guard in (copy.deepcopy(pipelines.guard), copy.deepcopy(pipelines.guard)):
        ask = (lambda asked: [Outcome.MATCHES] * len(asked)) if guard.audits else None
        ruling = guard.settle(table, pipelines.plan, lambda vector: vector, ask)
        assert any(planned(guard, pipelines.step_number + 1).wiring.live), "whatever a table says, it never ends a run"
        outcomes.append((ruling.banned, ruling.redo, ruling.verdict.flagged, guard.ledger.state_dict()))
        learned = [value for name, value in guard.state_dict().items() if name.endswith(("momentum.value", "trend"))]
        assert all(not value.isinf().any() for value in learned)
    assert outcomes[0] == outcomes[1]


def test_an_honest_table_is_believed_as_it_is() -> None:
    table = RUNS["flags"].table
    assert torch.equal(SignalTable.believed(table.rows).rows, table.rows)
