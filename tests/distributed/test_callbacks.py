"""Callbacks of Lightning that interfere with a training do what they do in one process."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.distributed import callback_tasks, world


def test_weights_steps_and_checkpoints_are_those_of_one_process(tmp_path: Path) -> None:
    names = list(callback_tasks.CALLBACKS)
    (tmp_path / "alone").mkdir()
    alone = dict(zip(names, callback_tasks.train(names, str(tmp_path / "alone"))))
    for rank in world.run(callback_tasks.train, 4, names, str(tmp_path)):
        for name, found in zip(names, rank):
            assert found["steps"] == alone[name]["steps"], name
            for parameter, value in found["weights"].items():
                assert (value - alone[name]["weights"][parameter]).abs().max() <= 1e-6, (name, parameter)
    assert {name: run["steps"] for name, run in alone.items()} == {"unfreezing": 10, "accumulation": 7, "finder": 16, "clock": 3}
    rates = {}
    for name in names:
        found, expected = (torch.load(at / f"{name}.ckpt", weights_only=True) for at in (tmp_path, tmp_path / "alone"))
        torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=0, atol=1e-6)
        (state,), (other,) = found["optimizer_states"], expected["optimizer_states"]
        # Also where only one stage has got another group of parameters.
        assert len(state["state"]) == len(other["state"])
        rates[name] = [group["lr"] for group in other["param_groups"]]
        assert [group["lr"] for group in state["param_groups"]] == rates[name]
    assert rates["unfreezing"] == [callback_tasks.Module.lr, 0.05]
    assert rates["finder"] != [callback_tasks.Module.lr]
