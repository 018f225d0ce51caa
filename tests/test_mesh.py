from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.errors import ConfigurationError, SentinelError
from lightning_sentinel.mesh import Boundary, Direction, Mesh, Worker

A, G = Direction.ACTIVATION, Direction.GRADIENT

repeatable = settings(derandomize=True, deadline=None, max_examples=100)
sizes = st.integers(1, 12)


# --- Ranks


def test_ranks_run_over_replicas_first_and_begin_where_steps_run_whole() -> None:
    mesh = Mesh(stages=3, replicas=2)
    expected = [(2, 0), (2, 1), (1, 0), (1, 1), (0, 0), (0, 1)]
    assert [(worker.stage, worker.replica) for worker in mesh.workers] == expected
    assert list(mesh) == list(mesh.workers)
    assert [mesh.rank(worker) for worker in mesh] == list(range(6))
    assert [list(mesh.stage_ranks(stage)) for stage in range(3)] == [[4, 5], [2, 3], [0, 1]]
    assert [list(mesh.pipeline_ranks(replica)) for replica in range(2)] == [[4, 2, 0], [5, 3, 1]]


@repeatable
@given(stages=sizes, replicas=sizes)
def test_ranks_and_workers_are_each_others_inverse(stages: int, replicas: int) -> None:
    mesh = Mesh(stages, replicas)
    assert mesh.size == len(mesh.workers) == len(set(mesh.workers)) == stages * replicas
    for rank in range(mesh.size):
        worker = mesh.worker(rank)
        assert worker in mesh and mesh.rank(worker) == rank
        assert rank in mesh.stage_ranks(worker.stage) and rank in mesh.pipeline_ranks(worker.replica)
    for parts in (map(mesh.stage_ranks, range(stages)), map(mesh.pipeline_ranks, range(replicas))):
        assert sorted(rank for part in parts for rank in part) == list(range(mesh.size))


@pytest.mark.parametrize("stranger", [Worker(3, 0), Worker(0, 2), Worker(-1, 0), Worker(0, -1)])
def test_a_stranger_has_no_rank(stranger: Worker) -> None:
    mesh = Mesh(stages=3, replicas=2)
    assert stranger not in mesh
    with pytest.raises(ConfigurationError, match=r"not in the mesh.*stages 0\.\.2 and replicas 0\.\.1") as caught:
        mesh.rank(stranger)
    assert str(stranger) in str(caught.value)


# --- Boundaries


def test_boundaries_are_the_activations_then_the_gradients() -> None:
    assert Mesh(3, 2).boundaries == (Boundary(0, A), Boundary(1, A), Boundary(0, G), Boundary(1, G))
    assert Mesh(1, 4).boundaries == ()


@repeatable
@given(stages=sizes, replicas=sizes)
def test_every_cut_is_crossed_once_each_way(stages: int, replicas: int) -> None:
    boundaries = Mesh(stages, replicas).boundaries
    expected = [(s, s + 1) for s in range(stages - 1)] + [(s + 1, s) for s in range(stages - 1)]
    assert [(boundary.sender, boundary.receiver) for boundary in boundaries] == expected
    assert len({boundary.name for boundary in boundaries}) == len(boundaries)


@repeatable
@given(stages=sizes, replicas=sizes)
def test_what_a_stage_sends_follows_from_what_it_received_in_the_same_direction(stages: int, replicas: int) -> None:
    mesh = Mesh(stages, replicas)
    for boundary in mesh.boundaries:
        before = mesh.before(boundary)
        starts = boundary.sender == (0 if boundary.direction is A else stages - 1)
        assert (before is None) == starts
        if before is not None:
            assert before in mesh.boundaries and before.direction is boundary.direction and before.receiver == boundary.sender


@pytest.mark.parametrize(
    ("boundary", "name"),
    [(Boundary(0, A), "stage0/activation"), (Boundary(0, G), "stage1/gradient"), (Boundary(4, G), "stage5/gradient")],
)
def test_a_boundary_is_named_after_its_sender(boundary: Boundary, name: str) -> None:
    assert boundary.name == name


def test_directions_and_workers_read_well() -> None:
    assert [str(direction) for direction in Direction] == ["activation", "gradient"]
    assert Direction("gradient") is G
    assert str(Worker(stage=2, replica=7)) == "worker (stage 2, replica 7)"


# --- The mesh of a run


@pytest.mark.parametrize(("stages", "replicas"), [(0, 1), (1, 0), (-2, 3), (0, 0)])
def test_a_mesh_has_workers(stages: int, replicas: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"{stages} stages x {replicas} replicas.*at least 1"):
        Mesh(stages, replicas)


@pytest.mark.parametrize(
    ("world_size", "stages", "replicas"),
    [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 2, 2), (5, 5, 1), (6, 3, 2), (8, 4, 2), (9, 3, 3), (12, 4, 3), (16, 4, 4), (128, 16, 8)],
)
def test_a_world_is_as_square_as_it_can_be(world_size: int, stages: int, replicas: int) -> None:
    assert Mesh.for_world(world_size) == Mesh(stages, replicas)


@repeatable
@given(world_size=st.integers(1, 300))
def test_no_mesh_of_a_world_is_squarer(world_size: int) -> None:
    mesh = Mesh.for_world(world_size)
    assert mesh.size == world_size and mesh.stages >= mesh.replicas
    assert not any(world_size % other == 0 for other in range(mesh.replicas + 1, math.isqrt(world_size) + 1))


@repeatable
@given(stages=sizes, replicas=sizes)
def test_one_of_the_two_follows_from_the_other(stages: int, replicas: int) -> None:
    world_size, mesh = stages * replicas, Mesh(stages, replicas)
    assert Mesh.for_world(world_size, stages=stages) == mesh
    assert Mesh.for_world(world_size, replicas=replicas) == mesh
    assert Mesh.for_world(world_size, stages=stages, replicas=replicas) == mesh


@pytest.mark.parametrize(
    ("name", "world_size", "value"), [("stages", 6, 4), ("replicas", 6, 4), ("stages", 2, 3), ("replicas", 5, 2)]
)
def test_a_number_that_does_not_divide_the_world(name: str, world_size: int, value: int) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Mesh.for_world(world_size, **{name: value})
    message = str(caught.value)
    assert f"{name}={value}" in message and f"{world_size} processes" in message
    assert f"multiple of {value}" in message
    assert str([divisor for divisor in range(1, world_size + 1) if world_size % divisor == 0]) in message


@pytest.mark.parametrize(("world_size", "stages", "replicas"), [(6, 3, 4), (4, 2, 1), (8, 4, 4)])
def test_numbers_that_do_not_make_up_the_world(world_size: int, stages: int, replicas: int) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Mesh.for_world(world_size, stages, replicas)
    message = str(caught.value)
    assert f"stages={stages}" in message and f"replicas={replicas}" in message
    assert f"this run has {world_size}" in message and f"devices={stages * replicas}" in message


@pytest.mark.parametrize("name", ["stages", "replicas"])
@pytest.mark.parametrize("value", [0, -1, -4])
@pytest.mark.parametrize("other", [None, 2])
def test_a_number_below_one_is_refused_by_name(name: str, value: int, other: int | None) -> None:
    settings_ = {"stages": other, "replicas": other, name: value}
    with pytest.raises(ConfigurationError, match=rf"{name}={value}\b|{value} {name}\b"):
        Mesh.for_world(4, **settings_)


def test_a_wrong_setting_is_a_value_error_of_ours() -> None:
    assert issubclass(ConfigurationError, SentinelError) and issubclass(ConfigurationError, ValueError)


@pytest.mark.parametrize("processes", range(1, 9))
@pytest.mark.parametrize(("stages", "replicas"), [(None, None), (2, None), (3, None), (None, 2), (2, 2), (3, 1)])
def test_the_largest_mesh_is_the_largest_that_can_be_filled(processes: int, stages: int | None, replicas: int | None) -> None:
    sizes = range(1, processes + 1)
    possible = [Mesh(p, d) for p in sizes for d in sizes if p * d <= processes and stages in (None, p) and replicas in (None, d)]
    if not possible:
        with pytest.raises(ConfigurationError, match=f"processes, and there are {processes}"):
            Mesh.largest(processes, stages, replicas)
        return
    mesh = Mesh.largest(processes, stages, replicas)
    assert mesh in possible and mesh.size == max(each.size for each in possible)


@pytest.mark.parametrize("given", [{"stages": 0}, {"replicas": -1}, {"stages": 2, "replicas": 0}])
def test_the_largest_mesh_of_nothing_is_refused(given: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError):
        Mesh.largest(4, **given)
