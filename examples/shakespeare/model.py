"""An ordinary LightningModule: nothing in it knows of pipelines, verification or any other strategy."""

from __future__ import annotations

import math

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lightning_sentinel.models import llama_layers

__all__ = ["ByteLlama"]

_BYTES = 256


class ByteLlama(L.LightningModule):
    """A Llama-like language model whose tokens are the 256 bytes.

    Args:
        width: channels of the hidden states.
        depth: decoder blocks.
        heads: attention heads; ``width / heads`` must be an even whole number.
        learning_rate: AdamW's, after the warm-up.
        weight_decay: AdamW's, for matrices only: norms are scales, which decay would pull to zero.
        warmup_steps: steps in which the learning rate grows linearly; it is constant afterwards.
        max_length: the longest sequence.

    Example:
        >>> import torch
        >>> ByteLlama(width=8, depth=1, heads=2)(torch.tensor([[72, 105]])).shape
        torch.Size([1, 2, 256])
    """

    def __init__(
        self,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 20,
        max_length: int = 1024,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.net = nn.Sequential(*llama_layers(_BYTES, width, depth, heads, max_length))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next byte after every byte, ``(B, T) -> (B, T, 256)``."""
        logits: Tensor = self.net(tokens)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = self._loss(batch)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)
        self.log("val_bits_per_byte", loss / math.log(2), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = list(self.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        warmup = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, self.warmup_steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        logits = self(tokens)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
