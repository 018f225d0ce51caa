from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import ANY, Mock, call

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassF1Score

from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.pipeline.batch_metrics import BatchMetrics, LoggedMetric
from lightning_sentinel.pipeline.logs import LoggingMicroBatch, LogRecorder, LogReplay, LogSchema, silence_misleading_warnings

YES = torch.tensor(True)
NO = torch.tensor(False)


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.accuracy = MeanMetric()


REDUCED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "max": torch.max,
    "min": torch.min,
}


class TestReduction:
    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("how", REDUCED)
    def test_as_one_run_over_all_samples_that_count(self, how: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        ranks, micro_batches = 1 + seed % 4, 1 + seed % 5
        counted: list[Tensor] = []
        recorders = []
        for rank in range(ranks):
            recorder = LogRecorder(Module())
            for micro_batch in range(micro_batches):
                size = int(torch.randint(1, 9, (), generator=generator))
                samples = torch.randn(size, generator=generator) * 3 - 1
                counts = bool(torch.rand((), generator=generator) > 0.4) or (rank, micro_batch) == (0, 0)
                recorder.begin(LoggingMicroBatch(size, torch.tensor(counts)))
                value = REDUCED[how](samples)
                recorder.log("value", value if counts else value * torch.nan, reduce_fx=how)
                recorder.log("another", -1.0)
                counted += [samples] if counts else []
            recorders.append(recorder)
        schema = recorders[0].schema
        reduced = schema.reduce(torch.stack([recorder.vector() for recorder in recorders]))
        everything = torch.cat(counted)
        assert reduced["value"] == (pytest.approx(float(REDUCED[how](everything)), abs=1e-5), len(everything))
        assert reduced["another"] == (pytest.approx(-1.0), len(everything))

    def test_nothing_that_counts_is_nothing_logged(self) -> None:
        recorder = LogRecorder(Module())
        for how in REDUCED:
            recorder.begin(LoggingMicroBatch(3, NO))
            recorder.log(how, torch.tensor(torch.inf), reduce_fx=how)
        assert recorder.schema.names == sorted(REDUCED)
        assert recorder.schema.reduce(recorder.vector()[None]) == {}

    @pytest.mark.parametrize(("how", "value"), [("max", -7.0), ("min", 7.0)])
    def test_what_is_left_out_is_not_taken_for_zero(self, how: str, value: float) -> None:
        recorder = LogRecorder(Module())
        for counts in (NO, YES, NO):
            recorder.begin(LoggingMicroBatch(2, counts))
            recorder.log("value", value, reduce_fx=how)
        assert recorder.schema.reduce(recorder.vector()[None]) == {"value": (value, 2.0)}

    def test_ranks_that_logged_nothing_weigh_nothing(self) -> None:
        recorder = LogRecorder(Module())
        recorder.begin(LoggingMicroBatch(4, YES))
        for how in REDUCED:
            recorder.log(how, -2.0, reduce_fx=how)
        vector = recorder.vector()
        reduced = recorder.schema.reduce(torch.stack((torch.zeros_like(vector), vector, torch.zeros_like(vector))))
        assert reduced == dict.fromkeys(REDUCED, (-2.0, 4.0))

    def test_the_users_batch_size_is_the_weight(self) -> None:
        recorder = LogRecorder(Module())
        for tokens, value in ((10, 1.0), (30, 2.0)):
            recorder.begin(LoggingMicroBatch(2, YES))
            recorder.log("per_token", value, batch_size=tokens)
        assert recorder.schema.reduce(recorder.vector()[None])["per_token"] == (pytest.approx(1.75), 40.0)

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_a_batch_size_that_stays_the_same_is_that_of_the_batch(self, ranks: int) -> None:
        """Of 16, and of 2 with fewer micro-batches: the user says that both weigh the same."""
        for parts in ([4, 4, 4, 4], [1, 1], [2, 1]):
            recorders = []
            for rank in range(ranks):
                recorder = LogRecorder(Module())
                for number, size in enumerate(parts):
                    recorder.begin(LoggingMicroBatch(size, YES))
                    recorder.log("value", float(rank + number), batch_size=16)
                    recorder.log("usual", float(rank + number), batch_size=size)
                recorders.append(recorder)
            reduced = recorders[0].schema.reduce(torch.stack([recorder.vector() for recorder in recorders]))
            mean = sum(number * size for number, size in enumerate(parts)) / sum(parts) + (ranks - 1) / 2
            assert reduced["value"] == (pytest.approx(mean), 16.0)
            assert reduced["usual"] == (pytest.approx(mean), ranks * sum(parts))

    @pytest.mark.parametrize(
        ("given", "name"),
        [
            ("avg", "mean"),
            ("MEAN", "mean"),
            (torch.mean, "mean"),
            (torch.amax, "max"),
            (torch.min, "min"),
            (max, "max"),
            (sum, "sum"),
        ],
    )
    def test_other_ways_to_say_it(self, given: Any, name: str) -> None:
        recorder = LogRecorder(Module())
        recorder.log("value", 1.0, reduce_fx=given)
        assert recorder.schema.entries["value"]["reduce_fx"] == name

    @pytest.mark.parametrize("given", ["median", torch.median, lambda values: values[0]], ids=["name", "function", "lambda"])
    def test_unknown(self, given: Any) -> None:
        with pytest.raises(PipelineModelError, match=r"self\.log\('value', reduce_fx=.*\{min,max,mean,sum\}"):
            LogRecorder(Module()).log("value", 1.0, reduce_fx=given)


class TestValues:
    @pytest.mark.parametrize(
        "value", [3, 3.0, True, torch.tensor(3), torch.tensor([[3.0]], dtype=torch.float64), np.float64(3), np.float32(3)], ids=repr
    )
    def test_numbers(self, value: Any) -> None:
        """All that ``LightningModule.log`` takes."""
        recorder = LogRecorder(Module())
        recorder.begin(LoggingMicroBatch(1, YES))
        recorder.log("value", value)
        assert recorder.vector().tolist() == [float(value), 1.0, *[0.0] * 4]

    @pytest.mark.parametrize("value", [torch.ones(2), "three", {"a": 1.0}, None], ids=repr)
    def test_no_number(self, value: Any) -> None:
        with pytest.raises(PipelineModelError, match=r"self\.log\(value, .*single element.*a number or.*log_dict"):
            LogRecorder(Module()).log("value", value)

    def test_no_graph_is_kept(self) -> None:
        recorder = LogRecorder(Module())
        recorder.begin(LoggingMicroBatch(1, YES))
        recorder.log("value", torch.ones((), requires_grad=True) * 2)
        assert not recorder.vector().requires_grad

    def test_nothing_logged(self) -> None:
        recorder = LogRecorder(Module())
        assert recorder.vector().shape == (0,)
        assert recorder.schema.reduce(recorder.vector()[None]) == {}

    def test_options_may_be_positional_as_in_lightning(self) -> None:
        recorder = LogRecorder(Module())
        recorder.log("value", 1.0, True)
        assert recorder.schema.entries["value"]["options"] == {"prog_bar": True}


class TestMetrics:
    def test_the_attribute_is_found(self) -> None:
        module = Module()
        recorder = LogRecorder(module)
        recorder.log("accuracy", module.inner.accuracy, on_epoch=True)
        recorder.log("loss", 1.0)
        assert recorder.schema.entries["accuracy"]["metric"] == "inner.accuracy"
        assert recorder.schema.names == ["loss"]
        assert recorder.vector().shape == (recorder.schema.width,)

    def test_or_told(self) -> None:
        recorder = LogRecorder(Module())
        recorder.log("accuracy", MeanMetric(), metric_attribute="inner.accuracy")
        assert recorder.schema.entries["accuracy"]["metric"] == "inner.accuracy"

    def test_a_stranger(self) -> None:
        with pytest.raises(PipelineModelError, match=r"self\.log\('accuracy', <MeanMetric>\).*no attribute of Module.*__init__"):
            LogRecorder(Module()).log("accuracy", MeanMetric())


class TestSchema:
    def test_there_and_back(self) -> None:
        module = Module()
        recorder = LogRecorder(module)
        recorder.log("b", 1.0, prog_bar=True, on_step=False, on_epoch=None, logger=True, sync_dist=True, reduce_fx="max")
        recorder.log("a", module.inner.accuracy)
        schema = recorder.schema
        again = LogSchema.decode(schema.encode())
        assert again == schema
        assert again.fingerprint == schema.fingerprint
        assert schema.entries["b"]["options"] == {"prog_bar": True, "on_step": False, "logger": True}

    def test_the_order_of_calls_does_not_matter(self) -> None:
        schemas = []
        for names in ("ab", "ba"):
            recorder = LogRecorder(Module())
            recorder.begin(LoggingMicroBatch(1, YES))
            for name in names:
                recorder.log(name, float(ord(name)))
            schemas.append((recorder.schema.fingerprint, recorder.schema.encode(), recorder.vector().tolist()))
        assert schemas[0] == schemas[1]

    def test_fingerprints_tell_schemas_apart(self) -> None:
        def fingerprint(*names: str, **options: Any) -> int:
            recorder = LogRecorder(Module())
            for name in names:
                recorder.log(name, 1.0, **options)
            return recorder.schema.fingerprint

        several = [
            fingerprint("a"),
            fingerprint("b"),
            fingerprint("a", "b"),
            fingerprint("a", on_step=True),
            fingerprint("a", on_step=False),
            fingerprint("a", reduce_fx="sum"),
        ]
        assert len(set(several)) == len(several)
        assert 0 not in several
        assert torch.tensor(several, dtype=torch.float32).to(torch.int64).tolist() == several

    def test_an_empty_one_is_zero(self) -> None:
        assert LogSchema().fingerprint == 0


def computed(name: str, metric: Metric) -> Any:
    return metric.compute()


class TestReplay:
    def test_options_and_weights(self) -> None:
        module = Module()
        recorder = LogRecorder(module)
        recorder.begin(LoggingMicroBatch(3, YES))
        recorder.log("loss", 2.0, prog_bar=True, on_epoch=True, sync_dist=True, batch_size=None)
        recorder.log("best", 5.0, reduce_fx=max, add_dataloader_idx=False)
        recorder.log("accuracy", module.inner.accuracy, on_step=False)
        schema = LogSchema.decode(recorder.schema.encode())
        module.log = log = Mock()  # type: ignore[method-assign]
        LogReplay(module, computed)(schema, schema.reduce(recorder.vector()[None]))
        assert log.call_count == 3
        log.assert_has_calls(
            [
                call("loss", 2.0, reduce_fx="mean", batch_size=3, prog_bar=True, on_epoch=True),
                call("best", 5.0, reduce_fx="max", batch_size=3, add_dataloader_idx=False),
                call("accuracy", ANY, metric_attribute="inner.accuracy", on_step=False),
            ],
            any_order=True,
        )

    def test_a_metric_that_was_logged_is_computed_and_reset_by_all_ranks_together(self) -> None:
        module = Module()
        recorder = LogRecorder(module)
        recorder.log("accuracy", module.inner.accuracy, on_step=False)
        module.log = log = Mock()  # type: ignore[method-assign]
        LogReplay(module, lambda name, metric: (name, metric))(recorder.schema, {})
        logged = log.call_args.args[1]
        assert isinstance(logged, LoggedMetric) and logged.compute() == ("inner.accuracy", module.inner.accuracy)
        assert list(logged.modules()) == [logged], "or it would be moved to another device with what Lightning makes of it"
        module.inner.accuracy.update(2.0)
        logged.reset()
        assert not module.inner.accuracy.update_called

    def test_of_a_metric_there_is_the_value_on_the_whole_batch(self) -> None:
        """Which is no mean of those on micro-batches; plain Lightning looks for it where ``forward`` leaves it."""
        module = Module()
        module.f1 = MulticlassF1Score(3, average="macro")
        generator = torch.Generator().manual_seed(0)
        metrics, expected = BatchMetrics(module), module.f1.clone()
        module.log = log = Mock()  # type: ignore[method-assign]
        replay = LogReplay(module, computed)
        for _ in range(2):
            logits, labels = torch.randn(7, 3, generator=generator), torch.randint(3, (7,), generator=generator)
            recorder = LogRecorder(module, metrics)
            for part in (slice(0, 4), slice(4, 7)):
                recorder.begin(LoggingMicroBatch(part.stop - part.start, YES, step="training_step"))
                with recorder.listening():
                    module.f1(logits[part], labels[part])
                    recorder.log("f1", module.f1, on_epoch=True)
            replay(recorder.schema, recorder.schema.reduce(recorder.vector()[None]))
            assert log.call_args.args[1]._forward_cache == pytest.approx(float(expected(logits, labels)))
        torch.testing.assert_close(module.f1.compute(), expected.compute())
        assert not module.f1._forward_hooks

    def test_a_metric_that_is_updated_and_not_called_has_no_value_on_the_batch(self) -> None:
        """As with plain Lightning."""
        module = Module()
        recorder = LogRecorder(module, BatchMetrics(module))
        recorder.begin(LoggingMicroBatch(2, YES, step="training_step"))
        with recorder.listening():
            module.inner.accuracy.update(2.0)
            recorder.log("accuracy", module.inner.accuracy)
        assert recorder.schema.reduce(recorder.vector()[None]) == {}

    def test_what_no_rank_counted_is_not_logged(self) -> None:
        recorder = LogRecorder(Module())
        recorder.begin(LoggingMicroBatch(3, NO))
        recorder.log("loss", 2.0)
        module = Module()
        module.log = log = Mock()  # type: ignore[method-assign]
        LogReplay(module, computed)(recorder.schema, recorder.schema.reduce(recorder.vector()[None]))
        log.assert_not_called()


def test_silenced_warnings() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence_misleading_warnings()
        warnings.warn("It is recommended to use `self.log('a', ..., sync_dist=True)` when logging", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(one.message) for one in caught] == ["something else"]
