"""What only a GPU can show: ``make test-gpu`` runs it, skips what there are too few GPUs for, and prints a table of what it found.

That the runs themselves work is tried out on the CPU, at the end of this file, and on a device in pure Python (``tests/fakegpu``).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

import lightning_sentinel as ls
from lightning_sentinel.mesh import Mesh
from lightning_sentinel.verification.audit import tolerance
from tests.distributed import gpu_tasks, tasks, world
from tests.distributed.gpu_report import Row, report
from tests.distributed.test_parity import TOLERANCE

GPUS = torch.cuda.device_count()
CLOSE = 10 * TOLERANCE["sgd"]
HOW_CLOSE = {"bf16-mixed": 2e-2, "16-mixed": 5e-3}
needs_a_gpu = [pytest.mark.timeout(400), pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="needs a GPU")]
needs_two = [
    pytest.mark.timeout(400),
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, and there is {GPUS or 'none'}"),
]


def run(ranks: int, accelerator: str, stages: int, replicas: int, **options: Any) -> list[dict[str, Any]]:
    return world.run(partial(gpu_tasks.fit, accelerator, stages, replicas, **options), ranks, timeout=150)


def away(found: dict[str, Any], replicas: int) -> float:
    """The largest difference to the weights of one process on the CPU."""
    alone = tasks.fit_alone("sgd", gpu_tasks.STEPS, gpu_tasks.BATCH * replicas, {})["weights"]
    return max(float((value - alone[name]).abs().max()) for name, value in found["weights"].items())


def note(check: str, found: dict[str, Any], value: str) -> None:
    report.rows.append(Row(check, ", ".join(sorted(found["devices"])), found["backend"], value))


class TestOnGpus:
    pytestmark = needs_a_gpu

    def test_one_worker_gives_the_weights_of_the_cpu(self) -> None:
        (rank,) = run(1, "gpu", 1, 1, devices=1)
        difference = away(rank, 1)
        note("one worker against the CPU", rank, f"largest difference {difference:.1e}")
        assert rank["devices"] == {"cuda:0"} and difference <= CLOSE

    @pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
    def test_layers_compute_in_mixed_precision(self, precision: str) -> None:
        """Where autocast sets the flag of CUDA, in training, evaluation and audits."""
        ranks = run(4, "gpu", 2, 2, shared="cuda:0", precision=precision, audit_rate=1.0)
        dtypes = set.union(*(rank["dtypes"] for rank in ranks))
        difference = max(away(rank, 2) for rank in ranks)
        note(f"{precision}, inside a layer", ranks[0], f"{', '.join(map(str, dtypes))}; largest difference {difference:.1e}")
        assert dtypes == {{"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision]}
        assert difference <= HOW_CLOSE[precision]

    def test_four_ranks_on_one_gpu_give_the_weights_of_the_cpu(self) -> None:
        ranks = run(4, "gpu", 2, 2, shared="cuda:0")
        difference = max(away(rank, 2) for rank in ranks)
        note("four ranks on one GPU against the CPU", ranks[0], f"largest difference {difference:.1e}")
        for rank in ranks:
            assert rank["devices"] == {"cuda:0"} and "nccl" not in rank["backend"]
        assert difference <= CLOSE

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_audits_tell_rounding_from_a_lie(self, precision: str) -> None:
        """Every signal is recomputed by another rank: nobody honest is banned, and who lies by twice the tolerance is."""
        allowed = tolerance(torch.float32, {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}[precision])
        options = {"shared": "cuda:0", "precision": precision, "audit_rate": 1.0}
        honest = run(6, "gpu", 2, 3, **options)
        lying = run(6, "gpu", 2, 3, factor=1 + 2 * allowed, **options)
        banned = {worker for rank in lying for worker in rank["banned"]}
        note(f"audits, {precision}", honest[0], f"{honest[0]['audits']} honest signals match; a lie of {2 * allowed:.0e} is found")
        assert honest[0]["audits"] > 0 and not any(rank["banned"] for rank in honest)
        assert banned == {ls.Worker(1, 2)}


class TestOnTwoGpus:
    pytestmark = needs_two

    def test_the_device_is_the_one_that_was_chosen(self) -> None:
        (rank,) = run(1, "gpu", 1, 1, devices=[1])
        difference = away(rank, 1)
        note("devices=[1]", rank, f"largest difference {difference:.1e}")
        assert rank["root"] == "cuda:1" and rank["devices"] == {"cuda:1"} and difference <= CLOSE

    @pytest.mark.parametrize("transport", ["device", "host"])
    def test_two_stages_on_two_gpus_give_the_weights_of_the_cpu(self, transport: str) -> None:
        ranks = run(2, "gpu", 2, 1, devices=2, transport=transport)
        difference = max(away(rank, 1) for rank in ranks)
        note(f"two stages on two GPUs, transport={transport!r}", ranks[0], f"largest difference {difference:.1e}")
        assert {rank["root"] for rank in ranks} == {"cuda:0", "cuda:1"} and difference <= CLOSE
        assert all(("nccl" in rank["backend"]) is (transport == "device") for rank in ranks)


def test_the_runs_work_without_a_gpu() -> None:
    """On the CPU: what they return is what the tests above look at, and the table has a row for each note."""
    (rank,) = run(1, "cpu", 1, 1, devices=1)
    assert away(rank, 1) <= CLOSE and rank["devices"] == {"cpu"} and rank["dtypes"] == {torch.float32}
    assert rank["root"] == "cpu" and "nccl" not in rank["backend"] and rank["audits"] == 0 and not rank["banned"]
    table = report.table(
        [Row("a check", "cuda:0", "gloo", f"largest difference {math.pi:.1e}"), Row("another", "cuda:1", "nccl", "")]
    )
    assert [line.split("  ")[0] for line in table] == ["check", "a check", "another"]
    assert "largest difference 3.1e+00" in table[1] and table[1].index("cuda:0") == table[2].index("cuda:1")


def test_a_lie_is_told_without_random_numbers() -> None:
    guilty, honest, signal = ls.Worker(1, 2), ls.Worker(1, 1), torch.ones(2)
    liar = gpu_tasks.Liar(Mesh(2, 3), guilty, 2.0, lies_from=3)
    told = [liar.tamper(signal, worker, ls.Direction.GRADIENT, step, 0) for worker in (guilty, honest) for step in (2, 3)]
    assert [float(one[0]) for one in told] == [1.0, 2.0, 1.0, 1.0]
