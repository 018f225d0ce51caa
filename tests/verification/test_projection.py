from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_sentinel.config import Verification
from lightning_sentinel.mesh import Boundary, Direction
from lightning_sentinel.verification.axes import as_tokens
from lightning_sentinel.verification.projection import PROJECTED, SecretDirections, orthogonal_directions, unit_directions

BOUNDARIES = [Boundary(index, direction) for index in range(4) for direction in Direction]


def test_directions_have_unit_length_and_follow_the_seed() -> None:
    directions = unit_directions(32, 9, seed=5)
    assert directions.shape == (32, 9)
    np.testing.assert_allclose(np.linalg.norm(directions.numpy(), axis=0), 1, rtol=1e-5)
    assert torch.equal(directions, unit_directions(32, 9, seed=5))
    assert not torch.allclose(directions, unit_directions(32, 9, seed=6))


def test_directions_point_everywhere() -> None:
    # E[u u^T] of uniform unit vectors is I / C.
    directions = unit_directions(4, 20_000, seed=0).double().numpy()
    np.testing.assert_allclose(directions @ directions.T / 20_000, np.eye(4) / 4, atol=0.01)


@pytest.mark.parametrize(("channels", "count"), [(64, 16), (33, 32), (32, 32), (5, 32), (1, 32)])
def test_orthogonal_directions_keep_lengths_on_average(channels: int, count: int) -> None:
    directions = orthogonal_directions(channels, count, seed=3).double().numpy()
    kept = min(channels, count)
    assert directions.shape == (channels, kept)
    np.testing.assert_allclose(directions.T @ directions, np.eye(kept) * channels / kept, atol=1e-5)
    # The mean squared length of projected unit vectors is the trace of D D^T over the channels.
    assert np.trace(directions @ directions.T) / channels == pytest.approx(1, rel=1e-5)


def test_a_projection_of_all_channels_is_a_rotation() -> None:
    secret = SecretDirections(Boundary(0, Direction.ACTIVATION), Verification())
    signal = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(secret.project(signal).values.norm(dim=-1), signal.norm(dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3,), (3, 40), (3, 5, 40), (3, 40, 2, 4)], ids=str)
def test_a_signal_of_any_shape_is_projected_token_by_token(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    secret = SecretDirections(Boundary(0, Direction.GRADIENT), Verification())
    signal = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens = as_tokens(signal)
    projected, channels = secret.project(signal)
    assert channels == tokens.shape[2]
    assert (projected.shape, projected.dtype) == ((*tokens.shape[:2], min(tokens.shape[2], PROJECTED)), torch.float32)
    basis = secret.project(torch.eye(tokens.shape[2])[:, None]).values[:, 0].double().numpy()
    np.testing.assert_allclose(projected.numpy(), tokens.double().numpy() @ basis, rtol=1e-4, atol=1e-5)


def test_directions_leave_the_global_generator_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    unit_directions(8, 4, seed=0)
    orthogonal_directions(8, 4, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_directions_differ_between_boundaries_and_follow_the_seed() -> None:
    eye = torch.eye(64)[:, None]
    drawn = [SecretDirections(boundary, Verification(seed=seed)) for seed in (0, 1) for boundary in BOUNDARIES]
    for of_one in ([secret.slices(64) for secret in drawn], [secret.project(eye).values[:, 0] for secret in drawn]):
        for index, one in enumerate(of_one):
            assert not any(torch.allclose(one, other) for other in of_one[:index])
    again = SecretDirections(BOUNDARIES[0], Verification(seed=0))
    assert torch.equal(again.slices(64), drawn[0].slices(64))
    assert torch.equal(again.project(eye).values, drawn[0].project(eye).values)


def test_no_seed_is_used_at_two_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: dict[int, Boundary] = {}
    for boundary in BOUNDARIES:
        secret, drawn = SecretDirections(boundary, Verification()), []
        for name in ("unit_directions", "orthogonal_directions"):
            monkeypatch.setattr(
                f"lightning_sentinel.verification.projection.{name}",
                lambda channels, count, seed, device, drawn=drawn: drawn.append(seed) or torch.zeros(channels, count),
            )
        secret.slices(8)
        secret.project(torch.zeros(1, 8))
        for seed in drawn:
            assert seeds.setdefault(seed, boundary) == boundary


@pytest.mark.parametrize("seed", [0, -3, 2**32, 2**63 - 1])
def test_a_secret_seed_may_be_as_long_as_an_integer(seed: int) -> None:
    secret = SecretDirections(Boundary(3, Direction.GRADIENT), Verification(seed=seed))
    assert secret.slices(8).isfinite().all() and secret.project(torch.ones(2, 8)).values.isfinite().all()
