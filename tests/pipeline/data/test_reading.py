"""What in a batch goes by samples: whatever a loader gives, every sample is dealt once, or nothing is."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.pipeline.data.batch_splitting import BatchSplitter
from lightning_sentinel.pipeline.data.reading import Source, read
from lightning_sentinel.pipeline.results.joining import join
from tests.pipeline.ranks import same_tree

Pair = namedtuple("Pair", ["inputs", "labels"])


@dataclass(frozen=True)
class Record:
    inputs: Any
    labels: Any


class Own:
    """A batch of the user's own, as Lightning takes it."""

    def __init__(self, inputs: Any, labels: Any) -> None:
        self.inputs, self.labels = inputs, labels

    def to(self, *args: Any, **kwargs: Any) -> Own:
        return self


def images(samples: int, channels: int = 3) -> list[Tensor]:
    return [torch.full((channels, 4 + index % 2, 5), float(index)) for index in range(samples)]


def by_samples(samples: int) -> dict[str, Any]:
    """Everything that collation makes with one entry a sample."""
    rows = torch.arange(samples)
    return {
        "tensor": torch.stack((rows, rows * 2), dim=1).float(),
        "array": rows.numpy() * 3.0,
        "texts": np.array([f"t{row}" for row in range(samples)]),
        "names": [f"n{row}" for row in range(samples)],
        "tuple": tuple(f"m{row}" for row in range(samples)),
        "numbers": list(range(samples)),
        "images": images(samples, channels=samples + 3),
        "targets": tuple({"boxes": torch.zeros(row % 3, 4), "id": row} for row in range(samples)),
        "ragged": [list(range(row + 1)) for row in range(samples)],
    }


def containers(values: list[Any]) -> list[Any]:
    """The same two leaves in every kind of container."""
    one, other = values
    return [
        (one, other),
        [one, other],
        Pair(one, other),
        Record(one, other),
        Own(one, other),
        {"a": one, "b": [other]},
        UserDict(a=one, b=other),
    ]


def seen(value: Any) -> Any:
    """Something that can be compared, whatever the container."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (Record, Own)):
        value = vars(value)
    if isinstance(value, (dict, UserDict)):
        return {key: seen(entry) for key, entry in value.items()}
    if isinstance(value, Pair):
        return Pair(*map(seen, value))
    return type(value)(map(seen, value)) if isinstance(value, (list, tuple)) else value


names = st.sampled_from(sorted(by_samples(1)))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(samples=st.integers(3, 9), count=st.integers(1, 5), one=names, other=names, kind=st.integers(0, 6))
def test_dealing_and_joining_is_the_identity(samples: int, count: int, one: str, other: str, kind: int) -> None:
    everything = by_samples(samples)
    # A tensor beside them says how many samples there are, whatever else could be read in two ways.
    batch = {"rows": torch.arange(samples), "it": containers([everything[one], everything[other]])[kind], "note": "text", "n": 3}
    whole = BatchSplitter(None).whole(batch)
    assert whole.samples == samples
    if samples < count:
        with pytest.raises(ConfigurationError, match="cannot be dealt"):
            whole.dealt(count)
        return
    dealt = whole.dealt(count)
    parts = [dealt[index] for index in range(count)]
    assert [len(part["rows"]) for part in parts] == list(dealt.sizes)
    assert all(type(part["it"]) is type(batch["it"]) and part["note"] == "text" for part in parts)
    assert same_tree(seen(join(parts, dealt.sizes)), seen(batch))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(samples=st.integers(1, 11), replicas=st.integers(1, 4), count=st.integers(1, 3))
def test_every_sample_goes_to_one_replica_or_fills_up(samples: int, replicas: int, count: int) -> None:
    batch = {"x": torch.arange(samples), "names": [f"{row}" for row in range(samples)]}
    deal = BatchSplitter(None).whole(batch).dealt_to(replicas, count)
    found = [deal.replicas[r][k] for r in range(replicas) for k in range(deal.sizes.micro_batches)]
    rows = [row for one in deal.rows for part in one for row in part]
    assert [int(row) for part in found for row in part["x"]] == rows
    assert [name for part in found for name in part["names"]] == list(map(str, rows))
    assert set(rows) == set(range(samples)) and len(rows) - samples < replicas


def test_a_list_of_ten_is_a_structure_or_one_entry_a_sample_by_the_sizes_of_what_it_holds() -> None:
    crops = [torch.zeros(8, 3, size, size) for size in range(2, 12)]
    found = read({"crops": crops, "labels": torch.arange(8)})
    assert found.samples == 8 and [len(crop) for crop in found.part(slice(2))["crops"]] == [2] * 10
    found = read({"images": images(10), "labels": torch.arange(10)})
    assert found.samples == 10 and [len(image) for image in found.part(slice(2))["images"]] == [3, 3]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (({"x": torch.zeros(10, 3), "weights": torch.zeros(5)}), r"batch\['x'\]: \(10, 3\), batch\['weights'\]: \(5,\)"),
        ((torch.zeros(7, 4, 2), torch.zeros(4)), r"batch\[0\]: \(7, 4, 2\), batch\[1\]: \(4,\)"),
        (({"x": torch.zeros(4, 2), "classes": ["cat", "dog"]}), r"batch\['classes'\]: list of 2"),
        (Record(torch.zeros(4), np.zeros(3)), r"batch.inputs: \(4,\), batch.labels: \(3,\)"),
        ({"images": images(5)}, r"one of 3 or 5 samples: batch\['images'\]: list of 5, the first of which is batch.*\(3, 4, 5\)"),
        ({"images": images(3), "y": torch.zeros(3)}, r"batch\['images'\] can be one entry for each of 3 samples, or a structure"),
        (pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)]), "PackedSequence"),
        ({"a": torch.zeros(3, 3).to_sparse()}, r"batch\['a'\] is a nested or sparse tensor"),
    ],
)
def test_what_is_ambiguous_is_named_with_its_sizes(batch: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as raised:
        read(batch)
    assert "split_batch(self, batch, count)" in str(raised.value)


def test_the_loaders_batch_size_decides_what_sizes_leave_open() -> None:
    assert read({"images": images(5)}, Source(batch_size=5)).samples == 5
    pairs = [(torch.zeros(4, 2), 1), (torch.zeros(4, 2), 0), (torch.zeros(4, 2), 1)]
    assert read(pairs, Source(batch_size=3)).part(slice(1, 3)) == pairs[1:]
    pair = [torch.zeros(8, 2), torch.ones(8, 2)]
    assert read(pair, Source(batch_size=8)).samples == read(pair).samples == 8
    assert read([torch.zeros(2, 3), torch.zeros(2, 3)], Source(batch_size=2)).part(slice(1))[0].shape == (1, 3)


def test_torchs_own_collation_makes_structures() -> None:
    views = {"views": [torch.zeros(2, 3), torch.ones(2, 3)], "y": torch.zeros(2)}
    found = read(views, Source(by_torch=True)).part(slice(1))
    assert [tuple(view.shape) for view in found["views"]] == [(1, 3), (1, 3)]


def test_time_first_is_refused_where_every_second_axis_is_the_batch_size() -> None:
    with pytest.raises(ConfigurationError, match=r"batch_size is 20, but the first axis .* batch\[0\]: \(35, 20, 4\)"):
        read((torch.zeros(35, 20, 4), torch.zeros(35, 20)), Source(batch_size=20))
    # A last short batch of samples that are as long as others are many.
    source = Source(batch_size=20)
    assert read(torch.zeros(20, 20), source).samples == 20
    assert read(torch.zeros(3, 20), source).samples == 3


def test_a_short_batch_is_read_as_those_before() -> None:
    """Three images of three channels could be anything, ten could not."""
    source = Source(batch_size=10)
    for samples in (10, 3, 1):
        found = read({"images": images(samples), "y": torch.arange(samples)}, source)
        assert found.samples == samples
        assert [image.shape[0] for image in found.part(slice(1))["images"]] == [3]


def test_without_anything_to_tell_by_there_is_one_sample() -> None:
    for batch in (object(), "text", 3, None, torch.tensor(1.0), {"a": {}}):
        found = read(batch)
        assert found.samples == 1 and found.part(slice(1)) is batch
    assert read([]).samples == 0 and read(["a", "b"]).samples == 2


class TestByTheModule:
    class Timely:
        """Time first, as packed by a recurrent net."""

        def split_batch(self, batch: Any, count: int) -> list[Any]:
            inputs, labels = batch
            return list(zip(inputs.tensor_split(count, dim=1), labels.tensor_split(count)))

    class Graphs:
        """Graphs of one, two, ... nodes each, one behind the other."""

        def split_batch(self, batch: Any, count: int) -> list[Any]:
            graphs = batch["nodes"].split(list(range(1, len(batch["y"]) + 1)))
            groups = torch.arange(len(graphs)).tensor_split(min(count, len(graphs)))
            return [{"nodes": torch.cat([graphs[g] for g in group]), "y": batch["y"][group]} for group in groups]

        def count_samples(self, batch: Any) -> int:
            return len(batch["y"])

    def test_sizes_are_those_that_add_up_in_every_tensor(self) -> None:
        whole = BatchSplitter(self.Timely()).whole((torch.zeros(7, 10, 2), torch.zeros(10)))
        assert whole.most(4) == 4
        dealt = whole.dealt(4)
        assert dealt.sizes == (3, 3, 2, 2) and dealt[1][0].shape == (7, 3, 2) and whole.samples == 10

    def test_or_what_the_module_counts(self) -> None:
        whole = BatchSplitter(self.Graphs()).whole({"nodes": torch.zeros(15, 2), "y": torch.arange(5)})
        assert (whole.samples, whole.dealt(2).sizes, whole.most(9)) == (5, (3, 2), 5)

    @pytest.mark.parametrize(("replicas", "count"), [(1, 3), (2, 2), (3, 1), (2, 4)])
    def test_a_virtual_mesh_is_dealt_pieces_in_turn(self, replicas: int, count: int) -> None:
        deal = BatchSplitter(self.Graphs()).whole({"nodes": torch.zeros(15, 2), "y": torch.arange(5)}).dealt_to(replicas, count)
        parts = [deal.replicas[r][k]["y"].tolist() for r in range(replicas) for k in range(deal.sizes.micro_batches)]
        assert parts == [list(rows) for one in deal.rows for rows in one]
        assert {row for rows in parts for row in rows} == set(range(5))
        assert deal.sizes.dealt == tuple(one.sizes for one in deal.replicas)

    @pytest.mark.parametrize("given_", [None, [], [1, 2, 3], "text"])
    def test_anything_but_so_many_micro_batches_is_refused(self, given_: Any) -> None:
        class Wrong:
            def split_batch(self, batch: Any, count: int) -> Any:
                return given_

        with pytest.raises(ConfigurationError, match=r"Wrong.split_batch\(batch, 2\) returned"):
            BatchSplitter(Wrong()).whole(torch.zeros(4)).most(2)

    def test_where_nothing_tells_the_sizes_pieces_weigh_alike(self) -> None:
        class Opaque:
            def split_batch(self, batch: Any, count: int) -> Any:
                return [object() for _ in range(count)]

        assert BatchSplitter(Opaque()).whole(object()).dealt(4).weights == (0.25,) * 4
