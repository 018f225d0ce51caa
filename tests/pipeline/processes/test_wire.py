from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_sentinel as ls
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.processes import wire
from lightning_sentinel.pipeline.processes.wire import backend_for
from tests.pipeline.ranks import ranks

ONE, OTHER, HOST, UNKNOWN = (torch.device(name) for name in ("cuda:0", "cuda:1", "cpu", "mps:0"))


@pytest.mark.parametrize(
    ("device", "devices", "transport", "backend"),
    [
        (ONE, [ONE, OTHER], "auto", "cpu:gloo,cuda:nccl"),
        (OTHER, [OTHER], "auto", "cpu:gloo,cuda:nccl"),
        (ONE, [ONE, OTHER], "device", "cpu:gloo,cuda:nccl"),
        (ONE, [ONE, OTHER], "host", "gloo"),
        (ONE, [ONE, ONE], "auto", "gloo"),
        (ONE, [ONE, ONE, OTHER, OTHER], "host", "gloo"),
        (OTHER, [ONE, ONE, OTHER], "auto", "gloo"),  # the same for all, because all are in one group
        (UNKNOWN, [UNKNOWN], "auto", "gloo"),
        (HOST, [HOST, HOST], "auto", "gloo"),
        (HOST, [HOST, HOST], "device", "gloo"),
        (HOST, [HOST, HOST], "host", "gloo"),
    ],
)
def test_the_backend_follows_transport_and_devices(device: Any, devices: Any, transport: str, backend: str) -> None:
    assert backend_for(device, devices, transport) == backend


@pytest.mark.parametrize(
    ("device", "devices", "why"),
    [
        (ONE, [ONE, ONE], r"2 ranks share cuda:0"),
        (OTHER, [ONE, ONE, OTHER], r"3 ranks share cuda:0, cuda:1"),
        (UNKNOWN, [UNKNOWN], r"no backend"),
    ],
)
def test_what_cannot_be_sent_from_is_refused(device: Any, devices: Any, why: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"transport='device' is to send from {device}, which cannot be: {why}.*'host'"):
        backend_for(device, devices, "device")


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
    assert sending == ["pipeline/processes/wire.py"]


def test_a_tensor_is_gathered_from_ranks_in_their_order_and_an_empty_one_costs_nothing() -> None:
    with ranks(3) as world:
        found = world.run(lambda rank: wire.all_gather(torch.tensor([rank, 2 * rank]), size=3))
        assert all(one.tolist() == [[0, 0], [1, 2], [2, 4]] for one in found)
        assert world.collectives == {"all_gather": 1}
        nothing = world.run(lambda rank: wire.all_gather(torch.empty(0), size=3))
        assert all(one.shape == (3, 0) for one in nothing) and world.collectives == {"all_gather": 1}


def test_a_broadcast_is_in_place() -> None:
    def work(rank: int) -> list[float]:
        tensor = torch.full((2,), float(rank))
        wire.broadcast(tensor, 1)
        return tensor.tolist()

    with ranks(2) as world:
        assert world.run(work) == [[1.0, 1.0]] * 2
