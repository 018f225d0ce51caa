"""Fit, validate, test and predict with the usual callbacks, as in one process on the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import trainer_tasks, world


def assert_same_numbers(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name] or "nan") == pytest.approx(float(value or "nan"), abs=1e-5, nan_ok=True), name


def assert_same_predictions(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one["logits"], other["logits"], atol=1e-5, rtol=0)
        assert torch.equal(one["labels"], other["labels"]) and one["names"] == other["names"]


def test_a_run_with_all_the_usual_callbacks(tmp_path: Path) -> None:
    for name in ("mesh", "alone"):
        (tmp_path / name).mkdir()
    ranks = world.run(trainer_tasks.whole_fit, 4, str(tmp_path / "mesh"), 12)
    alone = trainer_tasks.whole_fit(str(tmp_path / "alone"), 12)
    assert alone["stopped"] > 0 and alone["log"], "the run is stopped early, and writes a log"
    assert len({row["lr-SGD"] for row in alone["log"]} - {""}) > 1, "the plateau lowers the learning rate"
    for rank in ranks:
        for name in ("epochs", "steps", "stopped", "best", "files", "profiled"):
            assert rank[name] == alone[name], name
        assert rank["best score"] == pytest.approx(alone["best score"], abs=1e-5)
        assert_same_numbers(rank["fit"], alone["fit"])
        for name in ("validate", "test"):
            for found, expected in zip(rank[name], alone[name]):
                assert_same_numbers(found, expected)
        assert_same_predictions(rank["predicted"], alone["predicted"])
    # What the logger wrote, row by row: steps and epochs, numbers and Metric objects, learning rates.
    assert len(ranks[0]["log"]) == len(alone["log"])
    for found, expected in zip(ranks[0]["log"], alone["log"]):
        assert_same_numbers(found, expected)


def test_settings_that_choose_batches() -> None:
    ranks = world.run(trainer_tasks.options, 4)
    alone = trainer_tasks.options()
    for name, expected in alone.items():
        for number, rank in enumerate(ranks):
            assert rank[name]["steps"] == expected["steps"], name
            assert_same_numbers(rank[name]["metrics"], expected["metrics"])
            for key, value in rank[name]["weights"].items():
                torch.testing.assert_close(value, expected["weights"][key], atol=1e-6, rtol=0)
            # As under DDP one process prepares the data, and all set it up.
            assert rank[name]["asked"] == [call for call in expected["asked"] if number == 0 or call != "prepare_data"]
    steps = {name: expected["steps"] for name, expected in alone.items()}
    assert steps == {
        "fast_dev_run": 2,
        "overfit_batches": 4,
        "fractions": 4,
        "max_steps": 3,
        "no time": 0,
        "accumulated": 3,
        "reloaded": 16,
        "rich": 2,
    }


def test_runs_in_turn_on_one_module() -> None:
    ranks = world.run(trainer_tasks.in_turn, 6)
    alone = trainer_tasks.in_turn()
    assert [total for total, _ in alone["summaries"]] == [1492, 1492]
    assert [rank["summaries"] for rank in ranks] == [alone["summaries"], [], [], [], [], []], "of the whole module, by rank zero"
    for number, rank in enumerate(ranks):
        assert_same_numbers(rank["before"][0], alone["before"][0])
        # Made by hand in epoch-end hooks, out of lists and sums that the steps keep.
        assert_same_numbers(rank["metrics"], alone["metrics"])
        for found, expected in zip(rank["predicted"], alone["predicted"]):
            assert_same_predictions(found, expected)
        batches, (predictions, indices) = rank["written"]
        replica = number % 2
        assert indices[0] == [list(range(22))[replica::2][k : k + 3] for k in range(0, 11, 3)]
        # Of five samples in batches of one the second replica has two, and an empty batch while the first has its third.
        assert indices[1] == [[[0], [2], [4]], [[1], [3], []]][replica]
        assert [one for _, one in batches[: 4 + 3]] == indices[0] + indices[1]
        for prediction, rows in batches[:4]:
            joined = torch.cat([batch["logits"] for batch in alone["predicted"][0]])
            torch.testing.assert_close(prediction["logits"], joined[rows], atol=1e-5, rtol=0)
        assert len(predictions) == 2
        assert (rank["nothing"] is None) == (number != 1), "who asks for predictions gets them"
        assert rank["counts"][0] == rank["counts"][1] == rank["groups"], "runs make no process groups anew"


OTHERS = [("Boring", 2), ("Images", 1), ("Images", 2), ("Compiled", 2), ("Translator", 2)]


@pytest.mark.parametrize(("name", "micro_batches"), OTHERS)
def test_modules_of_others(name: str, micro_batches: int) -> None:
    """BatchNorm sees micro-batches: what one process sees that accumulates gradients over batches of that size."""
    ranks = world.run(trainer_tasks.modules_of_others, 2, name, micro_batches)
    alone = trainer_tasks.modules_of_others(name, micro_batches)
    seen: set[str] = set()
    for rank in ranks:
        seen.update(rank["weights"])
        for key, value in rank["weights"].items():
            torch.testing.assert_close(value, alone["weights"][key], atol=1e-6, rtol=0)
        assert_same_numbers(rank["metrics"], alone["metrics"])
    assert seen == set(alone["weights"])
