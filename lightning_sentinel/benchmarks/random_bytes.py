"""What is timed: a small Llama that is trained on random bytes, under a Trainer that says nothing."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_sentinel.models import llama

__all__ = ["QUIET", "RandomBytesLlama", "loss_of_bytes", "random_bytes", "random_bytes_layers"]

_VOCABULARY = 256

QUIET: dict[str, Any] = {
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Arguments of a Trainer that only trains."""


def random_bytes(samples: int, length: int) -> TensorDataset:
    """Inputs and targets, int64 ``(samples, length)`` each."""
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(*(torch.randint(_VOCABULARY, (samples, length), generator=generator) for _ in range(2)))


def random_bytes_layers(width: int, depth: int) -> nn.Sequential:
    """The same weights each time."""
    torch.manual_seed(0)
    return llama(vocab_size=_VOCABULARY, width=width, depth=depth, heads=4)


def loss_of_bytes(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class RandomBytesLlama(L.LightningModule):
    """Predicts the next random byte.

    Args:
        width: channels.
        depth: decoder blocks.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.net = random_bytes_layers(width, depth)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of_bytes(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)
