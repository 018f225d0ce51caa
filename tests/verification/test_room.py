"""How much memory it takes to look at a signal, in signals."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Boundary, Direction
from lightning_sentinel.verification import BoundaryVerifier
from lightning_sentinel.verification.projection import SecretDirections

NOBODY, ALL = torch.zeros(1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)


class Room(TorchDispatchMode):
    """Bytes of what operators made and what is still there; what was there before does not count."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._sizes: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata)
                    self.most = max(self.most, self.now)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("samples", [4, 16])
def test_a_signal_is_looked_at_without_a_copy_of_it(samples: int, dtype: torch.dtype) -> None:
    boundary, config = Boundary(1, Direction.ACTIVATION), Verification(seed=0)
    verifier, secret = BoundaryVerifier(boundary, config), SecretDirections(boundary, config)
    signal = torch.randn(samples, 128, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    received = secret.project(0.9 * signal)
    for _ in range(2):
        verifier.inspect(signal, NOBODY, received)
        verifier.learn(verifier.contribution(ALL, NOBODY))
    size, mean = signal.numel() * signal.element_size(), 4 * signal[0].numel()
    with Room(signal, received.values, *verifier.state_dict().values()) as room:
        verifier.inspect(signal, NOBODY, received)
    # What stays are the sums of the step, of flagged signals and of others. On the way there are means over samples, pieces of the
    # signal in float32, and some versions of the 32 numbers a token that are seen of it.
    assert room.now <= 2.15 * mean
    assert room.most <= 4.2 * mean + (0.4 if samples > 4 else 0.1) * size
    with Room(signal) as room:
        secret.project(signal)
    pieces = 4 if samples == 4 else 16
    seen = 4 * signal[..., :32].numel()
    assert room.most <= 1.05 * (2 * seen + 4 * signal.numel() / pieces)
