from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Boundary, Direction
from lightning_sentinel.verification import COLUMNS, BoundaryVerifier, Inspection
from lightning_sentinel.verification.features import FEATURES
from lightning_sentinel.verification.fences import Fences
from tests.verification.rigs import CHANNELS, MICRO_BATCHES, POSITIONS, SAMPLES, Rig, known_of


class _Synchronised(AssertionError):
    """Something read a value back."""


class _NoReadback(TorchDispatchMode):
    """Fails at operators whose result, or the shape of it, depends on values, and where values of the host become a tensor."""

    forbidden = ("lift_fresh", "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_dim")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if masked or name in self.forbidden:
            raise _Synchronised(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_readback(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where the host would wait for a device: at the operators, and at the methods that need none."""

    def refuse(*_: Any, **__: Any) -> None:
        raise _Synchronised

    with monkeypatch.context() as patch, _NoReadback():
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(Tensor, name, refuse)
        yield


@pytest.mark.parametrize(
    "reads",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t.any()),
        lambda t: t.tolist(),
        lambda t: float(t[0]),
        lambda t: t[t > 0],
        lambda t: t.numpy(),
        lambda t: torch.equal(t, t),
        lambda t: t[[0, 2]],
        lambda t: t + torch.tensor([1.0, 2.0, 3.0]),
    ],
)
def test_the_trap_closes(reads: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(_Synchronised), no_readback(monkeypatch):
        reads(torch.ones(3))


@pytest.mark.parametrize("with_input", [False, True])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("steps", [0, 1, 20])
def test_a_receipt_and_what_it_teaches_read_nothing_back(
    direction: Direction, steps: int, with_input: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(direction, with_input=with_input, warmup_steps=16)
    rig.run(steps)
    honest = rig.stream.signal()
    signals = [torch.cat((honest, honest * 100)), torch.cat((honest * math.nan, honest))]
    inputs = torch.cat((0.9 * honest, 0.9 * honest))
    taints, cleared = [torch.tensor([False, False]), torch.tensor([False, True])], torch.tensor([True, False])
    results: list[Inspection] = []
    with no_readback(monkeypatch):
        for signal, tainted in zip(signals, taints):
            received = known_of(rig.verifier, inputs) if with_input else None
            results.append(rig.verifier.inspect(signal, tainted, received))
            rig.verifier.substitute(signal)
        rig.verifier.learn(rig.verifier.contribution(cleared, cleared))
    flagged = torch.cat([result.flagged for result in results])
    assert flagged[2] and not flagged[3] and flagged[1] == (steps > 16)


@pytest.mark.parametrize("method", ["sentinel", "paper"])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize(("device", "mode"), [("cpu", FakeTensorMode), ("meta", nullcontext)], ids=["fake", "meta"])
def test_a_receipt_needs_no_values_at_all(device: str, mode: Callable[[], Any], direction: Direction, method: Any) -> None:
    # Neither kind of tensor has values, so that any branch on one raises; on the meta device mixing it with the host does, too.
    with mode():
        verifier = BoundaryVerifier(Boundary(0, direction), Verification(method=method), device)
        for _ in range(3):
            for _ in range(MICRO_BATCHES):
                signals = torch.empty(2 * SAMPLES, POSITIONS, CHANNELS, device=device)
                tainted = torch.empty(2, dtype=torch.bool, device=device)
                rows, flagged = verifier.inspect(signals, tainted, known_of(verifier, signals))
                assert (rows.shape, flagged.shape, flagged.dtype) == ((2, len(COLUMNS)), (2,), torch.bool)
                assert rows.device.type == flagged.device.type == device
                assert verifier.substitute(signals).device == signals.device
            chosen = torch.empty(2, dtype=torch.bool, device=device)
            verifier.learn(verifier.contribution(chosen, chosen))
            verifier.fences = Fences.open(len(FEATURES)).to(device)
        updates = verifier.references.updates
        assert updates is not None and updates.device.type == device and updates.shape == ()
