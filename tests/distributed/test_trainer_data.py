"""Who reads data, and what happens when replicas have different amounts of it."""

from __future__ import annotations

import pytest
import torch

from lightning_sentinel.mesh import Worker
from tests.distributed import tasks, trainer_data_tasks, world
from tests.distributed.test_trainer_loop import assert_same_numbers, assert_same_predictions


def test_the_ends_read_and_hooks_see_what_they_see_in_one_process() -> None:
    ranks = world.run(trainer_data_tasks.read_by_the_ends, 6, 3)
    alone = trainer_data_tasks.read_by_the_ends(3)
    for number, rank in enumerate(ranks):
        replica, in_the_middle = number % 2, number in (2, 3)
        assert rank["reads"] == [0 if in_the_middle else reads // 2 for reads in alone["reads"]]
        assert_same_numbers(rank["metrics"], alone["metrics"])
        for found, expected in zip(rank["test"], alone["test"]):
            assert_same_numbers(found, expected)
        for key, value in rank["weights"].items():
            torch.testing.assert_close(value, alone["weights"][key], atol=1e-6, rtol=0)
        halves = [[(shape[0] // 2, *shape[1:]) for shape in batch] for batch in alone["shapes"]]
        assert rank["shapes"] == halves, "batches of a middle stage look like those that the others read"
        for found, expected in zip(rank["outputs"]["train"], alone["outputs"]["train"]):
            torch.testing.assert_close(found["logits"], expected["logits"][replica::2], atol=1e-5, rtol=0)
            assert torch.equal(found["labels"], expected["labels"][replica::2])
            assert found["note"] == expected["note"]
            # The loss is that of the whole batch; of other numbers a replica has its own.
            assert float(found["loss"]) == pytest.approx(float(expected["loss"]), abs=1e-5)
        for (index, found), (other, expected) in zip(rank["outputs"]["validation"], alone["outputs"]["validation"]):
            assert index == other
            rows = expected["logits"][replica::2]
            torch.testing.assert_close(found["logits"][: len(rows)], rows, atol=1e-5, rtol=0)
    for name in ("train", "validation"):
        assert all(len(rank["outputs"][name]) == len(alone["outputs"][name]) for rank in ranks)
    means = [rank["outputs"]["train"][0]["mean"] for rank in ranks[:2]]
    assert sum(means) / 2 == pytest.approx(alone["outputs"]["train"][0]["mean"], abs=1e-5)


@pytest.mark.parametrize("verified", [False, True])
def test_replicas_with_different_numbers_of_batches(verified: bool) -> None:
    """Of five batches the first replica has three and the second two; each of its own length and size."""
    ranks = world.run(trainer_data_tasks.uneven_replicas, 6, verified)
    alone = trainer_data_tasks.uneven_replicas(False)
    labels = torch.cat([batch["labels"] for batch in alone["predicted"]])
    sizes = [4, 4, 2, 4, 1]
    by_replica = [[labels[sum(sizes[:k]) : sum(sizes[: k + 1])] for k in range(replica, 5, 2)] for replica in (0, 1)]
    for number, rank in enumerate(ranks):
        # Two epochs of two steps: the third batch of the first replica has no partner.
        assert rank["steps"] == 4
        assert rank["shapes"] == alone["shapes"][number % 2 : 4 : 2] * 2
        # Evaluation goes on with the replica that has a third batch, and every sample counts once.
        assert rank["validated"] == 6
        assert_same_numbers(rank["test"][0], ranks[0]["test"][0])
        found = [batch["labels"] for batch in rank["predicted"]]
        expected = [torch.cat([part[k] for part in by_replica if k < len(part)]) for k in range(3)]
        assert [one.tolist() for one in found] == [one.tolist() for one in expected]
        correct = sum(int((batch["logits"].argmax(-1) == batch["labels"]).sum()) for batch in rank["predicted"])
        assert rank["test"][0]["test_accuracy"] == pytest.approx(correct / sum(sizes), abs=1e-6)
        # Of three batches the second replica has one, and its hooks get one without samples then.
        last = [[(2, 6, 12), (2,)], [(0, 6, 12), (0,)]][number % 2]
        assert rank["by module"]["given"] == [[(4, 6, 12), (4,)]] * 2 + [last] * 2
        assert_same_numbers(rank["by module"]["metrics"], alone["by module"]["metrics"])
    assert_same_predictions(ranks[2]["predicted"], ranks[0]["predicted"])


@pytest.mark.parametrize(("workers", "seeded"), [(0, False), (1, True)])
def test_random_augmentation_is_the_same_on_both_ends(workers: int, seeded: bool) -> None:
    """The difference between what went in at the first stage and what the last stage has read; replicas draw for themselves."""
    ranks = world.run(trainer_data_tasks.augmented, 4, workers, seeded)
    for rank in ranks:
        assert rank["difference"] == 0.0
        assert 0.3 < rank["drawn"] < 0.7, "something was drawn"


def test_ends_that_read_different_data_are_told() -> None:
    _, failures = world.outcomes(trainer_data_tasks.ends_that_differ, 2)
    assert {failure.kind for failure in failures.values()} == {"PipelineModelError"} and len(failures) == 2
    for failure in failures.values():
        assert "first stage of replica 0 read a batch of 3 sample(s), the last one 4 sample(s)" in failure.message


@pytest.mark.parametrize("audit_rate", [None, 0.1])
def test_short_batches_and_empty_ones_after_a_ban(audit_rate: float | None) -> None:
    """The last batch of an epoch has fewer micro-batches; of the last of a prediction one replica has nothing."""
    ranks = world.run(trainer_data_tasks.short_batches, 6, "process", audit_rate)
    virtual = trainer_data_tasks.short_batches("virtual", audit_rate)
    labels = tasks.tokens(5).tensors[1].tolist()
    for found in (*ranks, virtual):
        # Of two workers an audit cannot tell which one lies: it is left out of every step anew.
        assert found["banned"] == ([Worker(0, 1)] if audit_rate is None else [])
        assert found["labels"] == [labels[:4], labels[4:]]
    for rank in ranks:
        assert_same_numbers(rank["metrics"], ranks[0]["metrics"])
