from __future__ import annotations

import re

from lightning_sentinel.verification import features
from lightning_sentinel.verification.features import FAMILIES, FEATURES, PUBLISHED


def test_families_make_up_the_features_in_their_order() -> None:
    assert tuple(name for family in FAMILIES.values() for name in family) == FEATURES
    assert len(set(FEATURES)) == len(FEATURES) == 18
    assert not set(FEATURES) & set(FAMILIES)


def test_the_published_distances_are_the_first_four() -> None:
    assert FEATURES[:4] == PUBLISHED == ("l1", "l2", "sign_flip_ratio", "sliced_wasserstein")


def test_every_feature_has_a_row_in_the_documentation_and_in_its_order() -> None:
    table = (features.__doc__ or "").split("=====\n", 2)[2]
    rows = re.findall(r"^``(\w+)``", table, flags=re.MULTILINE)
    assert tuple(rows) == FEATURES
