from __future__ import annotations

from typing import Any, get_args

import pytest

import lightning_sentinel as ls
from lightning_sentinel.aggregation.rules import COORDINATE_WISE, WEIGHING
from lightning_sentinel.config import Aggregation
from lightning_sentinel.errors import ConfigurationError


def test_every_rule_can_be_chosen() -> None:
    assert set(get_args(Aggregation)) == {"mean", *COORDINATE_WISE, *WEIGHING}
    for name in (*COORDINATE_WISE, *WEIGHING):
        assert ls.Response(aggregation=name, tolerated=2).tolerated == 2  # type: ignore[arg-type]
    assert ls.Response().aggregation == "mean"


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"aggregation": "average"}, r"Response.aggregation='average' cannot work: it must be one of 'mean', 'trimmed_mean'"),
        (
            {"aggregation": "median", "tolerated": 0},
            "Response.tolerated=0 cannot work: it must be None or a whole number",
        ),
        ({"tolerated": 1}, "contradicts itself.*Leave tolerated out"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigurationError, match=remedy):
        ls.Response(**options)
