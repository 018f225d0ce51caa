from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sentinel.verification.axes import as_tokens, batch_means, spread_over

SHAPES = [(3, 5), (3, 4, 5), (3, 5, 2, 4), (2, 5, 2, 3, 4)]


def signal_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(3).add(2).to(dtype)


def tokens_by_hand(signal: Tensor) -> np.ndarray:
    """Samples x positions x channels, by explicit indexing: the channel is axis 1, but the last axis of a sequence."""
    array = signal.double().numpy()
    if array.ndim == 2:
        return array[:, None, :]
    if array.ndim == 3:
        return array
    positions = list(np.ndindex(array.shape[2:]))
    tokens = np.empty((array.shape[0], len(positions), array.shape[1]))
    for sample in range(array.shape[0]):
        for t, position in enumerate(positions):
            for channel in range(array.shape[1]):
                tokens[sample, t, channel] = array[(sample, channel, *position)]
    return tokens


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_are_samples_positions_channels(shape: tuple[int, ...]) -> None:
    signal = signal_of(shape)
    np.testing.assert_array_equal(as_tokens(signal).double().numpy(), tokens_by_hand(signal))


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5)], ids=str)
def test_tokens_are_a_view_where_no_axis_moves(shape: tuple[int, ...]) -> None:
    signal = signal_of(shape)
    assert as_tokens(signal).data_ptr() == signal.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_mean_is_numpys_in_float32(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    signal = signal_of(shape, dtype)
    (mean,) = batch_means(signal, 1)
    assert mean.dtype == torch.float32
    np.testing.assert_allclose(mean.numpy(), tokens_by_hand(signal).mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_means_are_those_of_each_signal_by_itself(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    signals = signal_of((groups * shape[0], *shape[1:]), dtype)
    means = batch_means(signals, groups)
    assert means.dtype == torch.float32
    for index, mean in enumerate(means):
        signal = signals[index * shape[0] : (index + 1) * shape[0]]
        assert torch.equal(mean, batch_means(signal, 1)[0])
        np.testing.assert_allclose(mean.numpy(), tokens_by_hand(signal).mean(axis=0), rtol=1e-5, atol=1e-6)


def test_batch_mean_of_half_precision_does_not_overflow() -> None:
    assert batch_means(torch.full((64, 3), 6e4, dtype=torch.float16), 1).tolist() == [[[60_000.0] * 3]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_element_that_is_not_finite_shows_in_the_mean(shape: tuple[int, ...], value: float) -> None:
    signal = signal_of(shape)
    signal.view(-1)[7] = value
    _, position, channel = np.argwhere(~np.isfinite(tokens_by_hand(signal)))[0]
    mean, untouched = batch_means(torch.cat((signal, signal_of(shape))), 2)
    assert not mean[position, channel].isfinite()
    assert mean.isfinite().sum() == mean.numel() - 1
    assert untouched.isfinite().all()


def test_infinities_of_opposite_sign_do_not_cancel() -> None:
    assert not batch_means(torch.tensor([[torch.inf], [-torch.inf]]), 1).isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_reference_comes_back_from_the_shape_it_was_spread_over(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    signal = signal_of(shape, dtype)
    (reference,) = batch_means(signal, 1)
    spread = spread_over(reference, signal)
    assert (spread.shape, spread.dtype) == (signal.shape, dtype)
    expected = reference.to(dtype)
    for sample in as_tokens(spread):
        assert torch.equal(sample, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sample_survives_tokens_and_spreading(shape: tuple[int, ...]) -> None:
    signal = signal_of(shape)
    first = signal[:1]
    assert torch.equal(spread_over(as_tokens(first)[0], first), first)


@pytest.mark.parametrize("positions", [1, 3, 6, 9])
def test_spreading_over_another_length_pads_with_zero_or_cuts(positions: int) -> None:
    reference = torch.arange(1.0, 13.0).view(6, 2)
    spread = spread_over(reference, torch.empty(4, positions, 2))
    expected = np.zeros((positions, 2), dtype="float32")
    shared = min(6, positions)
    expected[:shared] = reference.numpy()[:shared]
    np.testing.assert_array_equal(spread.numpy(), np.broadcast_to(expected, (4, positions, 2)))


def test_spreading_over_a_smaller_image_keeps_the_first_positions() -> None:
    reference = torch.arange(18.0).view(9, 2)
    spread = spread_over(reference, torch.empty(1, 2, 2, 2))
    assert spread[0, 0].tolist() == [[0, 2], [4, 6]]
    assert spread[0, 1].tolist() == [[1, 3], [5, 7]]


def test_a_signal_of_one_axis_has_a_stand_in_too() -> None:
    signal = signal_of((5,))
    assert as_tokens(signal).shape == (5, 1, 1)
    torch.testing.assert_close(spread_over(batch_means(signal, 1)[0], signal), torch.full((5,), float(signal.mean())))
