"""One thread for what tests compute: it is small, and threads that wait for each other on busy cores cost more than they save."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _secrets_are_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn from the operating system is the same in every run of a test that does not name a seed."""
    monkeypatch.setattr("lightning_sentinel.seeds.secrets.randbits", lambda bits: 0)
