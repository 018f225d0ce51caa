from __future__ import annotations

import collections
import dataclasses
import enum
import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sentinel.errors import MalformedMessageError, PipelineModelError
from lightning_sentinel.pipeline.messages.containers import leaves_of
from lightning_sentinel.pipeline.messages.tensor_trees import (
    broadcast_tree,
    learn_kinds,
    pack,
    receive_tree,
    reserve,
    send_tree,
    unpack,
)
from tests.pipeline.ranks import ranks, same_tree

repeatable = settings(derandomize=True, deadline=None, max_examples=150)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    values = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    tensor = values.to(draw(st.sampled_from(DTYPES)))
    # What is sent need not lie in memory in order.
    return tensor.transpose(0, -1) if tensor.ndim > 1 and draw(st.booleans()) else tensor


KEYS = st.text(max_size=5) | st.integers(-9, 2**70)
LEAVES = tensors() | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@repeatable
@given(tree=TREES)
def test_what_was_packed_is_unpacked_as_it_was(tree: Any) -> None:
    description, parts = pack(tree)
    assert all(part.is_contiguous() and not part.requires_grad for part in parts)
    reserved = reserve(description, sum(part.numel() * part.element_size() for part in parts))
    assert [(t.shape, t.dtype) for t in reserved] == [(t.shape, t.dtype) for t in parts]
    for message_id, part in zip(reserved, parts):
        message_id.copy_(part)
    assert same_tree(unpack(description, reserved), tree)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(trees=st.lists(TREES, min_size=1, max_size=3))
def test_trees_arrive_one_after_the_other_as_they_were_sent(trees: list[Any]) -> None:
    def work(rank: int) -> list[Any]:
        if rank == 0:
            return [send_tree(tree, 1) for tree in trees]
        return [receive_tree(0) for _ in trees]

    with ranks(2) as world:
        assert same_tree(world.run(work)[1], trees)


@pytest.mark.parametrize("source", [0, 2])
@pytest.mark.parametrize("group", [None, (0, 2, 3)], ids=["world", "group"])
def test_all_ranks_of_a_group_get_what_one_has(source: int, group: tuple[int, ...] | None) -> None:
    tree = {"image": torch.arange(6.0).view(2, 3).t(), "names": ["cat", None], "empty": torch.empty(0, 2)}
    members = group or range(4)

    def work(rank: int) -> Any:
        if rank not in members:
            return None
        wire = None if group is None else world.among(group, world.timeout)
        return broadcast_tree(tree if rank == source else "of no interest", source, wire)

    with ranks(4) as world:
        for rank, found in enumerate(world.run(work)):
            assert same_tree(found, tree if rank in members else None)


def test_a_tree_without_tensors_is_broadcast() -> None:
    with ranks(2) as world:
        assert world.run(lambda rank: broadcast_tree(None if rank else [1, "a"], 0)) == [[1, "a"], [1, "a"]]


def test_gradients_and_graphs_stay_behind() -> None:
    tensor = torch.ones(2, requires_grad=True)
    _, parts = pack([tensor, 2 * tensor])
    assert [part.requires_grad for part in parts] == [False, False]


class Colour(enum.Enum):
    RED = 1


Pair = collections.namedtuple("Pair", ["left", "right"])


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param([object()], id="object"),
        {1, 2},
        [Colour.RED],
        {Colour.RED: 1},
        {(1, 2): 3},
        pytest.param([np.array([object()])], id="array of objects"),
        pytest.param(torch.eye(2).to_sparse(), id="sparse"),
    ],
    ids=repr,
)
def test_what_cannot_travel_is_refused_by_the_sender(tree: Any) -> None:
    with pytest.raises(
        PipelineModelError, match=r"Between processes travel tensors, arrays, numbers and text.* cannot. Return tensors, or coll"
    ):
        pack(tree)


# --- What somebody made up

SIZES = st.one_of(st.integers(-1, 5), st.sampled_from([2**31, 2**62, 2**63, 2**70, 1.0, True, None, "1"]))
NAMES = st.one_of(
    st.sampled_from(["float32", "uint8", "complex128", "qint8", "Tensor", "_C", "os", "nn"]), st.text(max_size=3), st.none()
)
ENTRIES = st.one_of(
    st.fixed_dictionaries({"dtype": NAMES, "shape": st.lists(SIZES, max_size=4) | SIZES}),
    st.sampled_from([{}, {"dtype": "float32"}, {"value": 3}, "dtype", ["dtype"], None, 7]),
)
KINDS = st.sampled_from(
    ["tensor", "array", "scalar", "texts", "bytes", "complex", "size", "tuple", "fields", "dict", "mapping", "of"]
)
NODES = st.recursive(
    st.sampled_from([0, 1, -1, 2**70, None, "a", "os.system", 1.5]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KINDS | st.just("attributes"), inner, max_size=2),
    max_leaves=5,
)
DESCRIPTIONS = st.one_of(
    st.binary(max_size=40),
    st.lists(ENTRIES, max_size=4).flatmap(lambda entries: NODES.map(lambda node: json.dumps([node, entries]).encode())),
    st.recursive(ENTRIES, lambda inner: st.lists(inner, max_size=3), max_leaves=6).map(lambda tree: json.dumps(tree).encode()),
)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(description=DESCRIPTIONS, most=st.sampled_from([0, 1, 100, 4000]))
def test_anything_is_believed_or_refused_and_never_more_is_allocated_than_there_is_room_for(description: bytes, most: int) -> None:
    try:
        reserved = reserve(description, most)
    except MalformedMessageError:
        return
    assert sum(tensor.untyped_storage().nbytes() for tensor in reserved) <= most
    try:
        unpack(description, reserved)
    except MalformedMessageError:
        return
    assert len(reserved) == sum("dtype" in entry for entry in json.loads(description)[1])


@pytest.mark.parametrize("deep", [b"[" * 100_000, b"[" + b"[" * 5000 + b"]" * 5000 + b", []]"], ids=["description", "structure"])
def test_what_is_nested_too_deeply_is_refused(deep: bytes) -> None:
    with pytest.raises(MalformedMessageError, match="What should describe nested data does not"):
        unpack(deep, reserve(deep))


def announcing(*entries: Any, node: Any = None) -> bytes:
    return json.dumps([node, entries]).encode()


@pytest.mark.parametrize(("shape", "size"), [([25], 100), ([5, 5], 100), ([26], 104), ([2**40, 2**40], 2**82)])
def test_the_limit_is_in_bytes_of_all_tensors_together(shape: list[int], size: int) -> None:
    description = announcing({"dtype": "float32", "shape": shape})
    if size <= 100:
        assert reserve(description, 100)[0].nbytes == size
    else:
        with pytest.raises(MalformedMessageError, match=f"announces {size} bytes, and there is room for 100"):
            reserve(description, 100)
    twice = announcing(*[{"dtype": "float32", "shape": shape}] * 2)
    with pytest.raises(MalformedMessageError, match=f"announces {2 * size} bytes"):
        reserve(twice, 100)


@pytest.mark.parametrize("shape", [[2**40], [2**20, 2**20], [2**62]], ids=str)
def test_where_nobody_says_what_to_expect_the_limit_is_what_the_machine_has(shape: list[int]) -> None:
    with pytest.raises(MalformedMessageError, match="and there is room for"):
        reserve(announcing({"dtype": "float64", "shape": shape}))


@pytest.mark.parametrize("shape", [[0, 2**70], [0, 2**62, 2**62]], ids=str)
def test_sizes_beside_a_zero_are_refused_if_there_cannot_be_such_a_tensor(shape: list[int]) -> None:
    with pytest.raises(MalformedMessageError, match="cannot be allocated"):
        reserve(announcing({"dtype": "uint8", "shape": shape}))


@pytest.mark.parametrize(
    "node",
    [
        {"of": "this.c", "fields": [1, 2]},
        {"of": "this.c", "mapping": [["a", 1]]},
        {"of": "subprocess.Popen", "attributes": [["a", 1]]},
    ],
    ids=["fields", "mapping", "attributes"],
)
def test_the_sender_does_not_choose_what_the_receiver_makes(node: dict[str, Any]) -> None:
    assert type(unpack(announcing(node=node), [])) in (tuple, dict)
    assert "this" not in sys.modules


def test_every_tensor_has_one_place() -> None:
    layout = {"dtype": "float32", "shape": [1]}
    for node in (None, [{"tensor": 0}, {"tensor": 0}], {"tensor": -1}):
        with pytest.raises(MalformedMessageError, match="does not"):
            unpack(announcing(layout, node=node), [torch.ones(1)])


def test_nor_what_the_attributes_of_what_it_knows_are() -> None:
    learn_kinds(Own(1))
    with pytest.raises(MalformedMessageError, match="__class__ is no attribute of a batch"):
        unpack(announcing(node={"of": f"{__name__}.Own", "attributes": [["__class__", 1]]}), [])


class Own:
    """A batch of the user's own."""

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs

    def to(self, *args: Any) -> Own:
        return self


@dataclasses.dataclass(frozen=True)
class Record:
    inputs: Any
    names: Any


@pytest.mark.parametrize(
    "tree",
    [
        {"bytes": b"a\x00", "complex": 1j, "size": torch.Size([2, 3])},
        Pair(torch.ones(2), ["a"]),
        collections.OrderedDict(b=1, a=Pair(1, 2)),
        collections.UserDict(x=torch.ones(2)),
        Record(torch.ones(2), ("a", "b")),
        Own([torch.ones(2), Record(1, 2)]),
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_containers_arrive_as_what_they_are_where_their_kind_is_known(tree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_sentinel.pipeline.messages.tensor_trees._KINDS", {})
    packed = pack(tree)
    plain = unpack(*packed)
    learn_kinds(tree)
    found = unpack(*packed)
    assert type(found) is type(tree) and type(plain) in (dict, tuple)
    values = [list(leaves_of(one)) for one in (tree, found, plain)]
    assert same_tree(values[0], values[1]) and same_tree(values[0], values[2])


def test_arrays_are_arrays_again() -> None:
    tree = {
        "numbers": np.arange(6.0).reshape(2, 3)[:, ::2],
        "big-endian": np.arange(3, dtype=">i4"),
        "texts": np.array([["a", "bcd"]]),
        "bytes": np.array([b"a"]),
        "number": np.float32(2.5),
        "none": np.zeros((0, 2), dtype=bool),
        "text": np.str_("a"),
    }
    found = unpack(*pack(tree))
    for name, array in tree.items():
        np.testing.assert_array_equal(found[name], array)
        assert getattr(found[name], "shape", ()) == array.shape
    assert isinstance(found["number"], np.float32) and found["texts"].dtype == tree["texts"].dtype


def sent_by_hand(*letters: Tensor, most_bytes: int = 2**20) -> MalformedMessageError:
    """How a receiver refuses what rank 1 sends."""

    def work(rank: int) -> None:
        if rank == 1:
            for letter in letters:
                world.send(letter, 0)
        else:
            receive_tree(1, most_bytes)

    with ranks(2) as world, pytest.raises(MalformedMessageError) as raised:
        world.run(work)
    assert raised.value.rank == 1
    return raised.value


@pytest.mark.parametrize("length", [-1, 0, 2**26 + 1, 2**62])
def test_a_description_of_another_length_is_refused_before_it_comes(length: int) -> None:
    assert f"Rank 1 announces a description of {length} bytes" in str(sent_by_hand(torch.tensor([length])))


@pytest.mark.parametrize(
    ("description", "says"),
    [
        (b"\x80\x04.", "does not"),
        (announcing({"dtype": "float32", "shape": [2**20]}), "room for 1048576"),
        (announcing({"dtype": "Tensor", "shape": []}), "which there cannot be"),
        (announcing({"elsewhere": 1}), "does not"),
        (announcing(node={"tensor": 0}), "does not"),
    ],
    ids=["pickle", "too large", "no dtype", "no layout", "no tensor"],
)
def test_what_is_no_tree_names_its_sender(description: bytes, says: str) -> None:
    letters = torch.tensor([len(description)]), torch.tensor(list(description), dtype=torch.uint8)
    error = sent_by_hand(*letters)
    assert "Rank 1 sent a malformed message. " in str(error) and says in str(error)
