"""How the ranks of a start find each other in a store that has seen earlier starts."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from lightning_sentinel.errors import WorkerLostError
from lightning_sentinel.pipeline.processes.liveness import agree_on_round


def start(store: HashStore, world_size: int) -> list[str]:
    found = [""] * world_size

    def rank(number: int) -> None:
        found[number] = agree_on_round(store, number, world_size, timedelta(seconds=20))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_ranks_of_a_start_agree_on_a_name_that_no_earlier_start_had() -> None:
    store, names = HashStore(), []
    for world_size in (4, 2, 2, 5, 1, 4):
        found = start(store, world_size)
        assert len(set(found)) == 1
        names.append(found[0])
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_in_vain_says_for_whom(rank: int) -> None:
    store = HashStore()
    with pytest.raises(WorkerLostError, match=rf"rank {rank} did not come together with 2 others; never heard of"):
        agree_on_round(store, rank, 3, timedelta(seconds=0.2))
