"""A LightningModule that fine-tunes any of the families, with or without a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.models.huggingface.building import config_to_cut, layers_of
from lightning_sentinel.models.huggingface.channels import tokens_and_mask
from lightning_sentinel.models.huggingface.configs import Source, folder_of
from lightning_sentinel.models.huggingface.router import router_loss

__all__ = ["CausalLM"]

_IGNORED = -100


class CausalLM(L.LightningModule):
    """A causal language model of transformers whose layers a pipeline can be cut from.

    A batch is a mapping with ``input_ids``, int64 ``(B, T)``; ``attention_mask`` of that shape, 0 for padding, if there is any; and
    ``labels`` of that shape, -100 where nothing is to be predicted. Labels are the tokens themselves, shifted here; without them
    all tokens but the padding are predicted. The loss is the mean cross-entropy of the predicted tokens, and with
    ``output_router_logits`` in the config ``router_aux_loss_coef`` times the router loss, as in transformers.

    Its layers are ``net``, which ``configure_model`` builds, so that under the strategy a process reads or draws its own stage
    only. A Trainer and ``load_from_checkpoint`` call it, and without them the first use of ``net`` does, by a call of the model for
    instance. Before that there are no parameters; call ``configure_model()`` if you want them without a Trainer.

    A checkpoint holds the config and all weights: ``CausalLM.load_from_checkpoint(path)`` needs the folder no more.

    Args:
        source: a folder that ``save_pretrained`` wrote, or a config, or a dict of a config's values with the key ``model_type``;
            see :func:`causal_lm_layers`.
        learning_rate: AdamW's, after the warm-up.
        weight_decay: AdamW's, for matrices only: norms are scales, which decay would pull to zero.
        warmup_steps: steps in which the learning rate grows linearly; it is constant afterwards.
        overrides: values that replace those of the config.

    Raises:
        ConfigurationError: if the family cannot be cut, or the folder does not hold what it should.
        MissingExtraError: if transformers is not installed.

    Example:
        >>> import torch
        >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        >>> model = CausalLM({"model_type": "llama", "num_hidden_layers": 1, "num_key_value_heads": 2, **sizes})
        >>> model(torch.tensor([[7, 1, 2]])).shape
        torch.Size([1, 3, 64])
    """

    net: nn.Sequential
    """The layers."""

    def __init__(
        self,
        source: Source,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.config = config_to_cut(source, overrides)
        self._folder = folder_of(source)
        settings = {"learning_rate": learning_rate, "weight_decay": weight_decay, "warmup_steps": warmup_steps}
        # The contents of the folder, and not its path: a checkpoint may be loaded where there is no such folder.
        self.save_hyperparameters({"source": self.config.to_dict(), **settings})

    def configure_model(self) -> None:
        """Build ``net``, unless it is there."""
        if "net" not in self._modules:
            self.net = layers_of(self.config, self._folder).train(self.training)

    def __getattr__(self, name: str) -> Any:
        if name == "net" and "net" not in self._modules:
            self.configure_model()
        return super().__getattr__(name)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of the next token after every token, ``(B, T) -> (B, T, V)``."""
        return self._run(input_ids, attention_mask)[0]

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        losses = self._losses(batch)
        self.log("train_loss", losses["loss"], prog_bar=True)
        if "router_loss" in losses:
            self.log("train_router_loss", losses["router_loss"])
        return losses["loss"]

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._losses(batch)["cross_entropy"], prog_bar=True, sync_dist=True)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self._losses(batch)["cross_entropy"], sync_dist=True)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Logits of the next token after every token, ``(B, T, V)``."""
        return self(_input_ids(batch), batch.get("attention_mask"))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = list(self.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = AdamW(groups, lr=self.learning_rate)
        warmup = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, self.warmup_steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    def _run(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits, and what is known of routers."""
        output = self.net(tokens_and_mask(input_ids, attention_mask))
        return output[..., : self.config.vocab_size], output[..., self.config.vocab_size :]

    def _losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        input_ids = _input_ids(batch)
        mask = batch.get("attention_mask")
        labels = batch.get("labels")
        if labels is None:
            labels = input_ids if mask is None else input_ids.masked_fill(mask == 0, _IGNORED)
        logits, routed = self._run(input_ids, mask)
        cross_entropy = _next_token_loss(logits, labels)
        if not routed.shape[-1]:
            return {"loss": cross_entropy, "cross_entropy": cross_entropy}
        routers = router_loss(routed, mask, self.config.num_experts_per_tok)
        loss = cross_entropy + self.config.router_aux_loss_coef * routers
        return {"loss": loss, "cross_entropy": cross_entropy, "router_loss": routers}


def _input_ids(batch: Any) -> Tensor:
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        input_ids: Tensor = batch["input_ids"]
        return input_ids
    keys = f" with the keys {sorted(batch)}" if isinstance(batch, Mapping) else ""
    raise ConfigurationError(
        f"A batch is a {type(batch).__name__}{keys}; CausalLM takes a dict with 'input_ids' and, if there are any, 'attention_mask'"
        " and 'labels', all int64 tensors of shape (B, T)."
    )


def _next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens that are to be predicted; 0 if there are none, where a mean would be NaN."""
    # The labels move instead of the logits, which would have to be copied.
    targets_BT = F.pad(labels_BT, (0, 1), value=_IGNORED)[:, 1:]
    total = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=_IGNORED, reduction="sum")
    return total / (targets_BT != _IGNORED).sum().clamp(min=1)
