from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, MeanSquaredError, Metric, MinMaxMetric

from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.pipeline.step_checks import loss_of
from lightning_sentinel.pipeline.steps import NeverCalledError, StepRunner

Pair = namedtuple("Pair", ["inputs", "labels"])
YES = torch.tensor(True)
NO = torch.tensor(False)


@dataclass
class Record:
    inputs: Tensor
    labels: Tensor


def rows(samples: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, 3, generator=torch.Generator().manual_seed(seed))


class Regression(L.LightningModule):
    """``shape`` decides how the step is written."""

    def __init__(self, shape: str = "net") -> None:
        super().__init__()
        self.shape = shape
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        self.after: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        inputs, targets = batch
        scaled = inputs * 2 + batch_idx
        self.log("before", scaled.mean())
        if self.shape == "never":
            return scaled.mean()
        if self.shape == "two inputs":
            return self.net(scaled, targets)
        if self.shape == "named":
            return self.net(x=scaled)
        if self.shape == "twice":
            return (self.net(scaled) - self.net(targets)).mean()
        if self.shape == "fails":
            raise ArithmeticError("of the user's own")
        if self.shape == "handler":
            try:
                output = self(scaled)
            except Exception:
                self.after.append("handled")
                return None
            finally:
                self.after.append("finally")
        else:
            output = self(scaled)
        self.after.append("after")
        loss = ((output[:, :1] - targets) ** 2).mean()
        self.log_dict({"loss": loss, "largest": output.max()}, reduce_fx="max", prog_bar=True)
        return {"loss": loss, "output": output}


def batch(samples: int = 4) -> tuple[Tensor, Tensor]:
    return rows(samples), rows(samples, seed=1)[:, :1]


def is_untouched(module: L.LightningModule) -> bool:
    return all("forward" not in vars(child) and "log" not in vars(child) for child in module.modules())


class TestInputOf:
    @pytest.mark.parametrize("whole", [True, False], ids=["self(x)", "self.net(x)"])
    def test_what_goes_in(self, whole: bool) -> None:
        module = Regression()
        runner = StepRunner(module, module if whole else module.net)
        inputs, targets = batch()
        assert torch.equal(runner.input_of("training_step", ((inputs, targets), 3)), inputs * 2 + 3)
        assert module.after == []
        assert runner.recorder.schema.entries == {}
        assert is_untouched(module)

    def test_the_users_handlers_let_it_pass(self) -> None:
        module = Regression("handler")
        inputs, targets = batch()
        found = StepRunner(module, module.net).input_of("training_step", ((inputs, targets), 0))
        assert torch.equal(found, inputs * 2)
        assert module.after == ["finally"]

    @pytest.mark.parametrize(
        ("shape", "says"),
        [
            ("never", r"Regression\.training_step never called self\.net\(x\).*Call it once"),
            ("two inputs", r"self\.net\(x\) was called with 2 positional and 0 named.*pass a single argument"),
            ("named", r"0 positional and 1 named"),
        ],
    )
    def test_refused(self, shape: str, says: str) -> None:
        module = Regression(shape)
        with pytest.raises(PipelineModelError, match=says):
            StepRunner(module, module.net).input_of("training_step", (batch(), 0))
        assert is_untouched(module)

    def test_the_call_is_named_as_the_user_writes_it(self) -> None:
        module = Regression("never")
        with pytest.raises(PipelineModelError, match=r"never called self\(x\)"):
            StepRunner(module, module).input_of("training_step", (batch(), 0))

    def test_the_users_own_error_passes(self) -> None:
        module = Regression("fails")
        with pytest.raises(ArithmeticError, match="of the user's own"):
            StepRunner(module, module.net).input_of("training_step", (batch(), 0))
        assert is_untouched(module)

    def test_what_was_set_on_the_instance_comes_back(self) -> None:
        module = Regression()

        def log(*_: Any, **__: Any) -> None:
            raise AssertionError("the pipeline's first stage must not log")

        module.log = log  # type: ignore[method-assign]
        module.net.forward = forward = lambda x: x  # type: ignore[method-assign]
        StepRunner(module, module.net).input_of("training_step", (batch(), 0))
        assert vars(module)["log"] is log
        assert vars(module.net)["forward"] is forward


class TestFinish:
    @pytest.mark.parametrize("whole", [True, False], ids=["self(x)", "self.net(x)"])
    def test_the_users_loss(self, whole: bool) -> None:
        module = Regression()
        runner = StepRunner(module, module if whole else module.net)
        data = batch()
        output = rows(4, seed=2).requires_grad_()
        result = runner.start("training_step", (data, 0), 4).finish(output, YES)
        expected = ((output[:, :1] - data[1]) ** 2).mean()
        assert result["output"] is output
        assert torch.equal(result["loss"], expected)
        loss_of(result, "training_step").backward()
        assert torch.allclose(output.grad[:, :1], (2 * (output[:, :1] - data[1]) / 4).detach())
        assert is_untouched(module)

    def test_logs_are_recorded(self) -> None:
        module = Regression()
        runner = StepRunner(module, module.net)
        outputs = [rows(2, seed=2), rows(1, seed=3), 100 + rows(1, seed=4)]
        for output, counts in zip(outputs, (YES, YES, NO)):
            runner.start("training_step", (batch(len(output)), 0), len(output)).finish(output, counts)
        schema = runner.recorder.schema
        assert schema.names == ["before", "largest", "loss"]
        assert schema.entries["largest"]["options"]["prog_bar"] is True
        reduced = schema.reduce(runner.recorder.vector()[None])
        assert reduced["largest"] == (pytest.approx(float(torch.cat(outputs[:2]).max())), 3.0)

        runner.new_records()
        assert runner.recorder.schema.entries == {}

    def test_what_is_logged_before_the_call_waits_for_whether_it_counts(self) -> None:
        module = Regression()
        runner = StepRunner(module, module.net)
        runs = [runner.start("training_step", (batch(size), 0), size) for size in (1, 2, 3)]
        before = runner.recorder.schema.reduce(runner.recorder.vector()[None])
        assert before == {}, "nobody knows yet"
        for size, run, counts in zip((1, 2, 3), runs, (YES, NO, YES)):
            run.finish(rows(size), counts)
        means = [float((batch(size)[0] * 2).mean()) for size in (1, 3)]
        mean, samples = runner.recorder.schema.reduce(runner.recorder.vector()[None])["before"]
        assert samples == 4 and mean == pytest.approx((means[0] + 3 * means[1]) / 4)

    def test_one_that_never_calls_has_returned(self) -> None:
        module = Regression("never")
        run = StepRunner(module, module.net).start("training_step", (batch(), 0), 4)
        assert not run.waits
        assert torch.equal(run.finish(None, YES), batch()[0].mean() * 2)
        with pytest.raises(NeverCalledError, match="called apart"):
            _ = run.inputs

    def test_one_that_calls_where_nothing_went_in(self) -> None:
        module = Regression()
        with pytest.raises(PipelineModelError, match=r"called self\.net\(x\) on the last stage, and not on the first"):
            StepRunner(module, module.net).start("training_step", (batch(), 0), 4).finish(None, YES)

    def test_between_the_halves_the_module_is_itself(self) -> None:
        module, x = Regression(), rows(4)
        before = module(x)
        runner = StepRunner(module, module)
        run = runner.start("training_step", (batch(), 0), 4)
        assert is_untouched(module) and torch.equal(module(x), before)
        run.abandon()
        assert is_untouched(module) and module.after == []

    def test_twice(self) -> None:
        module = Regression("twice")
        with pytest.raises(PipelineModelError, match=r"training_step called self\.net\(x\) more than once.*concatenate"):
            StepRunner(module, module.net).start("training_step", (batch(), 0), 4).finish(rows(4), YES)
        assert is_untouched(module)

    def test_the_users_own_error_passes(self) -> None:
        module = Regression("fails")
        with pytest.raises(ArithmeticError):
            StepRunner(module, module.net).start("training_step", (batch(), 0), 4).finish(rows(4), YES)
        assert is_untouched(module)

    def test_afterwards_the_module_is_itself(self) -> None:
        module, x = Regression(), rows(4)
        before = module(x)
        runner = StepRunner(module, module.net)
        runner.input_of("training_step", (batch(), 0))
        runner.start("training_step", (batch(), 0), 4).finish(rows(4), YES)
        assert torch.equal(module(x), before)


class Measured(L.LightningModule):
    """Its metrics are of all kinds: sums, lists, a wrapper around one that is logged itself, and one with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.error, self.outputs, self.mean = MeanSquaredError(), CatMetric(), MeanMetric()
        self.extremes = MinMaxMetric(self.mean)
        self.mean.scale = nn.Parameter(torch.ones(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        output = self.net(batch[0])
        # Called, not updated: then they keep the value of the batch, with its graph.
        self.error(output, batch[1])
        self.outputs(output)
        self.extremes(output.mean())
        self.log("error", self.error)
        self.log("mean", output.mean())
        return output.mean()


class TestUnheard:
    def setup_method(self) -> None:
        self.module = Measured()
        self.runner = StepRunner(self.module, self.module.net)
        self.metrics = [one for one in self.module.modules() if isinstance(one, Metric)]

    def finish(self, seed: int) -> None:
        output = rows(4, seed)[:, :1].requires_grad_() * 2
        self.runner.start("training_step", (batch(), 0), 4).finish(output, YES)

    def computed(self) -> list[Any]:
        return [metric.compute() for metric in (self.module.error, self.module.outputs, self.module.extremes)]

    @pytest.mark.parametrize("before", [0, 1, 2])
    def test_logs_and_metrics_are_as_if_the_steps_inside_had_not_been(self, before: int) -> None:
        for seed in range(before):
            self.finish(seed)
        recorder, logged = self.runner.recorder, self.runner.recorder.vector().tolist()
        with self.runner.unheard():
            for seed in (7, 8):
                self.finish(seed)
            assert self.runner.recorder is not recorder
            assert self.module.error.update_count == before + 2
        assert self.runner.recorder is recorder and recorder.vector().tolist() == logged
        self.finish(5)
        found = self.computed()
        self.setup_method()
        for seed in (*range(before), 5):
            self.finish(seed)
        torch.testing.assert_close(found, self.computed(), rtol=0, atol=0)

    def test_an_error_inside_leaves_no_trace_either(self) -> None:
        self.finish(0)
        recorder, expected = self.runner.recorder, self.computed()
        with pytest.raises(ArithmeticError), self.runner.unheard():
            self.finish(1)
            raise ArithmeticError
        assert self.runner.recorder is recorder
        torch.testing.assert_close(self.computed(), expected, rtol=0, atol=0)

    def test_what_a_metric_has_collected_is_not_copied(self) -> None:
        """It grows with the epoch, and is remembered in every audited step."""
        self.finish(1)
        metric = self.module.outputs
        seen = list(metric.value)
        restore = self.runner.remember()
        self.finish(2)
        restore()
        assert len(seen) == len(metric.value) > 0 and all(one is other for one, other in zip(metric.value, seen))

    def test_modules_and_parameters_stay_the_same_objects(self) -> None:
        before = [*self.module.modules(), *self.module.parameters()]
        with self.runner.unheard():
            self.finish(0)
        after = [*self.module.modules(), *self.module.parameters()]
        assert all(one is other for one, other in zip(before, after)) and len(before) == len(after)
        assert self.module.extremes._base_metric is self.module.mean


class TestLossOf:
    @pytest.mark.parametrize("result", [torch.tensor(2.5), torch.tensor([2.5]), {"loss": torch.tensor([[2.5]]), "other": 1}])
    def test_found(self, result: Any) -> None:
        loss = loss_of(result, "training_step")
        assert loss.shape == ()
        assert loss.item() == 2.5

    @pytest.mark.parametrize(
        "result",
        [None, {}, {"logits": torch.ones(1)}, {"loss": None}, torch.ones(2), {"loss": torch.ones(2)}, 1.0, torch.tensor(1)],
        ids=str,
    )
    def test_refused(self, result: Any) -> None:
        kind = type(result).__name__
        with pytest.raises(PipelineModelError, match=rf"training_step returned {kind}.*no scalar loss\..* None,.*'loss' key"):
            loss_of(result, "training_step")


class Two(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        raise AssertionError("nobody runs it")


class TestGiven:
    """What goes into the pipeline of a network that is called in one way or another."""

    X, MASK = rows(2), rows(2, seed=1)

    @pytest.mark.parametrize(
        ("inputs", "named", "expected"),
        [
            ((X,), {}, X),
            ((), {"x": X}, X),
            ((X, MASK), {}, (X, MASK)),
            ((X,), {"mask": MASK}, (X, MASK)),
            ((), {"mask": MASK, "x": X}, (X, MASK)),
        ],
        ids=["one", "by name", "two", "one by name", "both by name"],
    )
    def test_in_the_order_of_the_entry(self, inputs: tuple[Tensor, ...], named: dict[str, Tensor], expected: Any) -> None:
        module = L.LightningModule()
        module.net = Two()
        given = StepRunner(module, module.net).given(inputs, named)
        assert isinstance(given, tuple) == isinstance(expected, tuple)
        assert all(one is other for one, other in zip(tuple(given), tuple(expected))) or given is expected

    @pytest.mark.parametrize(
        ("inputs", "named"),
        [((), {}), ((), {"mask": MASK}), ((X,), {"scale": 2.0}), ((X,), {"x": X}), ((X,), {"other": X})],
        ids=str,
    )
    def test_what_has_no_place_is_refused(self, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        module = L.LightningModule()
        module.net = Two()
        with pytest.raises(PipelineModelError, match=r"self\.net\(x\) was called with"):
            StepRunner(module, module.net).given(inputs, named)
