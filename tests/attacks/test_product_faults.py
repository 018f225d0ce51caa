"""Faults inside matrix products: what exactly they alter, compared with products that are multiplied by hand."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from lightning_sentinel.attacks import (
    Adversary,
    BitFlip,
    MisplacedTile,
    SilentCorruption,
    Site,
    StuckTile,
    WrongAddress,
    get,
)
from lightning_sentinel.attacks.products import Phase, Product
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Direction, Mesh, Worker
from tests.attacks.tools import context, signal_of

FAULTY, OTHER = Worker(1, 0), Worker(1, 1)
MESH = Mesh(3, 4)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.itemsize])


def passed(attack, worker=FAULTY, step=0, direction="both", seed=0):
    """A forward and a backward pass of two layers, as an engine does them: the output, and the gradients."""
    adversary = Adversary(attack, MESH, workers=[FAULTY], direction=direction, seed=seed)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4))
    inputs = torch.randn(3, 6, requires_grad=True)
    with adversary.computing(worker, step, 0, backward=False):
        output = layers(inputs.clone())
    with adversary.computing(worker, step, 0, backward=True):
        output.square().sum().backward()
    return [output.detach(), inputs.grad, layers[0].weight.grad, layers[1].weight.grad, layers[1].bias.grad]


@cache
def honest_pass() -> list[Tensor]:
    """An attack on messages touches no computation. Not made at import: no backward pass may come before ranks are forked."""
    return passed("zeros")


def altered(found: list[Tensor]) -> list[bool]:
    return [not torch.equal(one, honest) for one, honest in zip(found, honest_pass())]


@every_dtype
@pytest.mark.parametrize("bit", [0, 2, 9])
def test_one_bit_of_some_elements_is_another(dtype, bit):
    signal = signal_of((4, 6), dtype)
    wrong = BitFlip(bit=bit, count=3)(signal, context())
    differ = bits(signal) ^ bits(wrong)
    changed = differ[differ != 0]
    assert len(changed) == 3 and len(changed.unique()) == 1
    assert int(changed[0]) & (2 ** (8 * dtype.itemsize) - 1) == 1 << (8 * dtype.itemsize - 1 - bit)


@every_dtype
@pytest.mark.parametrize("flips", [1, 2, 5])
def test_as_many_bits_flip_as_are_asked_for(dtype, flips):
    signal = signal_of((4, 6), dtype)
    differ = bits(signal) ^ bits(BitFlip(flips=flips)(signal, context()))
    (changed,) = differ[differ != 0].tolist()
    assert bin(changed & (2 ** (8 * dtype.itemsize) - 1)).count("1") == flips


def test_every_bit_of_a_dtype_is_drawn():
    signal = torch.ones(1)
    drawn = {int(bits(signal) ^ bits(BitFlip()(signal, context(step=step)))) & 0xFFFFFFFF for step in range(400)}
    assert drawn == {1 << bit for bit in range(32)}


def test_a_bit_that_the_dtype_lacks_is_refused():
    with pytest.raises(ConfigurationError, match=r"BitFlip\(bit=20\) cannot work: .*bfloat16, which has 16 bits"):
        BitFlip(bit=20)(torch.ones(2, dtype=torch.bfloat16), context())


# Output, input's gradient, first and second weight's gradient, bias's gradient, which is no product.
@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        ("forward", [True, True, True, True, True]),
        ("backward_input", [False, True, True, False, False]),
        ("backward_weight", [False, False, True, True, False]),
    ],
)
def test_the_phase_decides_what_is_hit(phase, expected):
    assert altered(passed({"name": "bit_flip", "bit": 0, "phase": phase})) == expected


def test_the_kernel_decides_what_is_hit():
    # Of the forward pass the second layer's only, which has a bias.
    output, *_ = passed({"name": "bit_flip", "bit": 0, "phase": "forward", "kernel": "addmm"})
    differ = bits(output) ^ bits(honest_pass()[0])
    assert int((differ != 0).sum()) == 1 and int(differ[differ != 0]) == -(2**31)
    assert not any(altered(passed({"name": "bit_flip", "kernel": "bmm"})))


@pytest.mark.parametrize(
    ("direction", "phase", "hit"),
    [("activation", "forward", True), ("activation", "backward_weight", False), ("gradient", "forward", False)],
)
def test_the_direction_is_that_of_the_pass(direction, phase, hit):
    assert any(altered(passed({"name": "bit_flip", "bit": 0, "phase": phase}, direction=direction))) is hit


@pytest.mark.parametrize("operand", ["left", "right"])
def test_a_factor_is_wrong_before_it_is_multiplied(operand):
    left, right = signal_of((3, 4)), signal_of((4, 5), seed=1)
    product = Product("mm", Phase.FORWARD, 0, left, right, torch.mm)
    wrong = BitFlip(bit=0, operand=operand)(left @ right, _at(product))
    # One element of the factor has another sign, so the product is off by twice its outer product.
    off = (left @ right - wrong).numpy()
    rows = (abs(off) > 1e-5).any(axis=1).sum(), (abs(off) > 1e-5).any(axis=0).sum()
    assert rows == ((1, 5) if operand == "left" else (3, 1))
    expected = [
        2 * left[i, k] * right[k, j]
        for i in range(3)
        for k in range(4)
        for j in range(5)
        if abs(2 * left[i, k] * right[k, j] - off[i, j]) < 1e-4
    ]
    assert len(expected) >= max(rows)


def _at(product: Product, step: int = 0):
    from lightning_sentinel.attacks import AttackContext

    return AttackContext.seeded(0, FAULTY, Direction.ACTIVATION, step=step, product=product)


def test_the_rate_is_that_of_single_products():
    left = right = torch.eye(2)
    attack = get("bit_flip", bit=0, rate=0.2)
    hit = 0
    for step in range(200):
        for number in range(10):
            product = Product("mm", Phase.FORWARD, number, left, right, torch.mm)
            hit += not torch.equal(attack(left, _at(product, step)).view(torch.int32), left.view(torch.int32))
    # Five standard deviations of a binomial.
    assert abs(hit - 400) < 5 * (2000 * 0.2 * 0.8) ** 0.5


def test_nobody_else_is_hit_and_seeds_repeat():
    attack = {"name": "bit_flip", "bit": 0, "rate": 0.5}
    assert not any(altered(passed(attack, worker=OTHER)))
    assert all(map(torch.equal, passed(attack), passed(attack)))
    assert len({tuple(altered(passed(attack, step=step))) for step in range(6)}) > 1
    assert any(not torch.equal(*pair) for pair in zip(passed(attack), passed(attack, seed=1)))


@pytest.mark.parametrize("shape", [(40, 64), (2, 40, 64)], ids=str)
def test_a_misplaced_tile_holds_another_tile(shape):
    result = torch.arange(float(torch.Size(shape).numel())).view(shape)
    wrong = MisplacedTile(tile=8)(result, context())
    at = (wrong != result).view(-1, 64).nonzero()
    rows, columns = at[:, 0].unique(), at[:, 1].unique()
    assert len(at) == 64 and len(rows) == len(columns) == 8
    assert rows[0] % 8 == columns[0] % 8 == 0 and rows[-1] - rows[0] == columns[-1] - columns[0] == 7
    offsets = (wrong - result)[wrong != result].unique()
    # All of the tile comes from one place, a whole number of tiles away, of the same matrix.
    assert len(offsets) == 1 and offsets[0] % 8 == 0


@pytest.mark.parametrize("stale", [False, True])
def test_a_stuck_tile_holds_zeros_or_what_was_there_before(stale):
    attack = StuckTile(tile=8, stale=stale)
    before, now = signal_of((16, 24)), signal_of((16, 24), seed=1)
    first = attack(before, context())
    assert torch.equal(first, before) is stale
    wrong = attack(now, context(micro_batch=1))
    there = before if stale else torch.zeros(16, 24)
    differ = wrong != now
    assert int(differ.sum()) == 64 and torch.equal(wrong[differ], there[differ])


def test_wrong_addresses_have_the_period_of_a_warp():
    result = torch.randn(16, 64)
    wrong = WrongAddress()(result, context()).view(-1)
    at = (wrong != result.view(-1)).nonzero().view(-1)
    assert len(at) == 32 and (at.diff() == 32).all()
    again = WrongAddress()(result, context(step=1)).view(-1)
    # The lane belongs to the worker, where it reads to the step.
    assert torch.equal((again != result.view(-1)).nonzero().view(-1), at) and not torch.equal(again, wrong)
    # All are read from one offset.
    offset = int((result.view(-1) == wrong[at[0]]).nonzero()) - int(at[0])
    assert torch.equal(wrong[at], result.view(-1)[(at + offset) % 1024])


def test_the_shares_of_silent_corruptions():
    result, kinds = torch.rand(8, 32) + 1, Counter[str]()
    for step in range(2000):
        wrong = SilentCorruption()(result, context(step=step))
        differ = bits(result) ^ bits(wrong)
        changed = differ[differ != 0]
        flips = bin(int(changed[0]) & 0xFFFFFFFF).count("1")
        exact = (wrong == result.view(-1, 1, 1)).any(dim=0)
        if bool(exact.all()):
            kinds["address"] += 1
        elif wrong.isfinite().all():
            kinds["one bit" if flips == 1 else "several"] += 1
        else:
            kinds["not finite"] += 1
    shares = {kind: count / 2000 for kind, count in kinds.items()}
    # A flip of the exponent's last clear bit, too, makes an infinity or NaN of a number in [1, 2).
    assert 0.01 <= shares["not finite"] < 0.05
    assert shares["address"] == pytest.approx(0.2, abs=0.03)
    assert shares["one bit"] / (shares["one bit"] + shares["several"]) < 0.42


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BitFlip(bit=64), "bit must be an integer from 0 to 63, or None"),
        (lambda: BitFlip(flips=0), "flips must be an integer from 1 to 16"),
        (lambda: BitFlip(count=0), "count must be an integer above 0"),
        (lambda: BitFlip(operand="both"), "operand must be result, left or right"),
        (lambda: BitFlip(phase="backward"), "phase must be one of forward, backward_input, backward_weight, or None"),
        (lambda: BitFlip(kernel="conv2d"), "kernel must be one of mm, bmm, addmm, baddbmm, or None"),
        (lambda: WrongAddress(rate=0.0), "rate must be a number above 0 and at most 1"),
        (lambda: SilentCorruption(rate="1e-3"), r"\(str\) cannot work: rate must be a number"),
        (lambda: WrongAddress(period=0), "period must be an integer above 0"),
        (lambda: MisplacedTile(tile=0), "tile must be an integer above 0"),
        (lambda: StuckTile(tile=2.0), "tile must be an integer above 0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_a_result_that_does_not_fit_is_refused():
    def shorter(result, context):
        return result[:1]

    shorter.site = Site.PRODUCT
    with pytest.raises(ConfigurationError, match=r"The attack shorter of worker .* returned a tensor of shape \(1, 5\)"):
        passed(shorter)


def test_a_wrapped_fault_pauses_in_some_steps():
    attack = {"name": "intermittent", "attack": {"name": "bit_flip", "bit": 0}, "probability": 0.5}
    assert {any(altered(passed(attack, step=step))) for step in range(8)} == {False, True}
