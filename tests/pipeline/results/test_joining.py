from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sentinel.pipeline.results.all_predictions import merge
from lightning_sentinel.pipeline.results.joining import join, plain
from tests.pipeline.ranks import same_tree

Pair = namedtuple("Pair", ["inputs", "labels"])


def result(rows: torch.Tensor) -> Any:
    """What a step may return, from which the whole can be told as well as any part."""
    return {
        "logits": rows * 2,
        "pair": Pair(rows, rows.long()),
        "names": [f"{row}" for row in rows[:, 0].tolist()],
        "note": "text",
        "nothing": None,
        "loss": rows[:, 0].mean(),
        "number": rows[:, 0].mean().item(),
    }


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_parts_join_to_the_whole(sizes: list[int]) -> None:
    rows = torch.arange(2.0 * sum(sizes)).view(-1, 2)
    found, expected = join([result(part) for part in rows.split(sizes)], sizes, average=True), result(rows)
    for name in ("loss", "number"):
        assert float(found.pop(name)) == pytest.approx(float(expected.pop(name)), rel=1e-6)
    assert same_tree(found, expected)


def test_without_averages_scalars_are_stacked() -> None:
    found = join([torch.tensor(1.0), torch.tensor(2.0)], [1, 1])
    assert found.tolist() == [1.0, 2.0]
    assert join([1, 2], [1, 1]) == [1, 2]


def test_lists_go_by_samples_or_by_entries() -> None:
    assert join([["a"], ["b"]], [1, 1]) == ["a", "b"]
    assert join([["a", "b"], ["c"]], [-1, -1]) == ["a", "b", "c"]
    two = [torch.ones(3, 1), torch.zeros(3, 2)]
    assert [tuple(one.shape) for one in join([two, two], [3, 3])] == [(6, 1), (6, 2)]
    assert join([], []) is None


def test_tensors_of_different_lengths_have_one_entry_a_sample() -> None:
    """As sequences have that each micro-batch pads to its own longest, and images of different sizes."""
    short, long, other = torch.randn(2, 3, 4), torch.randn(1, 5, 4), torch.randn(2, 5, 4)
    joined = join([{"out": short}, {"out": long}], [2, 1])["out"]
    assert [tuple(row.shape) for row in joined] == [(3, 4), (3, 4), (5, 4)] and torch.equal(joined[2], long[0])
    arrays = join([short.numpy(), long.numpy()], [2, 1])
    assert [row.shape for row in arrays] == [(3, 4), (3, 4), (5, 4)]
    # Another replica's are all of one length, and a tensor.
    merged = merge([([joined], [[0, 2, 4]]), ([other], [[1, 3]])])[0]
    assert [tuple(row.shape) for row in merged] == [(3, 4), (5, 4), (3, 4), (5, 4), (5, 4)]
    assert torch.equal(merged[1], other[0]) and torch.equal(merged[4], long[0])
    # Of what does not go by samples, or nobody knows how many there are, the parts are left.
    assert len(join([short, long], [-1, -1])) == len(join([short, long], [4, 5])) == 2


def test_plain() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    found = plain({"loss": weight * 2, "module": torch.nn.Identity(), "pair": Pair(1, "a"), ("key",): 3})
    assert not found["loss"].requires_grad
    assert found | {"loss": 0} == {"loss": 0, "module": None, "pair": (1, "a")}


@given(samples=st.integers(1, 13), replicas=st.integers(1, 3), batch_size=st.integers(1, 3))
def test_predictions_of_all_replicas_are_those_of_one_process(samples: int, replicas: int, batch_size: int) -> None:
    """Samples are dealt in turns, none twice, as Lightning deals them for ``predict``."""

    def batches(indices: list[int], size: int) -> list[list[int]]:
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def predicted(indices: list[int]) -> Any:
        return {"rows": torch.tensor(indices), "names": [f"{index}" for index in indices]}

    dealt = [batches(list(range(replica, samples, replicas)), batch_size) for replica in range(replicas)]
    longest = max(map(len, dealt))
    given_ = [
        ([predicted(batch) for batch in mine] + [None] * (longest - len(mine)), mine + [[]] * (longest - len(mine)))
        for mine in dealt
    ]
    whole = batches(list(range(samples)), batch_size * replicas)
    assert same_tree(merge(given_), [predicted(batch) for batch in whole])
