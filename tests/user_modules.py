"""Modules as users write them, for tests that compare what becomes of them with a plain run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Samples(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int = 24) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(count, 4, generator=generator), 100 * torch.randn(count, 2, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index].clone()}


def loader() -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Samples(), batch_size=8)


class Net(nn.Module):
    """Its layers are not in an ``nn.Sequential``, and its ``forward`` is not to be run in a pipeline."""

    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(4, 6)
        self.mid = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        Net.runs += 1
        x = self.inp(x)
        for layer in self.mid:
            x = layer(x)
        return self.head(x)


class Module(L.LightningModule):
    """An ordinary one around a net."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Net()
        self.steps = 0

    def configure_pipeline(self) -> list[nn.Module]:
        return [self.model.inp, *self.model.mid, self.model.head]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return ((self.model(batch["x"]) - batch["y"] / 100) ** 2).mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Deep(Module):
    """The net is two modules further in, and the step calls the outermost."""

    def __init__(self) -> None:
        super().__init__()
        net, self.model = self.model, nn.Module()
        self.model.backbone = nn.Sequential()
        self.model.backbone.net = net

    def configure_pipeline(self) -> list[nn.Module]:
        net = self.model.backbone.net
        return [net.inp, *net.mid, net.head]

    def forward(self, x: Tensor) -> Tensor:
        return self.model.backbone(x)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return ((self(batch["x"]) - batch["y"] / 100) ** 2).mean()


class ByName(Module):
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return ((self.model(x=batch["x"]) - batch["y"] / 100) ** 2).mean()


class Once(Module):
    """Changes its batch and itself in front of the call, and behind it."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        y = batch.pop("y")
        y.div_(100)
        self.log("before", y.mean())
        loss = ((self.model(batch["x"]) - y) ** 2).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.steps += 1
        y = batch.pop("y").div_(100)
        self.log("val_loss", ((self.model(batch["x"]) - y) ** 2).mean())


class OnlyLogs(Module):
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_mean", batch["x"].mean())


class Skips(Module):
    """Leaves batches out, before or behind the call."""

    def __init__(self, early: bool, every: int = 2) -> None:
        super().__init__()
        self.early, self.every = early, every

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        leaves_out = batch_idx % self.every == 0
        if leaves_out and self.early:
            return None
        loss = super().training_step(batch, batch_idx)
        return None if leaves_out else loss


class Fetches(Module):
    """Gets its batches itself."""

    def training_step(self, dataloader_iter: Any) -> Tensor | None:
        batch, _, _ = next(dataloader_iter)
        loss = self.loss(batch)
        self.log("loss", loss, batch_size=len(batch["x"]))
        return loss

    def validation_step(self, dataloader_iter: Any) -> None:
        batch, _, _ = next(dataloader_iter)
        self.log("val_loss", self.loss(batch), batch_size=len(batch["x"]))


class OwnBackward(Module):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.steps += 1
        (2 * loss).backward()


class OwnClipping(Module):
    def __init__(self, by: str = "norm") -> None:
        super().__init__()
        self.by = by

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if self.trainer.global_step > 1:
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm=self.by)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "last layer": lambda module: torch.optim.AdamW(module.model.head.parameters(), lr=0.01),
    "trainable": lambda module: torch.optim.AdamW(filter(lambda p: p.requires_grad, module.parameters()), lr=0.01),
    "one weight": lambda module: torch.optim.SGD([module.model.mid[1][0].weight], lr=0.01, momentum=0.9),
    "groups": lambda module: torch.optim.AdamW(
        [{"params": module.model.inp.parameters(), "lr": 0.02}, {"params": module.model.head.parameters(), "weight_decay": 0.1}],
        lr=0.01,
    ),
}


class Partly(Module):
    """Trains a part of its net, which ``configure_optimizers`` picks out of the whole."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        if name == "trainable":
            self.model.inp.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.name](self)
        # One rate for each group, whatever this process has of it.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step] * len(optimizer.param_groups))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}
