from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import pytest
import torch
from torch import Tensor

from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.verification.contributions import Refusals

STAGES = 3


def said(replicas: int, accused: int, count: float, by: Collection[int], stage: int = 1) -> Tensor:
    """How often each worker has seen each of its stage add what is not finite: so often ``accused``, by those of ``by``."""
    words = torch.zeros(STAGES, replicas, replicas)
    for speaker in by:
        words[stage, speaker, accused] = count
    return words


@pytest.mark.parametrize(
    ("replicas", "by", "banned", "believed"),
    [
        (2, [0], [], True),
        (3, [0, 1], [], True),
        (3, [0], [], False),
        (5, [0, 1], [], False),
        (5, [0, 1, 2], [], True),
        # Nobody speaks for itself, and who is banned for nobody.
        (3, [2], [], False),
        (5, [0, 1], [3], True),
        (5, [0, 3], [3], False),
        (1, [0], [], False),
    ],
)
def test_what_most_of_the_others_say_is_believed(replicas: int, by: list[int], banned: list[int], believed: bool) -> None:
    accused = replicas - 1
    words = said(replicas, accused, 2.0, by)
    news = Refusals(Mesh(STAGES, replicas)).news(words, {Worker(1, replica) for replica in banned})
    assert news == (Counter({Worker(1, accused): 2}) if believed else Counter())


def test_what_is_known_is_no_news_and_a_worker_that_goes_on_is() -> None:
    refusals = Refusals(Mesh(STAGES, 4))
    found = [refusals.news(said(4, 1, count, [0, 2, 3]), ()) for count in (0.0, 1.0, 1.0, 4.0, 3.0, 4.0)]
    assert [news[Worker(1, 1)] for news in found] == [0, 1, 0, 3, 0, 0]


def test_a_stage_whose_workers_all_do_has_diverged_and_blames_nobody() -> None:
    refusals = Refusals(Mesh(STAGES, 3))
    words = torch.zeros(STAGES, 3, 3)
    words[1] = 1.0
    assert not refusals.news(words, ())
    # Of those that are left all do.
    words[1, :2, :2] = 2.0
    assert not refusals.news(words, {Worker(1, 2)})
    words[1, :, 0] = 3.0
    assert refusals.news(words, ()) == {Worker(1, 0): 1}


def test_of_those_that_say_different_numbers_the_one_that_most_have_seen_counts() -> None:
    words = torch.zeros(STAGES, 5, 5)
    for speaker, count in enumerate((1e6, 3.0, 2.0, 0.0)):
        words[0, speaker, 4] = count
    assert Refusals(Mesh(STAGES, 5)).news(words, ()) == {Worker(0, 4): 2}
