from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sentinel.aggregation.rules import COORDINATE_WISE, WEIGHING, centred_clipping, combine, tolerable
from tests.aggregation.definitions import DEFINITIONS


def oracle() -> Any:
    """byzfl's aggregators. Its own ``__init__`` imports benchmarks, and with them torchvision, which needs a build of its own."""
    if "byzfl" not in sys.modules:
        spec = importlib.util.find_spec("byzfl")
        assert spec is not None and spec.submodule_search_locations is not None, (
            "byzfl is not installed: make setup, or pip install --no-deps byzfl"
        )
        package = ModuleType("byzfl")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["byzfl"] = package
    return importlib.import_module("byzfl.aggregators.aggregators")


BYZFL: dict[str, Callable[[Any, int], Any]] = {
    "median": lambda library, f: library.Median(),
    "trimmed_mean": lambda library, f: library.TrMean(f),
    # byzfl adds up the distances to n - f - 1 others, one more than Blanchard et al. do.
    "krum": lambda library, f: library.Krum(f + 1),
}


def aggregate(name: str, rows: Tensor, f: int) -> Tensor:
    if name in COORDINATE_WISE:
        return COORDINATE_WISE[name](rows, f)
    return combine(rows, WEIGHING[name](rows @ rows.T, f))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(DEFINITIONS)),
    n=st.integers(1, 9),
    width=st.integers(1, 20),
    seed=st.integers(0, 999),
    lie=st.sampled_from([5.0, -1e30, torch.nan, torch.inf, -torch.inf]),
    data=st.data(),
)
def test_rules_are_what_the_papers_define(name: str, n: int, width: int, seed: int, lie: float, data: st.DataObject) -> None:
    f = data.draw(st.integers(0, tolerable(n, rule=name)))
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[:f] = lie
    torch.testing.assert_close(aggregate(name, rows, f), DEFINITIONS[name](rows, f), rtol=1e-6, atol=1e-8)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(BYZFL)), n=st.integers(3, 12), width=st.integers(1, 40), seed=st.integers(0, 999), data=st.data()
)
def test_rules_are_those_of_byzfl(name: str, n: int, width: int, seed: int, data: st.DataObject) -> None:
    f = data.draw(st.integers(0, (n - 3) // 2 if name == "krum" else (n - 1) // 2))
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[:f] += 5
    expected = BYZFL[name](oracle(), f)(rows)
    if name == "median" and n % 2 == 0:
        # torch.median, which byzfl calls, takes the lower of the two in the middle.
        expected = (expected - BYZFL[name](oracle(), f)(-rows)) / 2
    torch.testing.assert_close(aggregate(name, rows, f), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("radius", [0.1, 2.0, 100.0])
@pytest.mark.parametrize("rounds", [1, 5])
def test_centred_clipping_is_that_of_byzfl(radius: float, rounds: int) -> None:
    rows = torch.randn(7, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows[:2] += 9
    found = centred_clipping(rows @ rows.T, 2, radius=radius, rounds=rounds) @ rows
    expected = oracle().CenteredClipping(L=rounds, tau=radius)(rows).double()  # it computes in single precision
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(COORDINATE_WISE | WEIGHING))
@pytest.mark.parametrize("lie", [1e6, -1e6, 1e30, 1e200, torch.nan, torch.inf])
def test_a_minority_that_sends_anything_hardly_moves_the_result(name: str, lie: float) -> None:
    rows = 1 + 0.1 * torch.randn(8, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    honest = rows[3:].mean(dim=0)
    rows[:3] = lie
    # Clipping bounds how far a lie pulls; the others leave it out.
    assert (aggregate(name, rows, 3) - honest).abs().max() < (1.5 if name == "centred_clipping" else 0.5)


@pytest.mark.parametrize("name", ["krum", "multi_krum"])
@pytest.mark.parametrize("n", range(3, 12))
def test_liars_that_agree_are_not_each_others_nearest(name: str, n: int) -> None:
    f = tolerable(n, rule=name)
    assert f == 1 or 2 * f + 2 < n
    rows = 1 + 0.1 * torch.randn(n, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows[:f] = -1.0
    assert (aggregate(name, rows, f) > 0).all()
