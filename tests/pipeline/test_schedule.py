from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from deepspeed.runtime.pipe import schedule as ds

from lightning_sentinel.pipeline import schedule as ours

SIZES = [(m, p) for p in (1, 2, 3, 4, 5, 7) for m in (1, 2, 3, 4, 6, 9)]
OURS = (ours.TamperActivation, ours.TamperGradient, ours.VerifyActivation, ours.VerifyGradient)
EACH_SIZE = pytest.mark.parametrize(("micro_batches", "stages"), SIZES)


def flat(kind: Any, micro_batches: int, stages: int) -> list[list[Any]]:
    """The instructions of each stage, in order."""
    return [[command for step in kind(micro_batches, stages, stage).steps() for command in step] for stage in range(stages)]


def of_kind(commands: list[Any], kind: type) -> list[int]:
    return [command.micro_batch for command in commands if type(command) is kind]


@EACH_SIZE
class TestTrain:
    def test_every_micro_batch_goes_through_every_stage(self, micro_batches: int, stages: int) -> None:
        every = list(range(micro_batches))
        for stage, commands in enumerate(flat(ours.TrainSchedule, micro_batches, stages)):
            first, last = stage == 0, stage == stages - 1
            expected = {
                ds.LoadMicroBatch: first or last,
                ds.ForwardPass: True,
                ds.BackwardPass: True,
                ds.RecvActivation: not first,
                ours.VerifyActivation: not first,
                ds.SendActivation: not last,
                ours.TamperActivation: not last,
                ds.RecvGrad: not last,
                ours.VerifyGradient: not last,
                ds.SendGrad: not first,
                ours.TamperGradient: not first,
            }
            for kind, there in expected.items():
                assert of_kind(commands, kind) == (every if there else []), kind
            assert {type(command) for command in commands} <= set(expected)

    def test_verified_right_after_receipt_and_tampered_right_before_sending(self, micro_batches: int, stages: int) -> None:
        around = [
            (ds.RecvActivation, 1, ours.VerifyActivation),
            (ds.RecvGrad, 1, ours.VerifyGradient),
            (ds.SendActivation, -1, ours.TamperActivation),
            (ds.SendGrad, -1, ours.TamperGradient),
        ]
        for commands in flat(ours.TrainSchedule, micro_batches, stages):
            for index, command in enumerate(commands):
                for kind, offset, guard in around:
                    if type(command) is kind:
                        neighbour = commands[index + offset]
                        assert type(neighbour) is guard
                        assert (neighbour.buffer_id, neighbour.micro_batch) == (command.buffer_id, command.micro_batch)

    def test_without_ours_it_is_deepspeeds(self, micro_batches: int, stages: int) -> None:
        left_out = (ds.ReduceTiedGrads, ds.ReduceGrads, ds.OptimizerStep)
        for stage in range(stages):
            mine = list(ours.TrainSchedule(micro_batches, stages, stage).steps())
            theirs = list(ds.TrainSchedule(micro_batches, stages, stage).steps())
            assert len(mine) == len(theirs)
            for my_step, their_step in zip(mine, theirs):
                assert [(type(c), c.buffer_id) for c in my_step if not isinstance(c, OURS)] == [
                    (type(c), c.buffer_id) for c in their_step if not isinstance(c, left_out)
                ]

    def test_a_run_of_all_stages(self, micro_batches: int, stages: int) -> None:
        simulate(flat(ours.TrainSchedule, micro_batches, stages))


@EACH_SIZE
class TestInference:
    def test_forward_only_and_nothing_guarded(self, micro_batches: int, stages: int) -> None:
        every = list(range(micro_batches))
        for stage, commands in enumerate(flat(ours.InferenceSchedule, micro_batches, stages)):
            first, last = stage == 0, stage == stages - 1
            expected = {
                ds.LoadMicroBatch: first or last,
                ds.ForwardPass: True,
                ds.RecvActivation: not first,
                ds.SendActivation: not last,
            }
            for kind, there in expected.items():
                assert of_kind(commands, kind) == (every if there else []), kind
            assert {type(command) for command in commands} <= set(expected)

    def test_it_is_deepspeeds(self, micro_batches: int, stages: int) -> None:
        for stage in range(stages):
            mine, theirs = (
                list(kind(micro_batches, stages, stage).steps()) for kind in (ours.InferenceSchedule, ds.InferenceSchedule)
            )
            assert [[(type(c), c.buffer_id) for c in step] for step in mine] == [
                [(type(c), c.buffer_id) for c in step] for step in theirs
            ]

    def test_a_run_of_all_stages(self, micro_batches: int, stages: int) -> None:
        simulate(flat(ours.InferenceSchedule, micro_batches, stages))


def simulate(stages: list[list[Any]]) -> None:
    """Run all stages with sends that wait for their receipt; buffers hold the number of the micro-batch whose data is in them."""
    position = [0] * len(stages)
    inputs, outputs, gradients = ([defaultdict[int, int](lambda: -1) for _ in stages] for _ in range(3))

    def at(stage: int) -> Any:
        return stages[stage][position[stage]] if position[stage] < len(stages[stage]) else None

    def advance(stage: int) -> bool:
        command = at(stage)
        if command is None:
            return False
        buffer, micro_batch = command.buffer_id, command.micro_batch
        kind = type(command)
        if kind in (ds.RecvActivation, ds.RecvGrad):
            return False  # moved on by the sender
        if kind in (ds.SendActivation, ds.SendGrad):
            forward = kind is ds.SendActivation
            peer = stage + 1 if forward else stage - 1
            answer = at(peer)
            if type(answer) is not (ds.RecvActivation if forward else ds.RecvGrad):
                return False
            assert answer.micro_batch == micro_batch, "sender and receiver mean different micro-batches"
            assert (outputs if forward else gradients)[stage][buffer] == micro_batch, "another micro-batch is in the buffer"
            (inputs if forward else outputs)[peer][answer.buffer_id] = micro_batch
            position[peer] += 1
        elif kind is ds.LoadMicroBatch:
            if stage == 0:
                inputs[stage][buffer] = micro_batch
        elif kind is ds.ForwardPass:
            assert inputs[stage][buffer] == micro_batch
            outputs[stage][buffer] = micro_batch
        elif kind is ds.BackwardPass:
            assert inputs[stage][buffer] == outputs[stage][buffer] == micro_batch
            gradients[stage][buffer] = micro_batch
        elif kind in (ours.VerifyActivation, ours.TamperGradient):
            assert inputs[stage][buffer] == micro_batch
        elif kind in (ours.VerifyGradient, ours.TamperActivation):
            assert outputs[stage][buffer] == micro_batch
        position[stage] += 1
        return True

    while any(advance(stage) for stage in range(len(stages))):
        pass
    assert position == [len(commands) for commands in stages], "the stages wait for each other for ever"
