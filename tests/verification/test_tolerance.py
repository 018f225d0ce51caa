from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.verification.audit import relative_error, tolerance
from lightning_sentinel.verification.tolerance import MEASURED, TESTS, Tolerances, deviation

MESH = Mesh(3, 4)
SENDER, OTHER = Worker(1, 0), Worker(1, 1)
INDEX = 1
BF16, F32 = torch.bfloat16, torch.float32


def signal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (4, 32, 48), generator=torch.Generator().manual_seed(seed))


def rounded(honest: Tensor) -> Tensor:
    return honest.bfloat16().float()


def learned(errors: list[float]) -> Tolerances:
    tolerances = Tolerances(MESH, seed=3)
    for error in errors:
        tolerances.heard(INDEX, OTHER, [error] + [0.0] * (MEASURED - 1))
    tolerances.learning = False
    return tolerances


@pytest.mark.parametrize(
    ("errors", "allowed"),
    [
        ([], 5e-3),
        ([0.0], 5e-3),
        ([1e-3, 2.6e-3, 0.0], 4 * 2.6e-3),
        ([4e-2], 5e-2),
        ([math.nan, math.inf], 5e-3),
        ([-1.0], 5e-3),
    ],
    ids=str,
)
def test_what_is_allowed_is_measured_in_the_warm_up_between_a_floor_and_the_table(errors: list[float], allowed: float) -> None:
    tolerances = learned(errors)
    assert tolerances.allowed(INDEX, SENDER, BF16, F32) == pytest.approx(allowed)
    assert tolerances.allowed(INDEX + 1, SENDER, BF16, F32) == pytest.approx(5e-3), "boundaries are apart"
    if errors and allowed < 5e-2:
        tolerances.heard(INDEX, OTHER, [4e-2] + [0.0] * (MEASURED - 1))
        assert tolerances.allowed(INDEX, SENDER, BF16, F32) == pytest.approx(allowed), "later ones widen nothing"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_floor_goes_by_the_dtype(dtype: torch.dtype) -> None:
    assert learned([0.0]).allowed(INDEX, SENDER, dtype, dtype) == pytest.approx(tolerance(dtype, dtype) / 10)


def test_no_later_audit_measures_a_boundary_that_nobody_audited_in_the_warm_up() -> None:
    tolerances = Tolerances(MESH, seed=3)
    assert tolerances.allowed(INDEX, SENDER, BF16, F32) == 5e-2, "as long as the warm-up lasts"
    tolerances.learning = False
    for _ in range(40):
        tolerances.heard(INDEX, OTHER, [4.9e-3] + [4.9e-3] * TESTS)
    assert tolerances.allowed(INDEX, SENDER, BF16, F32) == pytest.approx(5e-3)
    assert tolerances.allowed(INDEX, OTHER, BF16, F32) == pytest.approx(1e-3), "it errs one way all the same"


@pytest.mark.parametrize("shape", [(4, 32, 48), (64, 48), (4, 8, 6, 6)], ids=str)
def test_one_token_that_is_another_shows_where_the_norm_leaves_room(shape: tuple[int, ...]) -> None:
    honest = signal(0, *shape)
    assert relative_error(rounded(honest), honest) < 5e-3
    claimed = honest.clone()
    if len(shape) == 4:
        claimed[0, :, 0, 0] = -claimed[0, :, 0, 0]
    else:
        claimed.view(-1, shape[-1])[0] *= -1
    assert relative_error(claimed, honest) > 5e-2


def test_in_small_tokens_rounding_may_be_all_there_is() -> None:
    honest = signal(0)
    honest[:, 16:] *= 1e-6
    assert relative_error(honest + 1e-4 * signal(1), honest) < 5e-3


def audited(tolerances: Tolerances, count: int, claim: object) -> int | None:
    """After how many audits a worker is found to err one way."""
    for number in range(count):
        honest = signal(1000 + number)
        measured = deviation(claim(honest), honest, tolerances.seed_of(INDEX)).tolist()  # type: ignore[operator]
        tolerances.heard(INDEX, SENDER, measured)
        if tolerances.allowed(INDEX, SENDER, BF16, F32) < 5e-3:
            return number + 1
    return None


def test_rounding_cancels_out() -> None:
    assert audited(learned([0.0]), 400, rounded) is None
    generator = torch.Generator().manual_seed(7)
    assert audited(learned([0.0]), 400, lambda h: h + 4e-3 * torch.randn(h.shape, generator=generator)) is None


@pytest.mark.parametrize("size", [4.7e-3, 2e-3])
@pytest.mark.parametrize("kind", ["a bias", "another scale"])
def test_what_errs_the_same_way_adds_up_and_is_then_allowed_a_fiftieth(size: float, kind: str) -> None:
    direction = torch.randn(48, generator=torch.Generator().manual_seed(5)).sign()
    tolerances = learned([0.0])
    found = audited(tolerances, 60, lambda h: rounded(h + size * direction if kind == "a bias" else h * (1 - size)))
    assert found is not None and 29 <= found <= 40
    assert tolerances.allowed(INDEX, SENDER, BF16, F32) == pytest.approx(1e-3)
    assert tolerances.allowed(INDEX, OTHER, BF16, F32) == pytest.approx(5e-3), "the others are allowed what they were"


TURN = torch.linalg.qr(signal(8, 48, 48)).Q
"""Of each token, fixed."""


def activation_of(honest: Tensor, number: int) -> Tensor:
    """An activation that gradients have little in common with, and that is larger in some channels than in others."""
    return signal(5000 + number, *honest.shape) * signal(6, 48).exp() + 0.1 * honest


COHERENT = {
    "map of the signal": lambda honest, activation: honest @ TURN,
    "low rank": lambda honest, activation: (honest @ TURN[:, :1]) * TURN[0],
    "map of the activation": lambda honest, activation: (activation - activation.mean(dim=(0, 1))) @ TURN,
    "bend of the activation": lambda honest, activation: (activation.abs() - activation.abs().mean(dim=(0, 1))) @ TURN,
    "position": lambda honest, activation: (-1.0) ** torch.arange(honest.shape[1])[:, None] * TURN[0].expand_as(honest),
}
"""Errors that steer, though their mean over tokens is zero."""


@pytest.mark.parametrize("kind", COHERENT)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_what_errs_the_same_way_for_the_same_tokens_adds_up(kind: str, dtype: torch.dtype) -> None:
    ceiling = tolerance(dtype)
    tolerances = learned([0.0])
    for number in range(400):
        honest = signal(1000 + number)
        activation = activation_of(honest, number)
        error = COHERENT[kind](honest, activation)
        claimed = honest + 0.09 * ceiling * error / error.norm() * honest.norm() + 0.02 * ceiling * signal(9000 + number)
        seed = tolerances.seed_of(INDEX)
        tolerances.heard(INDEX, SENDER, deviation(claimed, honest, seed, activation).tolist())
        if tolerances.allowed(INDEX, SENDER, dtype, F32) < ceiling / 10:
            break
    assert number >= 28 and tolerances.allowed(INDEX, SENDER, dtype, F32) == pytest.approx(ceiling / 50)


def test_devices_that_round_weights_differently_are_not_blamed_for_it() -> None:
    """Their error is a fixed map of each token, too; the warm-up has seen how large it is."""
    weights = signal(8, 48, 48)
    seen = relative_error(signal(0) @ rounded(weights), signal(0) @ weights)
    tolerances = learned([float(seen)])
    for number in range(200):
        given = signal(1000 + number)
        measured = deviation(given @ rounded(weights), given @ weights, tolerances.seed_of(INDEX)).tolist()
        tolerances.heard(INDEX, SENDER, measured)
    assert tolerances.errs_one_way(INDEX, SENDER, float(seen) / 10), "it does add up"
    assert tolerances.allowed(INDEX, SENDER, BF16, F32) > 4 * seen - 1e-9


def test_what_is_too_small_to_steer_anything_is_let_be() -> None:
    direction = torch.randn(48, generator=torch.Generator().manual_seed(5)).sign()
    assert audited(learned([0.0]), 100, lambda h: h + 1e-4 * direction) is None


def test_state_goes_on() -> None:
    one, other = learned([1e-3]), Tolerances(MESH, seed=3)
    audited(one, 40, lambda h: h * 0.997)
    other.load_state_dict(one.state_dict())
    other.learning = False
    for index in range(4):
        for sender in (SENDER, OTHER):
            assert other.allowed(index, sender, BF16, F32) == one.allowed(index, sender, BF16, F32)
    Tolerances(Mesh(3, 2), seed=3).load_state_dict(one.state_dict())
