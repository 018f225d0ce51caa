"""Paragraphs as bytes, of different lengths and padded, the way a tokenizer and its collator make them."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.shakespeare.data import ShakespeareText
from lightning_sentinel.errors import ConfigurationError

__all__ = ["ByteParagraphs", "Paragraphs"]

PADDING = 0
"""A byte that no text has."""


class Paragraphs(Dataset[dict[str, Tensor]]):
    """What stands between empty lines, cut off or padded on the right to one length.

    Args:
        text: the bytes.
        length: bytes T of a sample; shorter paragraphs are padded.

    Example:
        >>> paragraphs = Paragraphs(b"To be,\\n\\nor not to be", length=8)
        >>> len(paragraphs), paragraphs[0]["attention_mask"].tolist()
        (2, [1, 1, 1, 1, 1, 1, 0, 0])
    """

    def __init__(self, text: bytes, length: int) -> None:
        self.length = length
        self.paragraphs = [stripped for part in text.split(b"\n\n") if len(stripped := part.strip()) > 1]

    def __len__(self) -> int:
        return len(self.paragraphs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        found = torch.frombuffer(bytearray(self.paragraphs[index][: self.length]), dtype=torch.uint8)
        input_ids = torch.full((self.length,), PADDING)
        input_ids[: len(found)] = found
        return {"input_ids": input_ids, "attention_mask": (torch.arange(self.length) < len(found)).long()}


class ByteParagraphs(L.LightningDataModule):
    """Shakespeare by paragraphs: the first part of the text to train on, the end of it to validate on.

    Args:
        data_dir: where the text is cached.
        batch_size: paragraphs in a batch, of each replica.
        sequence_length: bytes T of a paragraph.
        validation_fraction: share of the text that is kept for validation.

    Raises:
        ConfigurationError: if a value cannot work, or the text cannot be had or is too short.

    Example:
        >>> ByteParagraphs(batch_size=8).batch_size
        8
    """

    def __init__(
        self,
        data_dir: str = "data/shakespeare",
        batch_size: int = 16,
        sequence_length: int = 64,
        validation_fraction: float = 0.05,
    ) -> None:
        super().__init__()
        if sequence_length < 2:
            raise ConfigurationError(
                f"sequence_length={sequence_length} leaves nothing to predict: a sample needs at least 2 bytes."
            )
        self.text = ShakespeareText(data_dir, batch_size, sequence_length, validation_fraction)
        self.batch_size = batch_size
        self.sequence_length = sequence_length

    def prepare_data(self) -> None:
        """Cache the text, unless it is there already."""
        self.text.prepare_data()

    def setup(self, stage: str) -> None:
        """Load the text and split it."""
        self.text.setup(stage)
        windows = (self.text.train_windows, self.text.val_windows)
        self.train, self.val = (Paragraphs(part.text.numpy().tobytes(), self.sequence_length) for part in windows)
        for part, paragraphs in (("training", self.train), ("validation", self.val)):
            if len(paragraphs) < self.batch_size:
                raise ConfigurationError(
                    f"The {part} part of the text has {len(paragraphs)} paragraphs, fewer than one batch of"
                    f" batch_size={self.batch_size}: choose smaller batches or a longer text."
                )

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Paragraphs in a drawn order, ``input_ids`` and ``attention_mask`` int64 of shape ``(batch_size, T)``."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The paragraphs for validation in the order of the text."""
        return DataLoader(self.val, self.batch_size, drop_last=True)
