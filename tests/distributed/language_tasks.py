"""A language model of transformers in training; a rank imports this."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

import lightning_sentinel as ls
from lightning_sentinel.models import CausalLM
from tests.distributed import tasks
from tests.models.families import PADDING, VOCABULARY

BATCH, MICRO_BATCHES, STEPS, LENGTH = 6, 3, 3, 12
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


class Model(CausalLM):
    """With an optimizer whose steps are as long as the gradients, so that an error in these shows in the weights."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


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


def fit(folder: str, overrides: dict[str, Any], stages: int, replicas: int, checkpoint: str) -> dict[str, Any]:
    """Train on this rank and return its weights."""
    strategy = ls.SentinelStrategy(stages, replicas, micro_batches=MICRO_BATCHES, timeout=tasks.PATIENCE)
    model = Model(folder, overrides=overrides)
    run = tasks.trainer(strategy, stages * replicas, STEPS)
    run.fit(model, loader(int(os.environ["LOCAL_RANK"]) % replicas, replicas))
    run.save_checkpoint(checkpoint)
    metrics = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("train")}
    return {"weights": tasks.local_weights(model), "metrics": metrics}


def fit_alone(folder: str, overrides: dict[str, Any], replicas: int) -> dict[str, Tensor]:
    """The same micro-batches one after another in one process, without the plugin."""
    model = Model(folder, overrides=overrides)
    micro_batches = []
    for batches in zip(*(loader(replica, replicas) for replica in range(replicas))):
        for batch in batches:
            parts = {name: value.chunk(MICRO_BATCHES) for name, value in batch.items()}
            micro_batches += [{name: part[index] for name, part in parts.items()} for index in range(MICRO_BATCHES)]
    data: Any = micro_batches
    run = tasks.trainer("auto", 1, STEPS, accumulate_grad_batches=MICRO_BATCHES * replicas)
    run.fit(model, DataLoader(data, batch_size=None))
    return tasks.local_weights(model)
