from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.processes.torch_wire import backend_for

ONE, OTHER, HOST, UNKNOWN = (torch.device(name) for name in ("cuda:0", "cuda:1", "cpu", "mps:0"))


@pytest.mark.parametrize(
    ("device", "devices", "transport", "backend"),
    [
        (ONE, [ONE, OTHER], "auto", "cpu:gloo,cuda:nccl"),
        (OTHER, [OTHER], "auto", "cpu:gloo,cuda:nccl"),
        (ONE, [ONE, OTHER], "device", "cpu:gloo,cuda:nccl"),
        (ONE, [ONE, OTHER], "host", "gloo"),
        (ONE, [ONE, ONE], "auto", "gloo"),
        (ONE, [ONE, ONE, OTHER, OTHER], "host", "gloo"),
        (OTHER, [ONE, ONE, OTHER], "auto", "gloo"),  # the same for all, because all are in one group
        (UNKNOWN, [UNKNOWN], "auto", "gloo"),
        (HOST, [HOST, HOST], "auto", "gloo"),
        (HOST, [HOST, HOST], "device", "gloo"),
        (HOST, [HOST, HOST], "host", "gloo"),
    ],
)
def test_the_backend_follows_transport_and_devices(device: Any, devices: Any, transport: str, backend: str) -> None:
    assert backend_for(device, devices, transport) == backend


@pytest.mark.parametrize(
    ("device", "devices", "why"),
    [
        (ONE, [ONE, ONE], r"2 ranks share cuda:0"),
        (OTHER, [ONE, ONE, OTHER], r"3 ranks share cuda:0, cuda:1"),
        (UNKNOWN, [UNKNOWN], r"no backend"),
    ],
)
def test_what_cannot_be_sent_from_is_refused(device: Any, devices: Any, why: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"transport='device' is to send from {device}, which cannot be: {why}.*'host'"):
        backend_for(device, devices, "device")
