from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.data.batch_splitting import BatchSplitter
from lightning_sentinel.pipeline.data.micro_batches import MicroBatches

Pair = namedtuple("Pair", ["inputs", "labels"])


@dataclass
class Record:
    inputs: Tensor
    labels: Tensor


def rows(samples: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, 3, generator=torch.Generator().manual_seed(seed))


def dealt(batch: Any, count: int) -> MicroBatches:
    return BatchSplitter(object()).whole(batch).dealt(count)


class TestMicroBatches:
    @pytest.mark.parametrize("samples", [1, 2, 5, 7, 8, 13])
    @pytest.mark.parametrize("count", [1, 2, 3, 5])
    def test_as_tensor_split(self, samples: int, count: int) -> None:
        batch = rows(samples)
        if samples < count:
            with pytest.raises(ConfigurationError, match=rf"{samples} sample.*micro_batches={count}.*larger batch_size"):
                dealt(batch, count)
            return
        parts = dealt(batch, count)
        expected = torch.tensor_split(batch, count)
        assert len(parts) == count
        assert parts.sizes == tuple(map(len, expected))
        for index, part in enumerate(expected):
            assert torch.equal(parts[index], part)
        assert sum(parts.weights) == pytest.approx(1.0, abs=1e-12)

    def test_weights_turn_means_into_the_mean(self) -> None:
        batch = rows(11)
        parts = dealt(batch, 4)
        mean = sum(weight * parts[index].mean(0) for index, weight in enumerate(parts.weights))
        assert torch.allclose(mean, batch.mean(0), atol=1e-6)

    def test_nested(self) -> None:
        inputs, labels, mask = rows(7), torch.arange(7), torch.ones(7, 2, 2)
        parts = dealt({"pair": Pair(inputs, labels), "rest": [mask, (labels,)]}, 3)
        for index, (x, y, m) in enumerate(zip(*(torch.tensor_split(t, 3) for t in (inputs, labels, mask)))):
            part = parts[index]
            assert isinstance(part["pair"], Pair)
            assert torch.equal(part["pair"].inputs, x)
            assert torch.equal(part["pair"].labels, y)
            assert torch.equal(part["rest"][0], m)
            assert torch.equal(part["rest"][1][0], y)

    def test_what_is_not_of_the_batch_stays_whole(self) -> None:
        scalar, marker = torch.tensor(3.0), object()
        parts = dealt((rows(6), scalar, "text", None, 5, marker), 2)
        for index in range(2):
            x, *rest = parts[index]
            assert len(x) == 3
            assert rest[0] is scalar
            assert rest[1:4] == ["text", None, 5]
            assert rest[4] is marker

    def test_no_copies(self) -> None:
        batch = rows(6)
        assert dealt(batch, 2)[0].data_ptr() == batch.data_ptr()

    def test_bytes_of_all_tensors(self) -> None:
        inputs, mask = rows(4), torch.ones(4, 2, 5, dtype=torch.bool)
        nested = {"pair": Pair(inputs, (torch.arange(4), "text")), "rest": [mask, None, 7, torch.tensor(1.0, dtype=torch.float64)]}
        # 4 x 3 floats, 4 integers of 64 bits, 4 x 2 x 5 truth values, and one float of 64 bits.
        assert dealt(nested, 2).bytes == 4 * 12 + 8 * 4 + 40 + 8

    def test_bytes_are_of_what_is_there_not_of_the_memory_behind_it(self) -> None:
        assert dealt(rows(8)[::2], 2).bytes == dealt(rows(4), 2).bytes == 48

    def test_a_mapping_that_is_no_dict(self) -> None:
        """Tokenizers return a ``UserDict``."""
        batch = UserDict(inputs=rows(6), labels=torch.arange(6))
        part = dealt(batch, 3)[1]
        assert part["labels"].tolist() == [2, 3]

    def test_a_dataclass(self) -> None:
        part = dealt(Record(rows(6), torch.arange(6)), 3)[1]
        assert part.labels.tolist() == [2, 3]
