"""The harness itself: torch's private names are still there, and what they make behaves as a GPU would."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed import world
from tests.fakegpu import device
from tests.fakegpu.device import WrongDevice, reads


def test_the_private_names_are_there() -> None:
    """Should this fail with a new release of torch: ``tests/fakegpu/device.py`` is the one place that uses them."""
    assert callable(torch.utils.backend_registration._setup_privateuseone_for_python_backend)
    assert callable(torch._C._from_dlpack) and callable(torch.utils.dlpack.to_dlpack)
    assert callable(torch.library.Library.fallback)


def _raises(function: Any) -> str:
    try:
        function()
    except (WrongDevice, RuntimeError) as error:
        return type(error).__name__
    return ""


def _trained(where: torch.device | str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)).to(where)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, foreach=False)
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(32, 8, generator=generator).to(where), torch.randn(32, 4, generator=generator).to(where)
    for _ in range(5):
        optimizer.zero_grad()
        ((module(inputs) - labels) ** 2).mean().backward()
        optimizer.step()
    return [parameter.detach().cpu() for parameter in module.parameters()]


def probe() -> dict[str, Any]:
    """What the tests below ask, in a process of its own: torch has the device from then on."""
    there = device.install()
    found: dict[str, Any] = {}
    here, values = torch.ones(2, 3), torch.arange(6.0).to(there)
    grid = values.view(2, 3)
    found["mixed"] = [
        _raises(lambda: grid + here),
        _raises(lambda: torch.cat((grid, here))),
        _raises(lambda: grid[torch.tensor([0, 1])]),
        _raises(lambda: torch.where(here > 0, grid, grid)),
    ]
    found["of views"] = (grid[1][2].item(), grid[1:][0][1:].tolist(), grid.t()[2][1].item())
    found["views"] = (grid.t().stride(), grid.t()[1].tolist(), grid[1].add_(1).tolist(), values.tolist())
    asked: dict[str, Any] = {
        "item": lambda: values.sum().item(),
        "tolist": lambda: values.tolist(),
        "bool": lambda: bool((values > 0).any()),
        "mask": lambda: values[values > 2],
        "cpu": lambda: values.cpu(),
        "copy": lambda: torch.empty(6).copy_(values),
        "equal": lambda: torch.equal(values, values),
        "nothing": lambda: torch.where(values > 2, values, 0.0).sum().clamp(min=1),
        "to the device": lambda: here.to(there) + torch.tensor([1.0, 2.0, 3.0], device=there),
    }
    found["reads"] = {}
    for name, function in asked.items():
        reads.clear()
        function()
        found["reads"][name] = reads.counts.total()
    found["trained"] = list(zip(_trained(there), _trained("cpu")))
    gc.collect()
    before = sum(isinstance(one, torch.UntypedStorage) for one in gc.get_objects())
    for _ in range(50):
        values = values + 1
    gc.collect()
    found["kept"] = sum(isinstance(one, torch.UntypedStorage) for one in gc.get_objects()) - before
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    (answer,) = world.run(probe, 1)
    return dict(answer)


def test_what_mixes_devices_raises(found: dict[str, Any]) -> None:
    assert all(found["mixed"]), found["mixed"]


def test_views_are_views(found: dict[str, Any]) -> None:
    assert found["of views"] == (5.0, [4.0, 5.0], 5.0)
    assert found["views"] == ((1, 3), [1.0, 4.0], [4.0, 5.0, 6.0], [0.0, 1.0, 2.0, 4.0, 5.0, 6.0])


def test_each_read_of_the_host_is_counted_and_nothing_else(found: dict[str, Any]) -> None:
    counts = dict(found["reads"])
    assert counts.pop("nothing") == counts.pop("to the device") == 0
    assert counts.pop("mask") >= 1  # its places, and how many they are
    assert set(counts.values()) == {1}, counts


def test_training_there_gives_the_weights_of_the_host(found: dict[str, Any]) -> None:
    for there, here in found["trained"]:
        torch.testing.assert_close(there, here, rtol=0, atol=1e-6)


def test_memory_is_given_back(found: dict[str, Any]) -> None:
    assert found["kept"] <= 1
