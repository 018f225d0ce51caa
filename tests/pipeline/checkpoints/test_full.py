from __future__ import annotations

import copy
import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sentinel.errors import ConfigurationError, MalformedMessageError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.checkpoints.full import (
    collect,
    group_names,
    merge_optimizer_states,
    optimizer_part,
    own_optimizer_state,
    own_part,
    select_state,
    speakers,
)
from lightning_sentinel.pipeline.messages.tensor_trees import send_tree
from tests.pipeline.ranks import Silent, installed, ranks

STAGES = (("0", "1"), ("2",), ("3", "4"))
"""Layers of each stage; the second has a LayerNorm only, so its group of decayed parameters is empty."""


class Counting(Optimizer):
    """Keeps numbers among its state, not only tensors."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["seen"] = state.get("seen", 0) + 1
                state["norm"] = state.get("norm", 0.1) + float(parameter.grad.norm())
                parameter -= group["lr"] * parameter.grad / (state["norm"] * state["seen"])


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2, bias=False))


Build = Callable[[dict[str, nn.Parameter]], Optimizer]


def two_groups(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0, "lr": 3e-3},
    ]


BUILDS: dict[str, Build] = {
    "AdamW": lambda parameters: torch.optim.AdamW(two_groups(parameters), lr=1e-2, betas=(0.8, 0.95), amsgrad=True),
    "SGD with momentum": lambda parameters: torch.optim.SGD(two_groups(parameters), lr=0.1, momentum=0.9),
    "SGD": lambda parameters: torch.optim.SGD(list(parameters.values()), lr=0.1),
    "numbers": lambda parameters: Counting([{k: v for k, v in g.items() if k != "weight_decay"} for g in two_groups(parameters)]),
}


class Cut:
    """A network trained whole, and the same one cut by hand into stages that are trained apart, with the same gradients."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.whole = net()
        self.parts = [nn.ModuleDict({name: net().get_submodule(name) for name in names}) for names in STAGES]
        self.order = [name for name, _ in self.whole.named_parameters()]
        self.optimizer = build(dict(self.whole.named_parameters()))
        self.optimizers = [build(dict(part.named_parameters())) for part in self.parts]

    def step(self, seed: int, optimizer: Optimizer | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        gradients = {name: torch.randn(p.shape, generator=generator) for name, p in self.whole.named_parameters()}
        for module in (self.whole, *self.parts):
            for name, parameter in module.named_parameters():
                parameter.grad = gradients[name].clone()
        for one in (optimizer or self.optimizer, *self.optimizers):
            one.step()

    def names(self, stage: int) -> dict[int, str]:
        return {id(p): name for name, p in self.parts[stage].named_parameters()}

    def merged(self) -> tuple[dict[str, Any], list[list[str]]]:
        parts = []
        for stage, optimizer in enumerate(self.optimizers):
            plain, tensors = optimizer_part(optimizer, self.names(stage))
            parts.append((json.loads(json.dumps(plain)), tensors))
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizers[0].param_groups]
        return merge_optimizer_states(parts, options, self.order)

    def weights_agree(self) -> bool:
        apart = {name: p for part in self.parts for name, p in part.named_parameters()}
        return all(torch.equal(p, apart[name]) for name, p in self.whole.named_parameters())


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["param_groups"] == expected["param_groups"]
    assert list(found["state"]) == list(expected["state"])
    for number, entry in expected["state"].items():
        assert set(found["state"][number]) == set(entry)
        for key, value in entry.items():
            other = found["state"][number][key]
            assert torch.equal(other, value) if isinstance(value, Tensor) else other == value, (number, key)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
class TestOptimizerState:
    def test_merged_it_is_the_unsplit_one(self, build: Build) -> None:
        cut = Cut(build)
        cut.step(1)
        cut.step(2)
        merged, groups = cut.merged()
        assert_same_state(merged, cut.optimizer.state_dict())
        names = {id(p): name for name, p in cut.whole.named_parameters()}
        assert groups == [[names[id(p)] for p in group["params"]] for group in cut.optimizer.param_groups]

    def test_before_the_first_step(self, build: Build) -> None:
        cut = Cut(build)
        assert_same_state(cut.merged()[0], cut.optimizer.state_dict())

    def test_the_unsplit_optimizer_goes_on_from_it(self, build: Build) -> None:
        cut = Cut(build)
        cut.step(1)
        fresh = build(dict(cut.whole.named_parameters()))
        # Through a file in earnest; tensors in common would be stepped twice.
        fresh.load_state_dict(copy.deepcopy(cut.merged()[0]))
        cut.step(2, optimizer=fresh)
        assert cut.weights_agree()

    def test_stages_go_on_from_it(self, build: Build) -> None:
        cut = Cut(build)
        cut.step(1)
        merged, groups = cut.merged()
        for stage, part in enumerate(cut.parts):
            fresh = build(dict(part.named_parameters()))
            fresh.load_state_dict(own_optimizer_state(merged, groups, fresh, cut.names(stage)))
            assert_same_state(fresh.state_dict(), cut.optimizers[stage].state_dict())
            cut.optimizers[stage] = fresh
        cut.step(2)
        assert cut.weights_agree()

    def test_another_cut_goes_on_from_it(self, build: Build) -> None:
        cut = Cut(build)
        cut.step(1)
        merged, groups = cut.merged()
        layers = {name: layer for part in cut.parts for name, layer in part.items()}
        cut.parts = [nn.ModuleDict({name: layers[name] for name in names}) for names in (("0",), ("1", "2", "3", "4"))]
        cut.optimizers = [build(dict(part.named_parameters())) for part in cut.parts]
        for stage, optimizer in enumerate(cut.optimizers):
            optimizer.load_state_dict(own_optimizer_state(merged, groups, optimizer, cut.names(stage)))
        cut.step(2)
        assert cut.weights_agree()


class TestOddOptimizers:
    def test_an_order_of_the_users_own_comes_back_to_the_stages(self) -> None:
        cut = Cut(lambda parameters: torch.optim.Adam(list(parameters.values())[::-1], lr=0.1))
        cut.step(1)
        merged, groups = cut.merged()
        assert groups == [cut.order]
        for stage, optimizer in enumerate(cut.optimizers):
            fresh = cut.build(dict(cut.parts[stage].named_parameters()))
            fresh.load_state_dict(own_optimizer_state(merged, groups, fresh, cut.names(stage)))
            assert_same_state(fresh.state_dict(), optimizer.state_dict())

    def test_named_parameters(self) -> None:
        """torch keeps the names of parameters in their group: merged, those of all stages."""
        cut = Cut(lambda parameters: torch.optim.SGD(list(parameters.items()), lr=0.1, momentum=0.9))
        cut.step(1)
        assert cut.merged()[0]["param_groups"] == cut.optimizer.state_dict()["param_groups"]

    def test_another_number_of_groups(self) -> None:
        cut = Cut(BUILDS["AdamW"])
        cut.step(1)
        merged, groups = cut.merged()
        other = torch.optim.AdamW(cut.parts[0].parameters())
        with pytest.raises(ConfigurationError, match=r"has 2 parameter groups, configure_optimizers made 1\. Resume with"):
            own_optimizer_state(merged, groups, other, cut.names(0))


class TestPlainOptimizerState:
    """Numbers for names, as an optimizer over the unsplit module writes them."""

    def groups(self, cut: Cut) -> list[dict[str, Any]]:
        return [optimizer_part(optimizer, cut.names(stage))[0] for stage, optimizer in enumerate(cut.optimizers)]

    @pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
    def test_stages_go_on_from_it(self, build: Build) -> None:
        cut = Cut(build)
        cut.step(1)
        plain = copy.deepcopy(cut.optimizer.state_dict())
        groups = group_names(plain, self.groups(cut), cut.order)
        for stage, part in enumerate(cut.parts):
            fresh = build(dict(part.named_parameters()))
            fresh.load_state_dict(own_optimizer_state(plain, groups, fresh, cut.names(stage)))
            cut.optimizers[stage] = fresh
        cut.step(2)
        assert cut.weights_agree()

    def test_names_say_in_which_order(self) -> None:
        cut = Cut(lambda parameters: torch.optim.Adam(list(parameters.items())[::-1], lr=0.1))
        cut.step(1)
        assert group_names(cut.optimizer.state_dict(), self.groups(cut), cut.order) == [cut.order[::-1]]

    def test_without_names_an_order_of_the_users_own_is_refused(self) -> None:
        cut = Cut(lambda parameters: torch.optim.Adam(list(parameters.values())[::-1], lr=0.1))
        cut.step(1)
        with pytest.raises(
            ConfigurationError, match=r"Group 0 .* order of its own \(first: \['0\.bias', '0\.weight'\]\).*named_param"
        ):
            group_names(cut.optimizer.state_dict(), self.groups(cut), cut.order)

    def test_an_order_that_no_stage_sees_shows_in_the_shapes(self) -> None:
        cut = Cut(lambda parameters: torch.optim.Adam(list(parameters.values()), lr=0.1))
        backwards = torch.optim.Adam([p for layer in reversed(cut.whole) for p in layer.parameters()], lr=0.1)
        cut.step(1, optimizer=backwards)
        plain = backwards.state_dict()
        groups = group_names(plain, self.groups(cut), cut.order)
        with pytest.raises(ConfigurationError, match=r"of 0\.weight has the shape \(2, 4\), the parameter has \(4, 3\)"):
            own_optimizer_state(plain, groups, cut.optimizers[0], cut.names(0))

    def test_other_groups(self) -> None:
        cut = Cut(BUILDS["AdamW"])
        cut.step(1)
        other = torch.optim.AdamW(cut.whole.parameters()).state_dict()
        with pytest.raises(ConfigurationError, match=r"groups of \[7\] parameters, configure_optimizers made groups of \[3, 4\]"):
            group_names(other, self.groups(cut), cut.order)


class TestSelectState:
    def setup_method(self) -> None:
        self.whole = net().state_dict()
        self.stage = nn.ModuleDict({"2": nn.LayerNorm(4)})

    def test_own_entries(self) -> None:
        own = select_state(self.whole, self.stage, list(self.whole), strict=True)
        assert set(own) == {"2.weight", "2.bias"}
        assert all(own[name] is self.whole[name] for name in own)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda state: state.pop("4.weight"), r"1 key\(s\) missing \(first: \['4\.weight'\]\), 0 unexpected"),
            (lambda state: state.update({"9.bias": torch.ones(1)}), r"0 key\(s\) missing .*1 unexpected \(first: \['9\.bias'\]\)"),
        ],
        ids=["missing", "unexpected"],
    )
    def test_strict_is_about_the_whole_module(self, change: Callable[[Any], Any], says: str) -> None:
        known = list(self.whole)
        change(self.whole)
        with pytest.raises(ConfigurationError, match=rf"does not fit ModuleDict: {says}.*Build the module"):
            select_state(self.whole, self.stage, known, strict=True)
        assert set(select_state(self.whole, self.stage, known, strict=False)) == {"2.weight", "2.bias"}

    def test_not_strict_leaves_out_what_is_missing(self) -> None:
        known = list(self.whole)
        del self.whole["2.bias"]
        assert set(select_state(self.whole, self.stage, known, strict=False)) == {"2.weight"}


class Post(Silent):
    """A wire between ranks that run one after the other."""

    rank = 0

    def __init__(self) -> None:
        super().__init__()
        self.letters: defaultdict[tuple[int, int], deque[Tensor]] = defaultdict(deque)

    def _send(self, tensor: Tensor, rank: int) -> None:
        assert tensor.is_contiguous()
        self.letters[self.rank, rank].append(tensor.clone())

    def _receive(self, tensor: Tensor, rank: int, tag: int) -> None:
        letter = self.letters[rank, self.rank].popleft()
        assert (letter.shape, letter.dtype) == (tensor.shape, tensor.dtype)
        tensor.copy_(letter)


@pytest.fixture
def post() -> Iterator[Post]:
    with installed(Post()) as wire:
        yield wire


class TestCollect:
    TENSORS: Sequence[Tensor] = (
        torch.arange(6.0).view(2, 3).t(),
        torch.tensor(7.0, requires_grad=True),
        torch.tensor([True, False]),
        torch.empty(0, 3, dtype=torch.float64),
        torch.ones(2, 2, dtype=torch.bfloat16),
        torch.tensor([2**40]),
    )

    def test_parts_of_all_stages(self, post: Post) -> None:
        mesh = Mesh(stages=3, replicas=2)
        found = []
        for post.rank in reversed(range(mesh.size)):
            stage = mesh.worker(post.rank).stage
            tensors = {f"{stage}.{index}": tensor for index, tensor in enumerate(self.TENSORS)}
            plain = {"groups": [["a"]], "numbers": [["a", "seen", stage], ["a", "lr", 0.1 + stage]]}
            found = collect(plain, tensors, speakers(mesh))
            assert found == [] or post.rank == 0
        assert not any(post.letters.values())
        assert len(found) == 3
        for stage, (plain, received) in enumerate(found):
            assert plain == {"groups": [["a"]], "numbers": [["a", "seen", stage], ["a", "lr", 0.1 + stage]]}
            assert list(received) == [f"{stage}.{index}" for index in range(len(self.TENSORS))]
            for tensor, value in zip(received.values(), self.TENSORS):
                assert tensor.dtype == value.dtype
                assert not tensor.requires_grad
                assert torch.equal(tensor, value)

    @pytest.mark.parametrize("sent", [None, [{}, {}], ({},), ({"a": 1}, {"b": 2})], ids=str)
    def test_what_is_no_part_names_its_sender(self, sent: object, monkeypatch: pytest.MonkeyPatch) -> None:
        def work(rank: int) -> object:
            return send_tree(sent, 0) if rank else collect({}, {}, [0, 1])

        with ranks(2) as world, pytest.raises(MalformedMessageError, match="Rank 1 sent no part of a checkpoint") as error:
            world.run(work)
        assert error.value.rank == 1

    @pytest.mark.parametrize(
        "plain",
        [
            {},
            {"groups": 3, "numbers": [], "options": []},
            {"groups": [["a"]], "numbers": [], "options": []},
            {"groups": [[1]], "numbers": [], "options": [{}]},
            {"groups": [["a"]], "numbers": [["a", 1]], "options": [{}]},
            {"groups": [["a"]], "numbers": [], "options": [[]]},
        ],
        ids=str,
    )
    def test_what_is_no_optimizer_state_names_its_sender(self, plain: dict[str, object]) -> None:
        with pytest.raises(MalformedMessageError, match="Rank 3 sent no optimizer state") as error:
            own_part((plain, {}), {"a"}, rank=3)
        assert error.value.rank == 3

    @pytest.mark.usefixtures("post")
    def test_one_process(self) -> None:
        assert collect({"a": 1}, {}, [0]) == [({"a": 1}, {})]

    @pytest.mark.parametrize("banned", [set(), *({Worker(s, r)} for s in range(3) for r in range(2)), {Worker(0, 0), Worker(2, 0)}])
    def test_banned_workers_are_not_asked(self, post: Post, banned: set[Worker]) -> None:
        mesh = Mesh(stages=3, replicas=2)
        for post.rank in reversed(range(mesh.size)):
            worker = mesh.worker(post.rank)
            found = collect({"of": [worker.stage, worker.replica]}, {"it": torch.tensor(post.rank)}, speakers(mesh, banned))
        assert not any(post.letters.values())
        asked = [Worker(*plain["of"]) for plain, _ in found]
        assert [worker.stage for worker in asked] == [0, 1, 2] and not set(asked) & banned
        assert [mesh.rank(worker) for worker in asked] == [int(tensors["it"]) for _, tensors in found]

    def test_of_a_stage_of_which_everybody_is_banned_there_is_still_a_part(self, post: Post) -> None:
        mesh = Mesh(stages=2, replicas=2)
        for post.rank in reversed(range(mesh.size)):
            found = collect({"rank": post.rank}, {}, speakers(mesh, {Worker(1, 0), Worker(1, 1)}))
        assert [plain["rank"] for plain, _ in found] == [2, 0]
