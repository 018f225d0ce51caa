from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from lightning_sentinel.errors import TableMismatchError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.commitments.transcript import Table, Transcript
from lightning_sentinel.trust.credentials import Credentials
from lightning_sentinel.trust.digests import Algorithm
from lightning_sentinel.trust.identity import Identity
from lightning_sentinel.trust.statements import Moment
from tests.pipeline.ranks import Ranks, installed

MESH, RUN = Mesh(2, 2), bytes(range(16))


class Relayed(Ranks):
    """A relay may give a rank another row than was sent.

    Args:
        alter: returns what ``receiver`` gets of ``sender`` in the gather of this number in place of the row.
    """

    def __init__(self, alter: Callable[[int, int, int, Tensor], Tensor]) -> None:
        super().__init__(MESH.size)
        self._alter = alter
        self._gathers = [0] * MESH.size

    def _all_gather(self, everyone: list[Tensor], tensor: Tensor) -> None:
        super()._all_gather(everyone, tensor)
        number = self._gathers[self.rank]
        self._gathers[self.rank] += 1
        for sender, row in enumerate(everyone):
            row.copy_(self._alter(number, sender, self.rank, row.clone()))


@cache
def identity(worker: Worker) -> Identity:
    return Identity.seeded(0, str(worker))


def credentials(worker: Worker, signs: bool = True) -> Credentials:
    keys = {one: identity(one).public for one in MESH.workers} if signs else {}
    return Credentials(RUN, Algorithm.SHA256, identity(worker) if signs else None, keys)


def tables(wire: Ranks, steps: int = 3, signs: bool = True, forger: int | None = None) -> list[list[Table] | str]:
    """What each rank sees, or the error that it ends with."""

    def work(rank: int) -> list[Table] | str:
        own = credentials(MESH.worker(rank), signs)
        if rank == forger:
            own = Credentials(RUN, Algorithm.SHA256, Identity.seeded(1, "stolen"), own.keys)
        transcript = Transcript(MESH, own)
        try:
            return [transcript.exchange(Moment(RUN, step, step), bytes([rank, step])) for step in range(steps)]
        except TableMismatchError as error:
            return str(error)

    with installed(wire):
        return wire.run(work)


def nothing(number: int, sender: int, receiver: int, row: Tensor) -> Tensor:
    return row


@pytest.mark.parametrize("signs", [True, False])
def test_all_see_what_each_says(signs: bool) -> None:
    said = [Table([bytes([rank, step]) for rank in range(4)], frozenset()) for step in range(3)]
    assert tables(Relayed(nothing), signs=signs) == [said] * 4


def test_whose_row_is_not_signed_by_itself_is_known_to_all_one_step_later() -> None:
    for seen in tables(Relayed(nothing), forger=2):
        assert [table.forgers for table in seen] == [frozenset(), {MESH.worker(2)}, {MESH.worker(2)}]


def test_a_replayed_row_is_a_forged_one() -> None:
    kept: list[Tensor] = []

    def replay(number: int, sender: int, receiver: int, row: Tensor) -> Tensor:
        # Rank 1 sends its first row again.
        if sender == 1 and number == 0:
            kept.append(row)
        return kept[0].clone() if sender == 1 and number == 1 else row

    for seen in tables(Relayed(replay)):
        assert [table.forgers for table in seen] == [frozenset(), frozenset(), {MESH.worker(1)}]


@pytest.mark.parametrize("place", [0, 1, 2, 40, 80, -1], ids=str)
def test_a_relay_that_alters_a_row_is_named_with_whose_row_it_was(place: int) -> None:
    def alter(number: int, sender: int, receiver: int, row: Tensor) -> Tensor:
        if (number, sender, receiver) == (0, 1, 3):
            row[place] ^= 1
        return row

    for told in tables(Relayed(alter)):
        assert isinstance(told, str), "one step later, on all ranks"
        assert told.startswith("Ranks saw different rows in the exchange of step 0: ")
        assert f"{MESH.worker(3)}, or who passes rows on to it, has altered the row of {MESH.worker(1)}" in told
        assert "signed two" not in told and "shows another" not in told


def other_row(worker: Worker) -> Tensor:
    """Another row of the first step, which the worker has signed as well."""
    sent: list[Tensor] = []

    class Listening(Ranks):
        rank = MESH.rank(worker)  # type: ignore[assignment]

        def _all_gather(self, everyone: list[Tensor], tensor: Tensor) -> None:
            sent.append(tensor.clone())
            for row in everyone:
                row.copy_(tensor)

    with installed(Listening(MESH.size)):
        Transcript(MESH, credentials(worker)).exchange(Moment(RUN, 0, 0), bytes([9, 9]))
    return sent[0]


def test_who_signs_two_rows_is_named() -> None:
    other = other_row(MESH.worker(1))

    def equivocate(number: int, sender: int, receiver: int, row: Tensor) -> Tensor:
        return other if (number, sender, receiver) == (0, 1, 3) else row

    for told in tables(Relayed(equivocate)):
        assert isinstance(told, str) and f"{MESH.worker(1)} signed two different rows" in told


def test_without_keys_it_is_told_whose_table_differs() -> None:
    def alter(number: int, sender: int, receiver: int, row: Tensor) -> Tensor:
        if (number, sender, receiver) == (0, 1, 3):
            row[0] ^= 1
        return row

    for told in tables(Relayed(alter), signs=False):
        assert f"another table than most saw {MESH.worker(3)}; without keys nobody can tell" in told


def test_who_hears_other_votes_is_named() -> None:
    def work(rank: int) -> str:
        transcript = Transcript(MESH, credentials(MESH.worker(rank)))
        transcript.exchange(Moment(RUN, 0, 0), b"row")
        transcript.hear(torch.tensor([7 if rank != 2 else 8], dtype=torch.uint8))
        with pytest.raises(TableMismatchError) as error:
            transcript.exchange(Moment(RUN, 1, 1), b"row")
        return str(error.value)

    wire = Ranks(MESH.size)
    with installed(wire):
        for told in wire.run(work):
            assert f"different votes: others than most have {MESH.worker(2)}." in told
