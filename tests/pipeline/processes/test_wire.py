from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_sentinel as ls
from lightning_sentinel.errors import MalformedMessageError, WorkerLostError
from lightning_sentinel.pipeline.processes.wire import Work
from tests.pipeline.ranks import Silent, ranks

SENDS = re.compile(
    r"\bdist\.(send|recv|isend|irecv|all_reduce|all_gather\w*|broadcast\w*|gather\w*|scatter\w*|reduce\w*|barrier|batch_isend_irecv"
    r"|new_group|destroy_process_group)\("
)


def test_nothing_but_the_wire_sends() -> None:
    """So that another transport is one file."""
    package = Path(ls.__file__).parent
    sending = [
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if "benchmarks" not in file.parts and SENDS.search(file.read_text())
    ]
    assert sending == ["pipeline/processes/torch_wire.py"]


def test_a_tensor_is_gathered_from_ranks_in_their_order_and_an_empty_one_costs_nothing() -> None:
    with ranks(3) as world:
        found = world.run(lambda rank: world.all_gather(torch.tensor([rank, 2 * rank])))
        assert all(one.tolist() == [[0, 0], [1, 2], [2, 4]] for one in found)
        assert world.collectives == {"all_gather": 1}
        nothing = world.run(lambda rank: world.all_gather(torch.empty(0)))
        assert all(one.shape == (3, 0) for one in nothing) and world.collectives == {"all_gather": 1}


def test_a_broadcast_is_in_place() -> None:
    def work(rank: int) -> list[float]:
        tensor = torch.full((2,), float(rank))
        world.broadcast(tensor, 1)
        return tensor.tolist()

    with ranks(2) as world:
        assert world.run(work) == [[1.0, 1.0]] * 2


def test_bytes_and_objects_arrive_as_they_were_sent() -> None:
    def work(rank: int) -> list[Any]:
        if rank == 0:
            world.send_bytes(b"from 0", 1)
        from_zero = world.receive_bytes(0, 6, "a text") if rank == 1 else b"from 0"
        told = world.broadcast_bytes(b"from 1" if rank == 1 else b"", 1, 6, "a text")
        return [from_zero, told, world.broadcast_object({"a": rank}, 1)]

    with ranks(3) as world:
        assert world.run(work) == [[b"from 0", b"from 1", {"a": 1}]] * 3


@pytest.mark.parametrize("length", [-1, 0, 7, 2**62])
def test_more_bytes_than_there_can_be_are_refused_before_memory_is_allocated(length: int) -> None:
    def work(rank: int) -> None:
        if rank == 1:
            world.send(torch.tensor([length]), 0)
        else:
            world.receive_bytes(1, 6, "a text")

    with ranks(2) as world, pytest.raises(MalformedMessageError, match=f"Rank 1 announces a text of {length} bytes") as raised:
        world.run(work)
    assert raised.value.rank == 1


class Cut(Silent):
    """All connections are closed."""

    def _fail(self, *_: Any) -> Any:
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:999")

    _send = _receive = _all_gather = _all_reduce = _barrier = _fail  # type: ignore[assignment]

    def _send_later(self, tensor: Tensor, rank: int, tag: int) -> Work:
        return CutWork()

    def _broadcast(self, tensor: Tensor, source: int) -> Work:
        return CutWork()


class CutWork:
    wait = Cut._fail


ONE = torch.ones(1)
FROM_RANK_TO_RANK = {
    "send": lambda wire: wire.send(ONE, 3),
    "send later": lambda wire: wire.send_later(ONE, 3).wait(),
    "receive": lambda wire: wire.receive(ONE, 3),
    "send bytes": lambda wire: wire.send_bytes(b"a", 3),
    "receive bytes": lambda wire: wire.receive_bytes(3, 10, "a text"),
}
OF_ALL = {
    "all-gather": lambda wire: wire.all_gather(ONE),
    "all-reduce": lambda wire: wire.all_reduce(ONE),
    "broadcast": lambda wire: wire.broadcast(ONE, 3),
    "barrier": lambda wire: wire.barrier(),
}


@pytest.mark.parametrize("operation", FROM_RANK_TO_RANK.values(), ids=FROM_RANK_TO_RANK)
def test_a_lost_peer_is_named(operation: Any) -> None:
    with pytest.raises(WorkerLostError, match=r"Rank 3 does not answer: .*closed by peer") as raised:
        operation(Cut((0, 3, 5)))
    assert raised.value.rank == 3


@pytest.mark.parametrize(("kind", "operation"), OF_ALL.items(), ids=OF_ALL)
def test_in_an_operation_of_all_those_who_were_waited_for_are_named(kind: str, operation: Any) -> None:
    with pytest.raises(
        WorkerLostError, match=rf"One of the ranks 3, 5 does not answer in an operation of all \({kind}\)"
    ) as raised:
        operation(Cut((0, 3, 5)))
    assert raised.value.rank is None
    with pytest.raises(WorkerLostError, match="Rank 3 does not answer") as raised:
        operation(Cut((0, 3)))
    assert raised.value.rank == 3


def test_another_error_is_not_a_lost_peer() -> None:
    class Full(Silent):
        def _send(self, tensor: Tensor, rank: int) -> None:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory") as raised:
        Full().send(ONE, 3)
    assert not isinstance(raised.value, WorkerLostError)


def test_a_wire_of_some_ranks_is_made_once_until_it_is_dropped() -> None:
    wire = Silent((0, 1, 2))
    some = wire.among([0, 2], timedelta(seconds=1))
    assert some.ranks == (0, 2) and wire.among((0, 2), timedelta(seconds=1)) is some
    wire.drop(some)
    assert wire.among((0, 2), timedelta(seconds=1)) is not some
