"""Batches of one's own kind without samples, and what is made of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from lightning_sentinel.pipeline.data.batch_splitting import BatchSplitter
from lightning_sentinel.pipeline.data.emptying import emptied, is_empty


class Graph:
    def __init__(self) -> None:
        self.nodes, self.edges, self.count = torch.zeros(5, 3), torch.zeros(2, 7, dtype=torch.long), 4

    def to(self, device: Any) -> Graph:
        return self


class Frames(NamedTuple):
    frames: Tensor
    names: list[str]


class Deals:
    def split_batch(self, batch: Any, count: int) -> list[Any]:
        raise AssertionError("nobody asks for it")


FULL = [
    Frames(torch.zeros(4, 2), ["a", "b"]),
    {"ids": np.arange(3), "note": "text", "list": [torch.zeros(2), torch.zeros(3)]},
    (torch.zeros(5, 2, 3), torch.zeros(2)),
    ["a", "b"],
    Graph(),
    [Graph(), Graph()],
    pack_sequence([torch.zeros(2, 3)]),
]


@pytest.mark.parametrize("batch", FULL, ids=lambda batch: type(batch).__name__)
def test_the_structure_stays_and_nothing_is_dealt(batch: Any) -> None:
    assert not is_empty(batch)
    made = emptied(batch)
    assert type(made) is type(batch) and is_empty(made)
    whole = BatchSplitter(Deals()).whole(made)
    assert (whole.samples, whole.most(3), whole.dealt(3).sizes) == (0, 3, (0, 0, 0))


def test_what_is_no_sample_stays() -> None:
    made = emptied({"ids": np.arange(3), "note": "text", "graph": Graph()})
    assert made["note"] == "text" and made["graph"].count == 4 and made["graph"].edges.shape == (0, 7)
    assert emptied(Frames(torch.zeros(4, 2), ["a"])).frames.shape == (0, 2)


@pytest.mark.parametrize("batch", ["text", object(), 3, {"note": "text"}, {"x": torch.zeros(0), "opaque": object()}])
def test_of_what_cannot_be_emptied_there_is_nothing(batch: Any) -> None:
    assert emptied(batch) is None and not is_empty(batch)
