"""The training that is attacked: a small language model on bytes, in a virtual mesh."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import os
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_sentinel.benchmarks.detection.scenarios import Scenario, Training
from lightning_sentinel.benchmarks.detection.text import VOCABULARY, Corpus, corpus
from lightning_sentinel.benchmarks.detection.truth import GradientNorms
from lightning_sentinel.models import gpt, llama
from lightning_sentinel.strategy import SentinelStrategy

__all__ = ["LanguageModel", "Windows", "fit", "make_strategy", "next_byte_loss", "train_warmup", "validation_loss"]

_RISE_STEPS = 10
_FINAL_SHARE = 0.1
_FINE_TUNING_SHARE = 1 / 3
_HEADS = 4


class LanguageModel(L.LightningModule):
    """Predicts the next byte.

    Args:
        training: sizes and schedule.
        seed: the seed of the initial weights.
    """

    def __init__(self, training: Training, seed: int) -> None:
        super().__init__()
        self.training_settings = training
        make = {"llama": llama, "gpt": gpt}[training.model]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = make(
                vocab_size=VOCABULARY,
                width=training.width,
                depth=training.stages,
                heads=_HEADS,
                max_length=training.sequence_length,
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return next_byte_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.training_settings.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(self.training_settings, step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def next_byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _schedule(training: Training, step: int) -> float:
    rise = min(1.0, (step + 1) / _RISE_STEPS)
    if training.schedule == "constant":
        return rise
    if training.schedule == "fine_tuning":
        return rise * (1.0 if step < training.warmup_steps else _FINE_TUNING_SHARE)
    progress = min(1.0, step / training.total_steps)
    return rise * (_FINAL_SHARE + (1 - _FINAL_SHARE) * (1 + math.cos(math.pi * progress)) / 2)


class Windows(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches without end; a run that goes on from a checkpoint goes on with the next one.

    Args:
        training: sizes and text.
        seed: the seed of the drawn batches.
    """

    def __init__(self, training: Training, seed: int) -> None:
        self.training = training
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        training = self.training
        for step in itertools.count():
            yield _text_at(training, step).batch(training.batch_size, training.sequence_length, self.seed, step)


def _text_at(training: Training, step: int) -> Corpus:
    names = training.data.split("+")
    return corpus(names[min(step * len(names) // training.total_steps, len(names) - 1)])


def validation_loss(module: LanguageModel) -> float:
    """Of the weights as they are, on windows that are the same for every run. May be infinite or NaN."""
    training = module.training_settings
    losses = []
    with torch.no_grad():
        for name in training.data.split("+"):
            inputs, targets = corpus(name).validation(training.sequence_length)
            losses.append(float(next_byte_loss(module.net(inputs), targets)))
    return sum(losses) / len(losses)


def make_strategy(scenario: Scenario) -> SentinelStrategy:
    training = scenario.training
    return SentinelStrategy(
        training.stages,
        training.replicas,
        training.micro_batches,
        verification=scenario.make_verification(),
        response=scenario.response,
        engine="virtual",
    )


def fit(
    scenario: Scenario,
    strategy: SentinelStrategy,
    module: LanguageModel,
    steps: int,
    callbacks: Sequence[L.Callback] = (),
    warmup: Path | None = None,
) -> L.Trainer:
    """Train up to ``steps`` in all, quietly, from the start or from the checkpoint of a warm-up.

    Raises:
        MeshExhaustedError: if no pipeline is left; the module and the strategy are as they were then.
    """
    with _quietly(), _seeded(scenario.seed):
        trainer = L.Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            precision=scenario.training.precision,  # type: ignore[arg-type]
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(Windows(scenario.training, scenario.seed), batch_size=None)
        trainer.fit(module, loader, ckpt_path=warmup)
    return trainer


def train_warmup(scenario: Scenario, path: Path) -> None:
    """Train the honest warm-up of a scenario and save it, at once or not at all."""
    honest = scenario.warmup
    module = LanguageModel(honest.training, honest.seed)
    trainer = fit(honest, make_strategy(honest), module, honest.training.warmup_steps, [GradientNorms()])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with _quietly():
        trainer.save_checkpoint(temporary)
    temporary.replace(path)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "DeepSpeed")]
    levels = [logger.level for logger in loggers]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed everything, and leave no trace of it in this process."""
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    before = {name: os.environ.get(name) for name in names}
    with isolate_rng():
        L.seed_everything(seed, verbose=False)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
