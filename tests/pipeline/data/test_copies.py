from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_sentinel.pipeline.data.copies import copied
from lightning_sentinel.pipeline.messages.containers import leaves_of


class Pair(NamedTuple):
    x: Tensor
    text: list[str]


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    names: list[str]


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2),
        [np.ones(2), "text", 3],
        {"x": (torch.ones(2), []), "y": {}},
        UserDict(x=torch.ones(2)),
        Pair(torch.ones(2), ["a", "b"]),
        Frozen(torch.ones(2), ["a", "b"]),
        pack_sequence([torch.ones(3, 1), torch.ones(2, 1)]),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_nothing_that_is_done_to_a_copy_is_seen_in_the_batch(batch: Any) -> None:
    copy = copied(batch)
    assert type(copy) is type(batch)
    arrays = [leaf for leaf in leaves_of(copy) if isinstance(leaf, (Tensor, np.ndarray)) and leaf.dtype != torch.int64]
    for leaf in arrays:
        leaf *= 0
    kept = [leaf for leaf in leaves_of(batch) if isinstance(leaf, (Tensor, np.ndarray)) and leaf.dtype != torch.int64]
    assert len(kept) == len(arrays) and all((leaf == 1).all() for leaf in kept)
    if isinstance(batch, (Pair, Frozen)):
        assert list(vars(copy).values() if isinstance(copy, Frozen) else copy)[1] == ["a", "b"]
    if isinstance(batch, PackedSequence):
        assert torch.equal(copy.batch_sizes, batch.batch_sizes)


def test_containers_are_its_own() -> None:
    batch = {"names": ["a"], "more": {}}
    copy = copied(batch)
    copy["names"].append("b")
    copy["more"]["c"] = 1
    assert batch == {"names": ["a"], "more": {}}


def test_what_only_its_library_understands_stays() -> None:
    graph = object()
    assert copied([graph])[0] is graph
