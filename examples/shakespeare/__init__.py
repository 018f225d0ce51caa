"""A small byte-level Llama learns Shakespeare: an ordinary LightningModule and DataModule."""

from __future__ import annotations
