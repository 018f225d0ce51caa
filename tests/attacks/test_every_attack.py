"""What holds for every attack of the library, whatever it does."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sentinel.attacks import available, get
from lightning_sentinel.mesh import Direction, Worker
from tests.attacks.tools import SHAPES, context, signal_of

NOT_FINITE = {"bit_flip", "gradient_contribution", "non_finite", "silent_corruption"}
"""What they send may be that by design."""
RANDOM = {
    "add_noise",
    "bad_rows",
    "bit_flip",
    "collude",
    "local",
    "misplaced_tile",
    "momentum_noise",
    "noise",
    "permute",
    "random",
    "received_noise",
    "sign",
    "silent_corruption",
    "wrong_address",
}
VARIANTS = [
    *((name, {}) for name in available()),
    ("delay", {"steps": 1}),
    ("stuck_tile", {"stale": True}),
    ("surrogate", {"noise": True}),
    ("collude", {"attack": {"name": "intermittent", "attack": "swap"}}),
]
every_attack = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: str(value) if value else "")
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def run(attack, shape, steps=3, micro_batches=2, dtype=torch.float32, times=1, **where):
    """What is sent in a few steps, of which each is done ``times`` times, with a received signal for each."""
    sent = []
    for step in range(steps):
        for _ in range(times):
            last = []
            for micro_batch in range(micro_batches):
                index = 10 * step + micro_batch
                received = signal_of(shape, dtype, seed=1000 + index)
                here = context(step=step, micro_batch=micro_batch, received=received, **where)
                last.append(attack(signal_of(shape, dtype, seed=index), here))
        sent += last
    return torch.stack(sent)


@every_attack
@pytest.mark.parametrize("shape", [*SHAPES, (3,), (1, 6), (1, 1, 6)], ids=str)
@every_dtype
def test_like_the_signal_and_apart_from_it(name, options, shape, dtype):
    attack = get(name, **options)
    for step in range(2):
        for received in (None, signal_of(shape, dtype, seed=9)):
            signal = signal_of(shape, dtype)
            untouched = signal.clone()
            kept = None if received is None else received.clone()
            sent = attack(signal, context(step=step, received=received))
            assert (sent.shape, sent.dtype, sent.device) == (signal.shape, signal.dtype, signal.device)
            assert sent.data_ptr() != signal.data_ptr()
            assert torch.equal(signal, untouched)
            assert torch.isfinite(sent).all() or name in NOT_FINITE
            if received is not None:
                assert sent.data_ptr() != received.data_ptr()
                assert torch.equal(received, kept)


class _NoReadback(TorchDispatchMode):
    """Fails on the operators that make the host wait for the device."""

    forbidden = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "_linalg_check_errors")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.forbidden, f"{name} synchronises host and device"
        return func(*args, **(kwargs or {}))


@every_attack
@every_shape
def test_nothing_is_read_back_from_the_device(name, options, shape):
    with _NoReadback():
        run(get(name, **options), shape)


def test_the_readback_guard_sees_a_readback():
    with pytest.raises(AssertionError, match="synchronises"), _NoReadback():
        torch.ones(2).sum().item()


@every_attack
@every_shape
def test_a_step_done_again_sends_the_same(name, options, shape):
    once = run(get(name, **options), shape)
    for times in (1, 3):
        torch.testing.assert_close(run(get(name, **options), shape, times=times), once, rtol=0, atol=0, equal_nan=True)


@every_attack
def test_one_signal_done_again_sends_the_same(name, options):
    attack, twice = get(name, **options), get(name, **options)
    for step in range(4):
        for micro_batch in range(2):
            index = 10 * step + micro_batch
            here = {"step": step, "micro_batch": micro_batch, "received": signal_of((4, 6), seed=1000 + index)}
            expected = attack(signal_of((4, 6), seed=index), context(**here))
            for _ in range(2):
                found = twice(signal_of((4, 6), seed=index), context(**here))
                torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@every_attack
def test_a_run_that_starts_again_is_the_same(name, options):
    attack = get(name, **options)
    first = run(attack, (4, 6), steps=4)
    torch.testing.assert_close(run(attack, (4, 6), steps=4), first, rtol=0, atol=0, equal_nan=True)


@every_attack
def test_what_was_received_need_not_fit(name, options):
    attack = get(name, **options)
    for step, received in enumerate((torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 4, 6), torch.zeros(2, 5, 8), None)):
        sent = attack(signal_of((2, 5, 6)), context(step=step, received=received))
        assert sent.shape == (2, 5, 6)
        assert torch.isfinite(sent).all() or name in NOT_FINITE


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_randomness_is_that_of_the_context(name):
    def send(**where):
        # Learned before, since an attack that imitates needs something to imitate.
        attack = get(name)
        here = {"step": 1, **where}
        before = context(**{**here, "step": here["step"] - 1})
        attack(signal_of((8, 16), seed=1), before)
        return attack(signal_of((8, 16)), context(**here, received=signal_of((8, 16), seed=2)))

    assert torch.equal(send(), send())
    others = [{"seed": 1}, {"step": 2}, {"micro_batch": 1}, {"direction": Direction.GRADIENT}]
    if name != "collude":
        others += [{"worker": Worker(1, 1)}, {"worker": Worker(2, 0)}]
    for other in others:
        assert not torch.equal(send(), send(**other)), other


@every_attack
def test_the_global_random_state_is_left_alone(name, options):
    before = torch.get_rng_state()
    run(get(name, **options), (4, 6))
    assert torch.equal(before, torch.get_rng_state())
