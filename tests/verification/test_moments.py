from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sentinel.verification.features import FAMILIES
from lightning_sentinel.verification.moments import moment_features, moment_statistics

NAMES = FAMILIES["moments"]
SENDERS, TOKENS, CHANNELS, DIRECTIONS = 3, 50, 20, 18


def draw(seed: int = 0, *, channels: int = CHANNELS, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    scale = rng.lognormal(size=channels)
    signal = rng.normal(1.0, scale, size=(SENDERS, tokens, channels)).astype("float32")
    secret = rng.normal(size=(channels, min(channels, DIRECTIONS))).astype("float32")
    return torch.from_numpy(signal), torch.from_numpy(secret)


def statistics(tokens: Tensor, secret: Tensor) -> dict[str, Tensor]:
    return moment_statistics(tokens.square().mean(dim=1), tokens.mean(dim=1), tokens @ secret)


@pytest.mark.parametrize("channels", [1, 3, CHANNELS])
def test_statistics_are_numpys(channels: int) -> None:
    tokens, secret = draw(channels=channels)
    found = statistics(tokens, secret)
    few = min(channels, 16)
    assert {name: part.shape for name, part in found.items()} == {
        "log_spread": (SENDERS, channels),
        "gram": (SENDERS, few * few),
        "quantiles": (SENDERS, 7 * min(channels, 4)),
    }
    for sender in range(SENDERS):
        x = tokens[sender].double().numpy()
        p = (x @ secret.double().numpy())[:, :16]
        spread = np.log(x.std(axis=0))
        np.testing.assert_allclose(found["log_spread"][sender].numpy(), spread - spread.mean(), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found["gram"][sender].numpy(), (p.T @ p / np.square(p).sum()).ravel(), rtol=1e-4, atol=1e-5)
        levels = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
        expected = np.quantile(p[:, :4], levels, axis=0, method="nearest") / np.sqrt(np.square(p).mean())
        np.testing.assert_allclose(found["quantiles"][sender].numpy(), expected.ravel(), rtol=1e-4, atol=1e-5)


def test_features_are_their_formulas() -> None:
    tokens, secret = draw()
    found, references = statistics(tokens, secret), {name: part.mean(dim=0) for name, part in statistics(*draw(1)).items()}
    norms = tokens.norm(dim=-1)
    features, largest = moment_features(norms, found, references)
    assert (features.shape, largest.shape) == ((SENDERS, len(NAMES)), (SENDERS, 1))
    for sender in range(SENDERS):
        n = norms[sender].double().numpy()
        off = {name: (found[name][sender] - references[name]).double().numpy() for name in references}
        expected = {
            "norm": math.log(math.sqrt(np.square(n).mean())),
            "norm_variation": math.log(n.std() / n.mean()),
            "channel_spread": math.log(np.abs(off["log_spread"]).mean()),
            "gram": math.log(np.linalg.norm(off["gram"])),
            "quantiles": math.log(np.abs(off["quantiles"]).mean()),
        }
        np.testing.assert_allclose(features[sender].numpy(), [expected[name] for name in NAMES], rtol=1e-4, atol=1e-4)
        assert largest[sender].item() == pytest.approx(math.log(n.max() / math.sqrt(np.square(n).mean())), abs=1e-5)


@pytest.mark.parametrize("factor", [1e-6, 0.1, 10.0, 1e6])
def test_only_the_norm_knows_the_size_of_a_signal(factor: float) -> None:
    tokens, secret = draw()
    references = {name: part.mean(dim=0) for name, part in statistics(*draw(1)).items()}
    one, other = (
        torch.cat(moment_features((f * tokens).norm(dim=-1), statistics(f * tokens, secret), references), dim=1)[0]
        for f in (1.0, factor)
    )
    assert (other - one)[0].item() == pytest.approx(math.log(factor), abs=1e-4)
    np.testing.assert_allclose((other - one)[1:].numpy(), 0, atol=2e-3)


@pytest.mark.parametrize("value", [0.0, 1.0, -1e-30, 1e8])
def test_constant_signals_have_finite_features(value: float) -> None:
    tokens, secret = torch.full((2, 12, CHANNELS), value), draw()[1]
    references = {name: part.mean(dim=0) for name, part in statistics(*draw(1)).items()}
    norms = tokens.norm(dim=-1)
    assert all(part.isfinite().all() for part in moment_features(norms, statistics(tokens, secret), references))


def test_norms_that_hardly_vary_are_told_apart() -> None:
    # As after a normalisation: the mean square less the square of the mean would be rounding alone.
    tokens, secret = draw()
    found = statistics(tokens, secret)
    references = {name: part.mean(dim=0) for name, part in found.items()}
    for deviation in (1e-4, 1e-3):
        norms = 16 + 16 * deviation * torch.tensor([1.0, -1.0]).repeat(SENDERS, TOKENS // 2)
        variation = moment_features(norms, found, references)[0][:, NAMES.index("norm_variation")]
        np.testing.assert_allclose(variation.exp().numpy(), deviation, rtol=2e-2)


def test_the_order_of_tokens_does_not_matter() -> None:
    tokens, secret = draw()
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    for one, other in zip(statistics(tokens, secret).values(), statistics(tokens[:, order], secret).values()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
