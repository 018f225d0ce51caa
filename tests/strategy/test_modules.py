"""What a module may do: each as it does it under ``strategy="auto"``, on meshes in this process."""

from __future__ import annotations

import copy
import random
import traceback
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lightning_sentinel as ls
from lightning_sentinel.attacks.faults import Site
from lightning_sentinel.errors import PipelineModelError
from tests.user_modules import (
    OPTIMIZERS,
    ByName,
    Deep,
    Fetches,
    Module,
    Net,
    Once,
    OnlyLogs,
    OwnBackward,
    OwnClipping,
    Partly,
    Samples,
    Skips,
    loader,
)

MESHES = [(1, 1), (3, 2)]


def trainer(strategy: Any, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(strategy=strategy, accelerator="cpu", devices=1, **{"max_epochs": 2} | options, **quiet)


def virtual(stages: int, replicas: int, **settings: Any) -> ls.SentinelStrategy:
    return ls.SentinelStrategy(stages, replicas, engine="virtual", **{"micro_batches": 2, "verification": None} | settings)


def fitted(module: L.LightningModule, strategy: Any, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], L.Trainer]:
    run = trainer(strategy, **options)
    run.fit(module, loader(), loader())
    weights = {name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()}
    return weights, dict(run.callback_metrics), run


def same_as_without(make: Callable[[], L.LightningModule], mesh: tuple[int, int], **options: Any) -> None:
    expected, logged, plain = fitted(make(), "auto", **options)
    found, also_logged, run = fitted(make(), virtual(*mesh), **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(also_logged, logged, rtol=1e-4, atol=1e-5)
    assert run.global_step == plain.global_step


def compiled(in_place: bool) -> Module:
    module = Module()
    if in_place:
        module.model.compile(backend="eager")
    else:
        module.model = torch.compile(module.model, backend="eager")
    return module


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    "make",
    [Module, Deep, ByName, lambda: compiled(False), lambda: compiled(True)],
    ids=["plain", "deep", "by name", "compiled", "in place"],
)
def test_a_net_in_an_attribute(make: Callable[[], Module], mesh: tuple[int, int]) -> None:
    same_as_without(make, mesh)
    Net.runs = 0
    fitted(make(), virtual(*mesh))
    assert Net.runs == 0


@pytest.mark.parametrize("mesh", MESHES)
def test_nothing_in_a_step_happens_twice(mesh: tuple[int, int]) -> None:
    same_as_without(Once, mesh)
    module = Once()
    fitted(module, virtual(*mesh), max_epochs=1, num_sanity_val_steps=0)
    assert module.steps == 3 * 2 * mesh[1] + 3


def test_a_step_that_is_done_again_after_an_audit_sees_its_batch_as_it_was() -> None:
    """A liar is found in the second batch, which is done again without it."""
    attack = ls.AttackInjector(ls.attacks.get("scale", factor=50.0), workers=[ls.Worker(1, 0)], start_step=1)
    response = ls.Response(audit_rate=1.0)
    run = trainer(virtual(3, 3, verification=ls.Verification(warmup_steps=1), response=response), callbacks=[attack])
    module = Once()
    run.fit(module, DataLoader(Samples(), batch_size=12), loader())
    assert run.strategy.ledger.banned == {ls.Worker(1, 0)}
    plain = Once()
    trainer("auto").fit(plain, DataLoader(Samples(), batch_size=12), loader())
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_validation_that_calls_nothing(mesh: tuple[int, int]) -> None:
    same_as_without(OnlyLogs, mesh)


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"every": 1}], ids=str)
def test_a_training_step_without_a_loss(mesh: tuple[int, int], early: bool, options: dict[str, Any]) -> None:
    options = dict(options)
    every = options.pop("every", 2)
    same_as_without(lambda: Skips(early, every), mesh, **options)


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
@pytest.mark.parametrize("response", [ls.Response(), ls.Response(audit_rate=0.5)], ids=["at receipt", "audits"])
def test_a_batch_that_is_left_out_makes_nobody_a_suspect(response: ls.Response) -> None:
    """Not all micro-batches of a batch: of those that are, a gradient of zeros comes back."""

    class Some(Module):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
            self.steps += 1
            loss = super().training_step(batch, batch_idx)
            return None if self.steps % 5 == 0 or batch_idx == 1 else loss

    strategy = virtual(3, 3, verification=ls.Verification(warmup_steps=12), response=response)
    run = trainer(strategy, max_epochs=20)
    run.fit(Some(), DataLoader(Samples(36), batch_size=12), loader())
    # A gradient of zeros that was judged would be far out.
    assert not [one for one in strategy.detections if one.score > 2] and not strategy.ledger.banned


@pytest.mark.parametrize("mesh", MESHES)
def test_a_backward_of_its_own(mesh: tuple[int, int]) -> None:
    same_as_without(OwnBackward, mesh)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("by", ["norm", "value"])
def test_a_clipping_of_its_own(mesh: tuple[int, int], by: str) -> None:
    same_as_without(lambda: OwnClipping(by), mesh)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_over_a_part(name: str) -> None:
    same_as_without(lambda: Partly(name), (3, 2))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_that_fetches_its_batch(mesh: tuple[int, int]) -> None:
    same_as_without(Fetches, mesh)


def test_a_step_that_fetches_more_than_its_batch() -> None:
    class Two(Fetches):
        def training_step(self, dataloader_iter: Any) -> Tensor | None:
            next(dataloader_iter)
            return super().training_step(dataloader_iter)

        def validation_step(self, dataloader_iter: Any) -> None:
            next(dataloader_iter)
            super().validation_step(dataloader_iter)

    for stages in (1, 3):
        expected, logged, plain = fitted(Two(), "auto")
        found, also_logged, run = fitted(Two(), virtual(stages, 1, micro_batches=1))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(also_logged, logged)
        assert run.global_step == plain.global_step
    with pytest.raises(PipelineModelError, match=r"Two\.training_step has asked dataloader_iter for more than one batch"):
        fitted(Two(), virtual(3, 2))


class Fails(Module):
    """With an error that a lost worker might have been."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.early:
            self.fail()
        output = self.model(batch["x"])
        self.fail()
        return output.mean()

    def fail(self) -> None:
        raise RuntimeError("the socket of the user's own service timed out")


@pytest.mark.parametrize("early", [False, True])
def test_an_error_in_a_step_is_the_users_with_its_line(early: bool) -> None:
    with pytest.raises(RuntimeError, match="of the user's own service") as raised:
        fitted(Fails(early), virtual(3, 2))
    assert "fail" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]


class Calls(Module):
    def __init__(self, call: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.call(self.model, batch["x"]).float().mean()


def apart(net: Net, x: Tensor) -> Tensor:
    return net.head(net.mid[1](net.mid[0](net.inp(x))))


def in_bfloat16(net: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return net(x)


def without_gradients(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (apart, r"Calls\.training_step never called self\.model\(x\).*cannot be called apart"),
        (in_bfloat16, r"called self\.model\(x\) inside torch\.autocast.*Trainer\(precision='bf16-mixed'\)"),
        (without_gradients, r"called self\.model\(x\) where no gradients are recorded.*requires_grad_\(False\)"),
        (lambda net, x: checkpoint(net, x, use_reentrant=False), r"called self\.model\(x\) inside torch\.utils\.checkpoint"),
        (lambda net, x: net(net(x)), r"called self\.model\(x\) more than once"),
    ],
)
def test_what_other_stages_could_not_know_of_is_refused(call: Callable[[Net, Tensor], Tensor], says: str) -> None:
    with pytest.raises(PipelineModelError, match=says):
        fitted(Calls(call), virtual(3, 2))
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_the_entry_can_be_named() -> None:
    with pytest.raises(PipelineModelError, match=r"sequential='model.mid' names no module.*\['', 'model'\]"):
        fitted(Module(), virtual(3, 2, sequential="model.mid"))
    fitted(Module(), virtual(3, 2, sequential="model"))


def test_a_step_that_is_left_out_as_lightning_wants_it() -> None:
    class Trained(Module):
        validation_step = None

    run = trainer(virtual(3, 2))
    run.fit(Trained(), loader())
    assert run.global_step == 6


class Listener:
    """A callback that is no subclass of Lightning's, and has no hook but one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_") or name in ("setup", "teardown", "load_state_dict", "state_dict"):
            return lambda *_, **__: None
        raise AttributeError(name)

    state_key = "Listener"


def test_a_callback_without_the_hooks_is_no_listener() -> None:
    from lightning_sentinel.strategy.listening import listened_to

    run = trainer("auto", callbacks=[])
    run.callbacks.append(Listener())
    run.strategy._lightning_module = Module()
    assert listened_to(run) == []


class Drawing(Module):
    """Draws on both sides of the call, with all that there is to draw with."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self.model(batch["x"] * (0.5 + random.random()) + torch.rand(()) + float(np.random.rand()))
        return (output - batch["y"]).square().mean() * (0.5 + random.random() + torch.rand(()) + float(np.random.rand()))


def test_a_step_draws_the_same_however_the_model_is_cut_and_when_it_is_done_again() -> None:
    """Replicas are dealt other samples than one pipeline, so only the cut differs; faults make a step go replica by replica."""
    weights = [fitted(Drawing(), virtual(stages, 2, verification=None))[0] for stages in (1, 3)]
    weights.append(fitted(Drawing(), virtual(3, 2, verification=ls.Verification(), response=ls.Response(audit_rate=1.0)))[0])
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-6)


class Drops(nn.Module):
    """Stochastic depth, by Python's or NumPy's generator; from an epoch on, so that the first calls say nothing of later ones."""

    def __init__(self, inner: nn.Module, draw: Callable[[], float], epoch: Callable[[], int] = lambda: 1) -> None:
        super().__init__()
        self.inner, self.draw, self.epoch = inner, draw, epoch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) * (self.draw() if self.training and self.epoch() else 0.5)


class DrawingLayers(Module):
    def __init__(self) -> None:
        super().__init__()
        first, second = self.model.mid
        later = Drops(second, random.random, lambda: self.trainer.current_epoch)
        self.model.mid = nn.ModuleList(
            [Drops(first, np.random.rand), nn.Sequential(later, nn.Dropout(0.2)), Drops(copy.deepcopy(first), random.random)]
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_draw_the_same_however_the_model_is_cut_and_when_they_run_again(checkpointing: bool) -> None:
    settings: list[dict[str, Any]] = [
        {"stages": 1},
        {"stages": 3},
        {"stages": 5},
        {"stages": 3, "verification": ls.Verification(), "response": ls.Response(audit_rate=1.0)},
    ]
    weights = []
    for chosen in settings:
        stages = chosen.pop("stages")
        weights.append(fitted(DrawingLayers(), virtual(stages, 2, activation_checkpointing=checkpointing, **chosen))[0])
    fault = ls.AttackInjector(Same(), workers=[ls.Worker(1, 1)], start_step=0)
    weights.append(fitted(DrawingLayers(), virtual(3, 2), callbacks=[fault])[0])
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-6)
    assert not torch.allclose(weights[0]["model.inp.weight"], fitted(Module(), virtual(1, 2))[0]["model.inp.weight"], atol=1e-3)


class Same:
    """A computation fault that leaves what is computed as it is."""

    site = Site.LAYER

    def __call__(self, output: Tensor, context: Any) -> Tensor:
        return output


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
@pytest.mark.parametrize("rate", [None, 1.0])
def test_where_replicas_go_one_by_one_a_module_may_do_the_same(rate: float | None) -> None:
    class Both(OwnBackward):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    found = []
    for factor in (None, 1.0):
        callbacks = [ls.AttackInjector(Same(), workers=[(2, 1)], start_step=0)] if factor else []
        run = trainer(virtual(3, 2, verification=ls.Verification(), response=ls.Response(audit_rate=rate)), callbacks=callbacks)
        module = Both()
        run.fit(module, loader())
        assert not run.strategy.ledger.banned
        found.append(module.state_dict())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)
