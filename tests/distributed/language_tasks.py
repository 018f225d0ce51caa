"""A language model of transformers in training; a rank imports this."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

import lightning_sentinel as ls
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.models import CausalLM
from lightning_sentinel.models.huggingface.layers import LanguageModelLayer
from tests.distributed import tasks
from tests.models.families import PADDING, VOCABULARY

BATCH, MICRO_BATCHES, STEPS, LENGTH, SEED = 6, 3, 3, 12, 5
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    """One whose steps are as long as the gradients, so that an error in these shows in the weights."""
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


class Model(CausalLM):
    def configure_optimizers(self) -> Any:
        return optimizer_of(self.parameters())


def texts(replicas: int) -> list[dict[str, Tensor]]:
    """Of different lengths, padded on either side."""
    generator = torch.Generator().manual_seed(7)
    rows = []
    for index in range(BATCH * STEPS * replicas):
        row = torch.randint(3, VOCABULARY, (LENGTH,), generator=generator)
        mask, gap = torch.ones(LENGTH, dtype=torch.long), index % 5
        mask[slice(0, gap) if index % 2 else slice(LENGTH - gap, LENGTH)] = 0
        rows.append({"input_ids": row.masked_fill(mask == 0, PADDING), "attention_mask": mask})
    return rows


def loader(replica: int, replicas: int) -> DataLoader[Any]:
    data: Any = texts(replicas)
    return DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, replicas, replica, shuffle=False))


def weights_of(model: CausalLM) -> dict[str, Tensor]:
    """What is here of it, by the names that transformers has."""
    layers = [layer for layer in model.net if isinstance(layer, LanguageModelLayer)]
    return {name: value.clone() for layer in layers for name, value in layer.original_state().items()}


def fit(source: Any, overrides: dict[str, Any], stages: int, replicas: int, directory: str, saved: str) -> dict[str, Any]:
    """Validate, train all steps but one, and the last one from a checkpoint; ``source`` is a config, or has a folder a stage."""
    worker = Mesh(stages, replicas).worker(int(os.environ["LOCAL_RANK"]))
    source = f"{source}/{worker.stage}" if isinstance(source, str) else source
    data = loader(worker.replica, replicas)

    def run(steps: int) -> L.Trainer:
        strategy = ls.SentinelStrategy(
            stages, replicas, MICRO_BATCHES, partition="uniform", timeout=tasks.PATIENCE, state_dict_type=saved
        )
        return tasks.trainer(strategy, stages * replicas, steps, limit_val_batches=1, num_sanity_val_steps=0)

    L.seed_everything(SEED, verbose=False)
    model = Model(source, overrides=overrides)
    (before,) = run(0).validate(model, data, verbose=False)
    first, checkpoint = run(STEPS - 1), Path(directory) / "first.ckpt"
    first.fit(model, data)
    first.save_checkpoint(checkpoint)
    again, last = Model(source, overrides=overrides), run(STEPS)
    last.fit(again, data, ckpt_path=str(checkpoint))
    last.save_checkpoint(Path(directory) / "last.ckpt")
    metrics = {name: float(value) for name, value in last.callback_metrics.items() if name.startswith("train")}
    return {"weights": weights_of(again), "metrics": metrics, "val_loss": before["val_loss"]}


def fit_unsplit(source: Any, overrides: dict[str, Any], replicas: int) -> dict[str, Any]:
    """The same micro-batches one after another, with transformers' own model, loss and ties, and torch's optimizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    L.seed_everything(SEED, verbose=False)
    if isinstance(source, str):
        model = AutoModelForCausalLM.from_pretrained(source, **overrides)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**source, **overrides))
    optimizer = optimizer_of(model.train().parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = list(zip(*(loader(replica, replicas) for replica in range(replicas))))
    parts = [[_part(batch, index) for batch in step for index in range(MICRO_BATCHES)] for step in batches]
    plain = {"output_router_logits": False} if overrides else {}
    with torch.no_grad():
        val_loss = torch.stack([model(**part, **plain).loss for part in parts[0]]).mean().item()
    for step in parts:
        for part in step:
            (model(**part).loss / len(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"before": before, "weights": model.state_dict(), "val_loss": val_loss}


def _part(batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    part = {name: value.chunk(MICRO_BATCHES)[index] for name, value in batch.items()}
    return part | {"labels": part["input_ids"].masked_fill(part["attention_mask"] == 0, -100)}
