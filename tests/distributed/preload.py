"""What the fork server imports once, so that ranks need not: all that they import of themselves in a short run."""

import gc

import deepspeed
import deepspeed.module_inject.auto_ep_layer
import deepspeed.moe.ep_repack
import lightning
import pytest
import torch
import torchmetrics
import transformers
import transformers.modeling_layers
import transformers.modeling_utils
from deepspeed.runtime.pipe import engine
from rich import _emoji_codes

import lightning_sentinel
import lightning_sentinel.models
import lightning_sentinel.pipeline.engine as ours
import tests.distributed.tasks

__all__ = [
    "_emoji_codes",
    "deepspeed",
    "engine",
    "lightning",
    "lightning_sentinel",
    "ours",
    "pytest",
    "tests",
    "torch",
    "torchmetrics",
    "transformers",
]

# Ranks need not look through what was imported, which they share with the server until they touch it.
gc.collect()
gc.freeze()
