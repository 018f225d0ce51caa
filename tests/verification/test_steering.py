"""What docs/theory.md promises, against simulations: how far weights can be moved, and how surely a constant error is noticed."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.verification import guarantees, steering
from lightning_sentinel.verification.audit import AuditSchedule, made_of_data
from lightning_sentinel.verification.draws import Draws
from lightning_sentinel.verification.guarantees import chance_met, lies_that_count
from lightning_sentinel.verification.steering import (
    audits_until_noticed,
    chance_of_false_alarm,
    chance_unnoticed,
    chance_unnoticed_along,
    chance_unnoticed_map,
    largest_adam_step,
    largest_drift,
    reordering_error,
)
from lightning_sentinel.verification.tolerance import ALARM, TESTS, Tolerances, deviation
from lightning_sentinel.wiring import Wiring

ROOT = Path(__file__).resolve().parents[2]
LEAST = 1e-3
"""Up to which nobody is blamed in bfloat16."""
SENDER, INDEX = Worker(1, 0), 1


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- How far weights move


def stepped(weights: Tensor, gradient: Tensor, learning_rate: float, clip: float) -> Tensor:
    """Weights after a step of SGD with clipping, as torch does it."""
    parameter = torch.nn.Parameter(weights.clone())
    parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_([parameter], clip)
    torch.optim.SGD([parameter], lr=learning_rate).step()
    return parameter.detach()


@pytest.mark.parametrize("size", [0.3, 2.0, 100.0])
def test_one_lie_moves_weights_by_no_more_than_the_bound(size: float) -> None:
    replicas, clip, rate = 4, 1.0, 0.1
    furthest = 0.0
    for seed in range(100):
        gradients, lie = normal(seed, replicas, 6) * (0.1 + seed % 5), normal(1000 + seed, 6)
        error = size * lie / lie.norm() if seed % 2 else -size * gradients.mean(0) / gradients.mean(0).norm()
        spoilt = torch.cat((gradients[:1] + error, gradients[1:]))
        apart = stepped(torch.zeros(6), spoilt.mean(0), rate, clip) - stepped(torch.zeros(6), gradients.mean(0), rate, clip)
        furthest = max(furthest, float(apart.norm()))
    most = largest_drift(1, rate, replicas, size, clip)
    assert 0.9 * most < furthest <= most + 1e-6


def test_a_liar_moves_weights_as_far_as_the_lies_that_are_not_met() -> None:
    """A loss whose gradient is the same everywhere: 64 liars that all push the same way, until an audit meets them."""
    rate, replicas, learning_rate, error, momentum = 0.1, 8, 0.1, 3.0, 0.5
    mesh = Mesh(5, replicas)
    schedule, wiring = AuditSchedule(mesh, rate), Wiring.of(mesh)
    inner = ~made_of_data(mesh)
    drawn = [schedule.draw(Draws.seeded(mesh, 6, step), step, {}, wiring).signals.any(dim=0)[inner] for step in range(150)]
    free = (~torch.stack(drawn).flatten(1)).double().cumprod(dim=0)
    moved = torch.nn.Parameter(torch.zeros(free.shape[1], dtype=torch.float64))
    optimizer = torch.optim.SGD([moved], lr=learning_rate, momentum=momentum)
    for unmet in free:
        moved.grad = unmet * error / replicas
        optimizer.step()
    moved = moved.detach().abs()
    lies = lies_that_count(chance_met(rate, replicas))
    expected = largest_drift(lies.mean, learning_rate, replicas, error, momentum=momentum)
    assert abs(moved.mean() - expected) < 4 * moved.std() / len(moved) ** 0.5
    assert (moved <= largest_drift(lies.late, learning_rate, replicas, error, momentum=momentum) + 1e-9).double().mean() > 0.96


def test_where_the_loss_is_convex_the_distance_from_the_plain_run_is_no_more() -> None:
    curvature = torch.diag(torch.tensor([1.0, 0.3, 0.01])).double()
    lied_at, error, learning_rate, replicas = range(10, 30, 2), 2.0, 1.0, 5
    plain, spoilt = (torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64) for _ in range(2))
    furthest = 0.0
    for step in range(60):
        push = torch.tensor([0.0, 0.0, error / replicas]) if step in lied_at else torch.zeros(3)
        plain = plain - learning_rate * (curvature @ plain)
        spoilt = spoilt - learning_rate * (curvature @ spoilt + push)
        furthest = max(furthest, float((spoilt - plain).norm()))
    most = largest_drift(len(lied_at), learning_rate, replicas, error)
    assert 0.8 * most < furthest <= most


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.5, 0.99)])
def test_a_step_of_adam_is_no_longer_than_the_bound_and_the_worst_gradients_reach_it(betas: tuple[float, float]) -> None:
    steps, rate = 400, 0.01
    ages = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    worst = (betas[0] / betas[1]) ** ages
    sequences = [worst, *(normal(seed, steps).double().abs() ** (1 + seed) for seed in range(8))]
    gradients = torch.stack([one / one.max() for one in sequences], dim=1)
    weights = torch.nn.Parameter(torch.zeros(gradients.shape[1], dtype=torch.float64))
    optimizer = torch.optim.Adam([weights], lr=rate, betas=betas, eps=1e-300)
    longest = torch.zeros(gradients.shape[1], dtype=torch.float64)
    for gradient in gradients:
        before = weights.detach().clone()
        weights.grad = gradient
        optimizer.step()
        longest = torch.maximum(longest, (weights.detach() - before).abs())
    most = largest_adam_step(rate, betas)
    # In the first steps the second moment is divided by less than its share, so that the last step is a little shorter.
    seen = math.sqrt(1 - betas[1] ** steps) / (1 - betas[0] ** steps)
    assert longest.max() <= most and longest[0] == pytest.approx(most * seen, rel=1e-3)


def test_rounding_leaves_a_random_walk_and_a_constant_error_a_straight_line() -> None:
    """SGD on a loss whose gradient is fixed, but for what each step rounds: bfloat16, stochastic in its effect."""
    steps, walkers, eps = 400, 200, 2e-3
    rounding = eps * normal(0, steps, walkers).double()
    apart = rounding.cumsum(dim=0)
    assert almost_square(apart[-1], eps * math.sqrt(steps))
    assert almost_square(apart[99], eps * math.sqrt(100))
    constant = torch.full((steps,), eps, dtype=torch.float64).cumsum(dim=0)
    assert float(constant[-1]) / (eps * math.sqrt(steps)) == pytest.approx(math.sqrt(steps))


def almost_square(values: Tensor, deviation_of_all: float) -> bool:
    found = float(values.square().sum()) / deviation_of_all**2
    return bool(stats.chi2(len(values)).cdf(found) > 0.001 and stats.chi2(len(values)).sf(found) > 0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("replicas", [2, 8, 64])
def test_another_order_of_summation_changes_a_mean_by_no_more_than_the_bound(replicas: int, dtype: torch.dtype) -> None:
    terms = normal(4, replicas, 500).to(dtype)
    sums = []
    for seed in range(12):
        total = torch.zeros(500, dtype=dtype)
        for one in terms[torch.randperm(replicas, generator=torch.Generator().manual_seed(seed))]:
            total = total + one
        sums.append(total.double())
    apart = (torch.stack(sums).max(dim=0).values - torch.stack(sums).min(dim=0).values) / terms.double().abs().sum(dim=0)
    assert apart.max() <= reordering_error(replicas, dtype)
    assert replicas == 2 or apart.max() > 0


# --- Whether a constant error is noticed


def noticed(tolerances: Tolerances, sender: Worker = SENDER) -> bool:
    return tolerances.errs_one_way(INDEX, sender, LEAST)


def all_noticed(errors: Tensor) -> int:
    """How many workers are found to err one way, by their signed errors ``(workers, audits, directions)``."""
    mesh = Mesh(3, len(errors))
    tolerances = Tolerances(mesh, seed=0)
    name = mesh.boundaries[INDEX].name
    number = torch.full((len(errors),), float(errors.shape[1]), dtype=torch.float64)
    sums, squares = errors.double().sum(dim=1), errors.double().square().sum(dim=1)
    tolerances.load_state_dict({f"{name}/sums": sums, f"{name}/squares": squares, f"{name}/number": number})
    return sum(noticed(tolerances, Worker(1, replica)) for replica in range(len(errors)))


@pytest.mark.parametrize(("mean", "spread", "audits"), [(4e-3, 3e-3, 40), (4e-3, 3e-3, 36), (2e-3, 4e-3, 100), (1.2e-3, 1e-3, 60)])
def test_the_power_of_the_sums_is_that_of_a_t_test(mean: float, spread: float, audits: int) -> None:
    """One direction, normally distributed errors: the exact distribution, from scipy, our bound, and the class that decides."""
    runs = 400
    errors = torch.zeros(runs, audits, TESTS)
    errors[..., 0] = mean + spread * normal(7, runs, audits)
    missed = runs - all_noticed(errors)
    threshold = math.sqrt(ALARM * (audits - 1) / (audits - ALARM))
    scattered = stats.nct(audits - 1, mean * math.sqrt(audits) / spread).cdf(threshold)
    small = stats.norm.cdf((LEAST - mean) * math.sqrt(audits) / spread)
    assert stats.binomtest(missed, runs, max(scattered, small), alternative="less").pvalue > 0.001
    assert stats.binomtest(missed, runs, min(1.0, scattered + small), alternative="greater").pvalue > 0.001
    approximated = chance_unnoticed_along(mean, spread, audits, LEAST)
    assert approximated == pytest.approx(min(1.0, scattered + small), abs=0.02)


@pytest.mark.parametrize(("mean", "spread"), [(4e-3, 0.0), (4e-3, 4e-3), (4e-3, 8e-3)])
def test_as_many_audits_as_the_formula_says_are_needed_on_average(mean: float, spread: float) -> None:
    expected = audits_until_noticed(mean, spread)
    found = []
    for seed in range(25):
        tolerances = Tolerances(Mesh(3, 2), seed=0)
        for number, one in enumerate((mean + spread * normal(seed, 4 * expected)).tolist()):
            tolerances.heard(INDEX, SENDER, [1.0, one] + [0.0] * (TESTS - 1))
            if noticed(tolerances):
                found.append(number + 1)
                break
    assert len(found) == 25 and np.median(found) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("error", [1.5e-3, 2.5e-3, 5e-3])
def test_a_constant_error_is_missed_no_more_often_than_the_formula_says(error: float) -> None:
    """Signals as they are audited, with rounding; the shift and the directions are drawn anew each time."""
    audits, rounding, runs, shape = 31, 2e-3, 60, (2, 8, 64)
    missed = 0
    honest = normal(1, *shape)
    for seed in range(runs):
        shift = normal(10_000 + seed, shape[-1])
        shift *= error * math.sqrt(shape[-1]) / shift.norm()
        tolerances = Tolerances(Mesh(3, 2), seed)
        rounded = rounding * normal(seed, audits, *shape)
        for one in rounded:
            tolerances.heard(INDEX, SENDER, deviation(honest + shift + one, honest, tolerances.seed_of(INDEX)).tolist())
        missed += not noticed(tolerances)
    most = chance_unnoticed(error, rounding, shape[0] * shape[1], audits, LEAST)
    assert stats.binomtest(missed, runs, most, alternative="greater").pvalue > 0.001
    if error < 2e-3:
        assert stats.binomtest(missed, runs, most / 2, alternative="less").pvalue > 0.001, "nor is the bound far away"


@pytest.mark.parametrize("spread", [2e-4, 3e-3])
def test_honest_rounding_raises_no_alarm(spread: float) -> None:
    audits, workers = 200, 40
    errors = spread * normal(3, workers, audits, TESTS)
    assert not any(all_noticed(errors[:, : count + 1]) for count in range(28, audits, 5))
    assert chance_of_false_alarm(spread, 1, audits, LEAST) < (1e-9 if spread < LEAST else 0.02)
    assert chance_of_false_alarm(0.0, 1, audits, LEAST) == 0.0


@pytest.mark.parametrize("error", [2.5e-3, 5e-3])
def test_a_map_of_each_token_is_missed_about_as_often_as_the_formula_says(error: float) -> None:
    audits, rounding, runs, shape = 40, 2e-3, 60, (4, 64, 16)
    channels, tokens = shape[-1], shape[0] * shape[1]
    missed = 0
    for seed in range(runs):
        turn = torch.linalg.qr(normal(10_000 + seed, channels, channels)).Q
        tolerances = Tolerances(Mesh(3, 2), seed)
        honest, rounded = normal(seed, audits, *shape), rounding * normal(50_000 + seed, audits, *shape)
        for one, off in zip(honest, rounded):
            tolerances.heard(INDEX, SENDER, deviation(one + error * one @ turn + off, one, tolerances.seed_of(INDEX)).tolist())
        missed += not noticed(tolerances)
    expected = chance_unnoticed_map(error, rounding, tokens, channels, audits, LEAST)
    assert stats.binomtest(missed, runs, min(1.0, 2 * expected), alternative="greater").pvalue > 0.001
    assert stats.binomtest(missed, runs, expected / 4, alternative="less").pvalue > 0.001


def test_all_tests_together_raise_a_false_alarm_no_more_often_than_the_bound() -> None:
    """Of normally distributed errors: the exact distribution, from scipy, at each look; and Efron's bound for others."""
    for audits in (40, 100, 1000):
        threshold = math.sqrt(ALARM * (audits - 1) / (audits - ALARM))
        exact = 2 * stats.t(audits - 1).sf(threshold)
        assert TESTS * exact < 5e-6 and exact <= 2 * math.exp(-ALARM / 2)
    assert TESTS * 2 * stats.norm.sf(math.sqrt(ALARM)) == pytest.approx(4e-6, rel=0.1)


def test_errors_that_follow_from_other_tokens_are_not_noticed() -> None:
    """What the page says is not covered: what is added to a token depends on the token before it."""
    honest = normal(0, 60, 2, 16, 64)
    turn = torch.linalg.qr(normal(1, 64, 64)).Q
    tolerances = Tolerances(Mesh(3, 2), seed=5)
    for one in honest:
        before = one.roll(1, dims=1) - one.mean(dim=(0, 1))
        tolerances.heard(INDEX, SENDER, deviation(one + 4e-3 * before @ turn, one, tolerances.seed_of(INDEX)).tolist())
    assert not noticed(tolerances)


# --- The page


def test_the_page_shows_what_the_formulas_give() -> None:
    """Cells of its tables that are calls: `name(...)` beside the figure."""
    page = (ROOT / "docs" / "theory.md").read_text()
    known = {name: getattr(module, name) for module in (guarantees, steering) for name in module.__all__}
    shown = re.findall(r"^\| [^|]*\| `([^`]+)` \| ([\d.e-]+)( %)? \|$", page, re.MULTILINE)
    assert len(shown) > 10
    for call, figure, percent in shown:
        value = float(eval(call, {"inf": math.inf}, known)) * (100 if percent else 1)
        digits = len(figure.split("e")[0].replace(".", "").lstrip("0")) or 1
        assert value == pytest.approx(float(figure), rel=0.6 * 10 ** (1 - digits)), call


def test_every_result_of_the_page_has_assumptions_and_a_test() -> None:
    page = (ROOT / "docs" / "theory.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    results = page.split("\n### ")[1:]
    assert len(results) > 8
    for result in results:
        title = result.splitlines()[0]
        assert "\n**Assumes:** " in result, title
        tested = result.partition("**Tested by:** ")[2].split("\n\n")[0]
        named = re.findall(r"`(test_\w+)`", tested)
        assert named, title
        assert not [name for name in named if f"def {name}(" not in sources], title
