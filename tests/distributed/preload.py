"""What the fork server imports once, so that ranks need not."""

import deepspeed
import lightning
import torch
import torchmetrics
from deepspeed.runtime.pipe import engine

import lightning_sentinel
import lightning_sentinel.pipeline.engine as ours
import tests.distributed.tasks

__all__ = ["deepspeed", "engine", "lightning", "lightning_sentinel", "ours", "tests", "torch", "torchmetrics"]
