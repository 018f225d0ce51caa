"""What steps keep: what has changed, how it travels, and what another rank may set."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.pipeline.messages.tensor_trees import pack, unpack
from lightning_sentinel.pipeline.results.changing import changes, picture
from lightning_sentinel.pipeline.results.telling import NoData, decoded, encoded
from lightning_sentinel.pipeline.step_attributes import kept_by, put, remembered
from tests.pipeline.ranks import same_tree


class Meter:
    def __init__(self) -> None:
        self.total = 0.0


class Helper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []
        self.register_buffer("seen", torch.zeros(2))


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.accuracy = torchmetrics.MeanMetric()
        self.several = torchmetrics.MetricCollection([torchmetrics.SumMetric(), torchmetrics.MaxMetric()])
        self.helper = Helper()
        self.lists: list[list[Any]] = [[], []]
        self._by_name: dict[str, list[Any]] = {"a": [], "b": []}
        self.groups: defaultdict[str, list[Any]] = defaultdict(list)
        self.total, self.best, self.meter = torch.zeros(()), None, Meter()
        self.array, self.count = np.zeros((2, 2)), 0
        self.register_buffer("confusion", torch.zeros(2, 2))


LAYERS = ("net.0", "net.1")


def test_kept_is_what_the_users_module_has_and_no_machinery() -> None:
    names = set(kept_by(Module(), LAYERS))
    own = {"lists", "_by_name", "groups", "total", "best", "meter", "array", "count", "confusion"}
    assert names == own | {"helper.values", "helper.seen"}


# --- What has changed


def in_place(module: Module) -> None:
    module.lists[1].append(1.0)
    module._by_name["b"].append(torch.ones(2))
    module.groups["new"].append(2)
    module.total += 3
    module.array[0, 1] += 1
    module.confusion[1, 0] += 1
    module.helper.values.append(1.0)
    module.helper.seen[0] = 1


@pytest.mark.parametrize("inference", [False, True])
def test_changes_are_found_in_nested_collections_tensors_buffers_and_arrays(inference: bool) -> None:
    """In inference mode torch does not count what is done to a tensor."""
    module = Module()
    kept = kept_by(module, LAYERS)
    before = {name: picture(holder.value) for name, holder in kept.items()}
    assert not [change for name, holder in kept.items() for change in changes(name, before[name], holder.value)]
    with torch.inference_mode(inference):
        in_place(module)
    found = {(one.name, *one.keys) for name, holder in kept.items() for one in changes(name, before[name], holder.value)}
    assert found == {
        ("lists", 1), ("_by_name", "b"), ("groups", "new"), ("total",), ("array",), ("confusion",), ("helper.values",),
        ("helper.seen",),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "change", "keys"),
    [
        ([1, 2], lambda v: v.append(3), ()),
        ([1, 2], lambda v: v.__setitem__(0, 3), (0,)),
        ([1, 2], lambda v: v.clear(), ()),
        ({"a": 1}, lambda v: v.update(a=2), ("a",)),
        ({"a": 1, "b": 1}, lambda v: v.pop("a"), ()),
        ({"a": {"b": [torch.zeros(1)]}}, lambda v: v["a"]["b"][0].add_(1), ("a", "b", 0)),
        ({"a": ([],)}, lambda v: v["a"][0].append(1), ("a",)),
        (deque([1], maxlen=2), lambda v: v.append(2), ()),
        ({1}, lambda v: v.add(2), ()),
        (torch.arange(3_000_000.0), lambda v: v[:2].copy_(v[:2].flip(0)), ()),
        (torch.zeros(3, dtype=torch.complex64), lambda v: v.add_(1j), ()),
        (torch.zeros(3, dtype=torch.bool), lambda v: v.logical_not_(), ()),
        (torch.zeros(4, 3).t(), lambda v: v[0, 0].add_(1), ()),
        (np.array(["a", "b"]), lambda v: v.__setitem__(0, "c"), ()),
        (Meter(), lambda v: setattr(v, "total", 1.0), ()),
    ],
)
def test_the_smallest_part_that_changed_is_named(value: Any, change: Any, keys: tuple[Any, ...]) -> None:
    before = picture(value)
    assert list(changes("it", before, value)) == []
    change(value)
    (found,) = changes("it", before, value)
    assert found.keys == keys


@pytest.mark.parametrize(
    "value", [float("nan"), [float("nan")], torch.tensor([torch.nan]), np.float32("nan"), None, "text", Meter()]
)
def test_what_stays_has_not_changed(value: Any) -> None:
    assert list(changes("it", picture(value), value)) == []


def test_what_takes_the_place_of_something_else_has_changed() -> None:
    for before, now in [(0.0, torch.tensor(0.0)), (None, 1), ([1], (1,)), (Meter(), Meter())]:
        assert [change.keys for change in changes("it", picture(before), now)] == [()]
    assert [change.value for change in changes("it", None, 1)] == [1]


def test_what_is_remembered_can_be_brought_back() -> None:
    module = Module()
    module.losses = [torch.ones((), requires_grad=True) * 2]
    in_place(module)
    expected = {name: picture(holder.value) for name, holder in kept_by(module, LAYERS).items()}
    lists, total = module.lists, module.total
    restore = remembered(module, LAYERS)
    in_place(module)
    module.losses.append(torch.zeros(()))
    module.lists, module.total, module.new = [], torch.ones(()), [1]
    restore()
    assert module.lists is lists and module.total is total and not hasattr(module, "new")
    now = kept_by(module, LAYERS)
    assert not [one for name, holder in now.items() for one in changes(name, expected[name], holder.value)]


# --- How it travels


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, 0.1, "text", float("inf"), [1, [2, {"a": (3, None)}]], {(0, "a"): 1, 2: [torch.ones(2)]}, {1, 2},
        frozenset({1}), deque([1, 2]), torch.ones(2, 3, dtype=torch.bfloat16), np.arange(3), np.zeros((2, 0)),
    ],
)  # fmt: skip
def test_data_travels_as_it_is(value: Any) -> None:
    found = decoded(unpack(*pack(encoded(value))))
    if isinstance(value, np.ndarray):
        assert found.dtype == value.dtype and np.array_equal(found, value)
    else:
        assert same_tree(found, value)


def test_collections_of_a_kind_of_their_own_travel_as_their_content() -> None:
    assert decoded(encoded(Counter("aab"))) == {"a": 2, "b": 1}
    assert decoded(encoded(OrderedDict(a=[1]))) == {"a": [1]}
    scalar = decoded(encoded(np.float32(0.5)))
    assert scalar == 0.5 and isinstance(scalar, np.float32)


@pytest.mark.parametrize(
    "value", [Meter(), [Meter()], print, np.array([None]), np.array("text"), torch.ones(2).to_sparse(), {"a": object()}]
)
def test_what_is_no_data_is_said(value: Any) -> None:
    with pytest.raises(NoData):
        encoded(value)


@pytest.mark.parametrize(
    "node",
    [
        None,
        1,
        ["plain", [1]],
        ["list", 3],
        ["tensor", 1],
        ["dict", [1]],
        ["object", []],
        ["plain"],
        ["dict", [[["list", []], ["plain", 1]]]],
    ],
)
def test_what_is_not_made_by_encoding_is_refused(node: Any) -> None:
    with pytest.raises(MalformedMessageError, match="kept by steps"):
        decoded(node)
    deep: Any = ["plain", 1]
    for _ in range(100):
        deep = ["list", [deep]]
    with pytest.raises(MalformedMessageError):
        decoded(deep)


# --- What another rank may set


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("lists", (1,), [1.0, 2.0]), ("_by_name", ("b",), [1]), ("groups", ("new",), [2]), ("total", (), torch.tensor(3.0)),
        ("total", (), 3.0), ("best", (), {"epoch": 1}), ("array", (), np.ones((2, 2))), ("count", (), torch.tensor(7)),
        ("confusion", (), torch.ones(2, 2)), ("helper.values", (), [1.0]), ("helper.seen", (), torch.ones(2)), ("best", (), None),
    ],
)  # fmt: skip
def test_what_the_module_has_can_be_set(name: str, keys: tuple[Any, ...], value: Any) -> None:
    module = Module()
    holder = kept_by(module, LAYERS)[name]
    there = holder.value
    assert put(holder, keys, value)
    now = kept_by(module, LAYERS)[name].value
    for key in keys:
        now = now[key]
    assert np.array_equal(now, value) if isinstance(value, np.ndarray) else same_tree(now, value)
    if isinstance(there, (dict, list, np.ndarray)) or (isinstance(there, Tensor) and isinstance(value, Tensor)):
        assert kept_by(module, LAYERS)[name].value is there, "others may hold it, too"


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("lists", (), {"a": 1}), ("lists", (2,), []), ("lists", ("a",), []), ("lists", (0, 0), 1), ("_by_name", ("a",), 1.0),
        ("total", (), [1]), ("array", (), torch.ones(2, 2)), ("meter", (), 1.0), ("meter", ("total",), 1.0),
        ("count", ("real",), 1),
        ("confusion", (), "text"), ("helper.values", (), 1.0),
    ],
)  # fmt: skip
def test_nothing_takes_the_place_of_something_of_another_kind(name: str, keys: tuple[Any, ...], value: Any) -> None:
    module = Module()
    before = {name: picture(holder.value) for name, holder in kept_by(module, LAYERS).items()}
    assert not put(kept_by(module, LAYERS)[name], keys, value)
    assert not [one for name, holder in kept_by(module, LAYERS).items() for one in changes(name, before[name], holder.value)]


@pytest.mark.parametrize(
    "name", ["training_step", "_modules", "_parameters", "trainer", "_trainer", "_hparams", "net", "forward", "training"]
)
def test_machinery_is_out_of_reach(name: str) -> None:
    module = Module()
    assert name not in kept_by(module, LAYERS)


def test_what_was_made_in_evaluation_can_be_worked_on_in_training() -> None:
    module = Module()
    with torch.inference_mode():
        assert put(kept_by(module)["best"], (), torch.ones(2))
        assert put(kept_by(module)["total"], (), torch.ones(()))
    module.best += 1  # type: ignore[operator]
    module.total += 1
