from __future__ import annotations

import dataclasses
import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.trust.digests import digest_of
from lightning_sentinel.trust.evidence import LIED, MATCHES, OUTCOMES, Recomputation, finding_of
from lightning_sentinel.verification.outcomes import Outcome
from tests.trust.cases import SHA
from tests.trust.statements import DIGESTS, digest

NUMBERS = st.floats(min_value=0, allow_nan=False)
RECOMPUTATIONS = st.builds(Recomputation, DIGESTS, NUMBERS, NUMBERS)


def test_outcomes_are_those_of_audits() -> None:
    assert tuple(outcome.name.lower().replace("_", " ") for outcome in Outcome) == OUTCOMES
    assert [outcome.value for outcome in Outcome] == list(range(len(OUTCOMES)))
    assert (MATCHES, LIED) == (Outcome.MATCHES, Outcome.LIED)


def test_the_layout_of_a_recomputation() -> None:
    found = Recomputation(digest("a signal"), 0.8, 1e-3)
    encoded = b"sentrec\x01" + struct.pack(">dd", 0.8, 1e-3) + b"\x01" + digest("a signal").value
    assert finding_of(found, SHA) == digest_of(encoded, SHA)
    assert finding_of(None, SHA) == digest_of(b"", SHA)


@settings(deadline=None)
@given(RECOMPUTATIONS, RECOMPUTATIONS)
def test_a_finding_is_of_all_that_was_found(one: Recomputation, other: Recomputation) -> None:
    assert (finding_of(one, SHA) == finding_of(other, SHA)) == (one.encode() == other.encode())
    assert (one.encode() == other.encode()) == (one == other and str(one) == str(other))
    for field in ("error", "tolerance"):
        changed = dataclasses.replace(one, **{field: getattr(one, field) + 1.0})
        assert (finding_of(changed, SHA) == finding_of(one, SHA)) == (changed == one)
