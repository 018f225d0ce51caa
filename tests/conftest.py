"""What all tests have in common. Imports are where they are needed: the process that deals tests to others runs none itself."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator

import pytest


def pytest_collection_finish() -> None:
    import torch
    from lightning.fabric.utilities import registry

    # Every Trainer looks for callbacks in all that is installed, which does not change meanwhile.
    registry.entry_points = functools.cache(registry.entry_points)
    # Tests compute little, and threads that wait for each other on busy cores cost more than they save.
    torch.set_num_threads(1)
    # What was imported stays: collecting garbage need not look through it again and again.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _server_of_ranks() -> None:
    """Forked before the first test, so that no rank inherits what a test has left, and says what pytest shows."""
    if (world := sys.modules.get("tests.distributed.world")) is not None:
        world.start_server()


@pytest.fixture(scope="session", autouse=True)
def _secrets_are_repeatable(_server_of_ranks: None) -> Iterator[None]:
    """What is drawn from the operating system is the same in every run of a test that does not name a seed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_sentinel.seeds.secrets.randbits", lambda bits: 0)
        yield


@pytest.fixture(autouse=True)
def _warnings_come_from_rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy that a test made for another rank does not silence the tests after it."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only as of_fabric
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    for guard in (rank_zero_only, of_fabric):
        monkeypatch.setattr(guard, "rank", 0)
