from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sentinel.errors import ConfigurationError, PipelineModelError
from lightning_sentinel.pipeline.results.gathering import Gathering
from tests.pipeline.ranks import ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize("together", [(0, 1), (2, 0, 3), (1,)])
def test_those_that_run_a_step_gather_and_their_gradients_go_back_to_all(together: tuple[int, ...]) -> None:
    values = {rank: torch.full((2,), float(rank + 1), requires_grad=True) for rank in together}

    def work(rank: int) -> Any:
        if rank not in together:
            return None
        gather = Gathering(lambda: together, rank, CPU, audited=False)
        found = gather({"x": values[rank], "n": rank}, sync_grads=True)
        (found["x"].square().sum() * (rank + 1)).backward()
        return found["x"].detach(), found["n"], gather(values[rank]).requires_grad

    with ranks(4) as world:
        everyone = world.run(work)
    for rank in together:
        gathered, numbers, grows = everyone[rank]
        assert gathered.tolist() == [[other + 1.0] * 2 for other in together]
        assert numbers.flatten().tolist() == list(together) and not grows
        # Of x squared, times what each rank weighs its loss with.
        assert values[rank].grad is not None
        assert values[rank].grad.tolist() == [2 * (rank + 1.0) * sum(other + 1 for other in together)] * 2


def refused(tensor: Tensor, rank: int, audited: bool = False, **options: Any) -> Any:
    return Gathering(lambda: (0, 1), rank, CPU, audited)(tensor, **options)


def test_what_cannot_be_gathered_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="with audits another worker may have to run the step again"):
        refused(torch.ones(1), 0, audited=True)
    with pytest.raises(ConfigurationError, match="Leave group out"):
        refused(torch.ones(1), 0, group="some")
    with ranks(2) as world, pytest.raises(PipelineModelError, match=r"tensors of shapes \[\(1,\), \(2,\)\]"):
        world.run(lambda rank: refused(torch.ones(rank + 1), rank))
