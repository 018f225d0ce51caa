"""Modules that somebody else wrote, and what it takes to cut them into stages."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.demos import LightningTransformer, Transformer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

__all__ = ["Boring", "Compiled", "Images", "Translator"]


class Boring(BoringModel):
    """Its one layer is a Sequential here, which is all that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 2))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Images(L.LightningModule):
    """Like torchvision's: a network, and beside it another Sequential, so that the one to cut has to be named."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.normalise = nn.Sequential(nn.BatchNorm2d(3, affine=False))
        self.network = nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            Residual(6),
            Residual(6),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self.network(images), labels))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Embed(nn.Module):
    """Source and target as one tensor, one behind the other: that is what travels between stages."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.embedding, self.positions, self.scale = model.embedding, model.pos_encoder, math.sqrt(model.ninp)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([self.positions(self.embedding(tokens) * self.scale) for tokens in inputs], dim=1)


class Encode(nn.Module):
    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, both: Tensor) -> Tensor:
        source, target = both.chunk(2, dim=1)
        return torch.cat([self.norm(self.layer(source)), target], dim=1)


class Decode(nn.Module):
    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, both: Tensor) -> Tensor:
        memory, target = both.chunk(2, dim=1)
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return torch.cat([memory, self.norm(self.layer(target, memory, tgt_mask=mask))], dim=1)


class Head(nn.Module):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.decoder, self.words = model.decoder, model.vocab_size

    def forward(self, both: Tensor) -> Tensor:
        _, target = both.chunk(2, dim=1)
        return torch.log_softmax(self.decoder(target), dim=-1).view(-1, self.words)


class Compiled(Images):
    """Of each stage a layer is compiled, one with BatchNorm and one without."""

    def __init__(self) -> None:
        super().__init__()
        for place in (3, 7):
            self.network[place].compile(backend="aot_eager")  # which needs no compiler of C++


class Translator(LightningTransformer):
    """Lightning's demo with a ``configure_pipeline``, without its download and without dropout, whose numbers no two runs share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = model = Transformer(vocab_size=40, ninp=8, nhead=2, nhid=16, nlayers=2, dropout=0.0)
        encoder, decoder, none = model.transformer.encoder, model.transformer.decoder, nn.Identity()
        self.layers = nn.ModuleList(
            [
                Embed(model),
                *(Encode(layer, none) for layer in encoder.layers[:-1]),
                Encode(encoder.layers[-1], encoder.norm),
                *(Decode(layer, none) for layer in decoder.layers[:-1]),
                Decode(decoder.layers[-1], decoder.norm),
                Head(model),
            ]
        )

    def prepare_data(self) -> None:
        pass

    def configure_pipeline(self) -> list[nn.Module]:
        return list(self.layers)
