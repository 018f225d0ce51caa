from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.pipeline.data.layout import describe, stand_in
from lightning_sentinel.pipeline.data.reading import read
from tests.pipeline.ranks import same_tree

CPU = torch.device("cpu")
Pair = namedtuple("Pair", ["inputs", "labels"])


@dataclass
class Record:
    inputs: torch.Tensor
    name: str


INPUTS, LABELS = torch.ones(5, 2, 3), torch.arange(5)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (INPUTS, INPUTS * 0),
        ([INPUTS, LABELS], [INPUTS * 0, LABELS * 0]),
        ((INPUTS, {"labels": LABELS, 3: "text"}), (INPUTS * 0, {"labels": LABELS * 0, 3: "text"})),
        (Pair(INPUTS, LABELS), (INPUTS * 0, LABELS * 0)),
        (UserDict(inputs=INPUTS), {"inputs": INPUTS * 0}),
        (Record(INPUTS, "cat"), {"inputs": INPUTS * 0, "name": "cat"}),
        ((INPUTS, object(), True, None, 2.5), (INPUTS * 0, None, True, None, 2.5)),
        (INPUTS[:0], INPUTS[:0]),
        (LABELS[3:].bool(), torch.zeros(2, dtype=torch.bool)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_stand_in_has_structure_shapes_and_dtypes(batch: Any, expected: Any) -> None:
    assert same_tree(stand_in(describe(batch, read(batch).samples), CPU), expected)


def test_it_holds_one_element_a_tensor() -> None:
    found = stand_in(describe(torch.ones(1000, 1000), 1000), CPU)
    assert found.untyped_storage().nbytes() == 4


@pytest.mark.parametrize(
    "description",
    [b"", b"{}", b"[]", b'{"samples": 2, "batch": {"shape": [2], "dtype": "nonsense"}}', b'{"samples": -1, "batch": {"value": 1}}'],
)
def test_what_is_no_description_is_refused(description: bytes) -> None:
    with pytest.raises(MalformedMessageError, match="does not"):
        stand_in(description, CPU)
