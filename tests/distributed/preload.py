"""What the fork server has done once, so that ranks need not: imported all that they import of themselves, and run once."""

import contextlib
import gc
import io
import random
import warnings

import blake3
import deepspeed
import deepspeed.comm.mori
import deepspeed.module_inject.auto_ep_layer
import deepspeed.moe.ep_repack
import lightning
import numpy
import pytest
import torch
import torchmetrics
import transformers
import transformers.modeling_layers
import transformers.modeling_utils
from cryptography.hazmat.primitives.asymmetric import ed25519
from deepspeed.runtime.pipe import engine
from rich import _emoji_codes
from torch.profiler import _cupti_monitor

import lightning_sentinel
import lightning_sentinel.models
import lightning_sentinel.pipeline.engine as ours
import tests.distributed.tasks

__all__ = [
    "_cupti_monitor",
    "_emoji_codes",
    "blake3",
    "deepspeed",
    "ed25519",
    "engine",
    "lightning",
    "lightning_sentinel",
    "ours",
    "pytest",
    "torch",
    "torchmetrics",
    "transformers",
]


def warm_up() -> None:
    """Fill what Python, torch and Lightning keep from their first time on: compiled expressions, answers about classes.

    Nothing goes backward: autograd would know from then on which devices there are, and ranks may add one.
    """
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    strategy = lightning_sentinel.SentinelStrategy(2, 2, micro_batches=2, engine="virtual")
    run = tests.distributed.tasks.trainer(strategy, 1, 1, limit_val_batches=1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.validate(tests.distributed.tasks.Classifier(), tests.distributed.tasks.loader(6), verbose=False)
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    numpy.random.set_state(states[2])


torch.set_num_threads(1)
# A fork of a process that has looked at GPUs cannot use them.
if not torch.cuda.device_count():
    warm_up()
# Ranks need not look through what was imported, which they share with the server until they touch it.
gc.collect()
gc.freeze()
