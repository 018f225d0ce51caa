from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_sentinel.mesh import Worker
from lightning_sentinel.trust.digests import Algorithm
from lightning_sentinel.trust.draws import seal
from lightning_sentinel.trust.statements import Moment

NOW = Moment(bytes(16), 7, 1)
NUMBER = bytes(range(16))


@pytest.mark.parametrize(
    "other",
    [
        (bytes(16), NOW, Worker(1, 0)),
        (NUMBER, replace(NOW, step=8), Worker(1, 0)),
        (NUMBER, replace(NOW, attempt=2), Worker(1, 0)),
        (NUMBER, replace(NOW, run=bytes(range(16))), Worker(1, 0)),
        (NUMBER, NOW, Worker(1, 1)),
        (NUMBER, NOW, Worker(0, 0)),
    ],
)
def test_a_seal_is_that_of_one_number_moment_and_worker(other: tuple[bytes, Moment, Worker]) -> None:
    shown = seal(NUMBER, NOW, Worker(1, 0), Algorithm.SHA256)
    assert shown == seal(NUMBER, NOW, Worker(1, 0), Algorithm.SHA256)
    assert shown != seal(*other, Algorithm.SHA256)
