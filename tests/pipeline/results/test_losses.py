from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sentinel.errors import PipelineModelError
from lightning_sentinel.pipeline.results.losses import refuse_sum

SAMPLES, CLASSES = 6, 5
Loss = Callable[[Tensor, Tensor], Tensor]


def graph(loss: Loss) -> Tensor:
    logits = torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(1), requires_grad=True)
    return loss(logits * 2, torch.arange(SAMPLES) % CLASSES)


def tokens(logits: Tensor, reduction: str) -> Tensor:
    flat = logits[:, None].expand(-1, 3, -1).reshape(-1, CLASSES)
    return F.cross_entropy(flat, torch.zeros(len(flat), dtype=torch.long), reduction=reduction)


SUMS: dict[str, Loss] = {
    "cross entropy": lambda x, y: F.cross_entropy(x, y, reduction="sum"),
    "by token": lambda x, y: tokens(x, "sum"),
    "squares": lambda x, y: F.mse_loss(x, x.detach() + 1, reduction="sum"),
    "by hand": lambda x, y: (x**2).sum(),
    "binary": lambda x, y: F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="sum"),
    "of each": lambda x, y: F.cross_entropy(x, y, reduction="none").sum(),
    "two terms": lambda x, y: F.cross_entropy(x, y, reduction="sum") - 0.5 * (1 + x).sum(),
    "as a view": lambda x, y: (x**2).sum().reshape(1)[0],
    "huber": lambda x, y: nn.HuberLoss(reduction="sum")(x, torch.zeros_like(x)),
}
MEANS: dict[str, Loss] = {
    "cross entropy": F.cross_entropy,
    "by token": lambda x, y: tokens(x, "mean"),
    "by hand": lambda x, y: (x**2).sum(dim=1).mean(),
    "divided": lambda x, y: (x**2).sum() / len(x),
    "multiplied": lambda x, y: (x**2).sum() * (1 / SAMPLES),
    "tasks": lambda x, y: torch.stack([F.cross_entropy(x, y)] * SAMPLES).sum(),
    "weights decay": lambda x, y: F.cross_entropy(x, y) + (torch.ones(7, 3, requires_grad=True) ** 2).sum(),
    "several": lambda x, y: F.cross_entropy(x, y) + 3 * x.mean() - x.std(),
    "constant": lambda x, y: torch.tensor(1.0),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_over_samples_are_refused(name: str) -> None:
    with pytest.raises(PipelineModelError, match=r"training_step returned a loss that is a sum over its samples.*reduction='mean'"):
        refuse_sum(graph(SUMS[name]), SAMPLES, "training_step")


@pytest.mark.parametrize("name", MEANS)
def test_others_are_not(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_sum(graph(MEANS[name]), SAMPLES, "training_step")


def test_a_term_that_may_be_one_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="If a term of the loss is a sum over samples"):
        refuse_sum(graph(lambda x, y: F.cross_entropy(x, y) + x.square().sum()), SAMPLES, "training_step")
