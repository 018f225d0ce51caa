"""Batches of several loaders that come as one, in sizes of their own."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.data.batch_splitting import BatchSplitter
from lightning_sentinel.pipeline.data.feeding import source_of
from lightning_sentinel.pipeline.data.reading import Source


class Both(NamedTuple):
    first: Any
    second: Any


def numbers(samples: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + samples)


TWO = Source(parts={"one": Source(), "two": Source()})
WHOLE = BatchSplitter(object())


def test_every_micro_batch_has_its_share_of_each() -> None:
    batch = {"two": {"x": numbers(8, 100), "names": list("abcdefgh")}, "one": (numbers(4), "note")}
    whole = WHOLE.whole(batch, TWO)
    assert (whole.samples, whole.most(4), whole.most(3)) == (8, 4, 2), "in the order of the batch; a third of four is none"
    dealt = whole.dealt(4)
    assert (len(dealt), dealt.sizes) == (4, (2, 2, 2, 2))
    assert dealt[3]["one"][0].tolist() == [3] and dealt[3]["one"][1] == "note"
    assert dealt[3]["two"]["x"].tolist() == [106, 107] and dealt[3]["two"]["names"] == ["g", "h"]


def test_of_equal_sizes_any_number_is_right() -> None:
    whole = WHOLE.whole({"one": numbers(5), "two": numbers(5)}, TWO)
    assert (whole.most(4), whole.dealt(4).sizes) == (4, (2, 1, 1, 1))


def test_a_virtual_mesh_is_dealt_each_loaders_samples_in_turn() -> None:
    deal = WHOLE.whole({"one": numbers(8), "two": numbers(4, 100)}, TWO).dealt_to(2, 3)
    assert (deal.sizes.micro_batches, deal.samples) == (2, 8)
    assert deal.replicas[1][1]["one"].tolist() == [5, 7] and deal.replicas[1][1]["two"].tolist() == [103]
    assert list(deal.rows[1][1]) == [5, 7]


@pytest.mark.parametrize("batch", [Both(numbers(4), numbers(2)), [numbers(4), numbers(2)], (numbers(4), numbers(2))])
def test_loaders_may_be_in_any_structure(batch: Any) -> None:
    loaders = type(batch)(*"ab") if isinstance(batch, Both) else type(batch)("ab")
    part = WHOLE.whole(batch, source_of(loaders)).dealt(2)[1]
    assert type(part) is type(batch) and [one.tolist() for one in part] == [[2, 3], [1]]


def test_structures_in_structures() -> None:
    source = source_of({"a": [object(), object()], "b": object()})
    part = WHOLE.whole({"a": [numbers(4), numbers(2)], "b": numbers(6)}, source).dealt(2)[1]
    assert part["a"][0].tolist() == [2, 3] and part["a"][1].tolist() == [1] and part["b"].tolist() == [3, 4, 5]


def test_a_loader_that_has_none_left_gives_nothing() -> None:
    whole = WHOLE.whole({"one": None, "two": numbers(4)}, TWO)
    assert (whole.samples, whole.most(4)) == (4, 4)
    assert whole.dealt(2)[1]["one"] is None
    deal = whole.dealt_to(2, 2)
    assert deal.replicas[1][0]["one"] is None and deal.replicas[1][0]["two"].tolist() == [1]
    nothing = WHOLE.whole({"one": None, "two": None}, TWO)
    assert (nothing.samples, nothing.most(4), nothing.dealt(1)[0]) == (1, 1, {"one": None, "two": None})
    assert nothing.dealt_to(2, 4).replicas[1][0] == {"one": None, "two": None}


def test_a_replica_without_samples_has_empty_parts() -> None:
    whole = WHOLE.whole({"one": numbers(0), "two": numbers(0)}, TWO)
    assert (whole.samples, whole.most(3), whole.dealt(3).sizes) == (0, 3, (0, 0, 0))


def test_what_one_loader_gives_has_to_agree_on_a_size() -> None:
    batch = {"one": numbers(4), "two": {"x": numbers(3), "y": numbers(2)}}
    with pytest.raises(ConfigurationError, match=r"Of the loader 'two': .*does not agree .*split_batch"):
        WHOLE.whole(batch, TWO)


def test_a_hook_may_have_made_one_batch_of_them() -> None:
    assert WHOLE.whole((numbers(6), numbers(6)), TWO).dealt(3).sizes == (2, 2, 2)


def test_sources_know_each_loaders_batch_size() -> None:
    source = source_of({"one": DataLoader(range(8), batch_size=4), "two": DataLoader(range(8), batch_size=2)})
    assert {key: one.batch_size for key, one in source.parts.items()} == {"one": 4, "two": 2}
