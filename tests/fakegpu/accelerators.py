"""The device as Lightning and DeepSpeed know devices."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from lightning.pytorch.accelerators import Accelerator

from tests.fakegpu import device


class FakeGPU(Accelerator):
    """One device, which all processes share."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(device.NAME, 0)] * int(devices)

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return device.NAME


class _DeepSpeeds(CPU_Accelerator):  # type: ignore[misc]
    def device_name(self, device_index: int | None = None) -> str:
        return device.NAME if device_index is None else f"{device.NAME}:{device_index}"


def install() -> None:
    """Make the device, and have DeepSpeed use it."""
    device.install()
    set_accelerator(_DeepSpeeds())
