from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Worker
from lightning_sentinel.verification import Ledger

W, OTHER = Worker(1, 0), Worker(2, 1)


def record(ledger: Ledger, pattern: str, worker: Worker = W, start: int = 0) -> list[int]:
    """Enter one step for each letter, and return the steps that ban: x suspect, o verified and no suspect, - not verified."""
    bans = []
    for step, letter in enumerate(pattern, start):
        suspects = {worker} if letter == "x" else set()
        flagged = Counter({worker: 2}) if letter == "x" else Counter()
        banned = ledger.record(step, flagged, suspects, verified=set() if letter == "-" else {worker})
        assert banned in ([], [worker])
        bans += [step] * len(banned)
    return bans


@pytest.mark.parametrize(
    ("pattern", "banned_at"),
    [
        ("xxx", [2]),
        ("xxoxx", []),
        ("xxoxxx", [5]),
        ("oooxxx", [5]),
        ("xx-x", [3]),
        ("x--x-x", [5]),
        ("x-o-xx", []),
        ("xxxxxx", [2]),
        ("xxxoooxxx", [2]),
        ("---", []),
        ("", []),
    ],
)
def test_a_ban_follows_consecutive_steps_as_a_suspect(pattern: str, banned_at: list[int]) -> None:
    ledger = Ledger(ban_after=3)
    assert record(ledger, pattern) == banned_at
    assert ledger.banned == (frozenset({W}) if banned_at else frozenset())
    assert list(ledger.banned_at.values()) == banned_at
    assert ledger.flags[W] == ledger.total_flags == 2 * pattern.count("x")


def test_a_ban_on_the_first_step() -> None:
    assert record(Ledger(ban_after=1), "ox") == [1]


def test_none_bans_nobody() -> None:
    ledger = Ledger(ban_after=None)
    assert record(ledger, "x" * 100) == []
    assert not ledger.banned and ledger.streaks[W] == 100 and ledger.total_flags == 200


def test_flags_alone_make_no_streak() -> None:
    ledger = Ledger(ban_after=1)
    assert ledger.record(0, Counter({W: 3}), suspects=set(), verified={W}) == []
    assert ledger.flags == Counter({W: 3}) and not ledger.streaks[W]


def test_bans_come_in_order() -> None:
    workers = {Worker(2, 1), Worker(0, 1), Worker(2, 0), Worker(0, 0)}
    banned = Ledger(ban_after=1).record(4, Counter(workers), suspects=workers, verified=workers)
    assert banned == [Worker(0, 0), Worker(0, 1), Worker(2, 0), Worker(2, 1)]


def test_workers_have_streaks_of_their_own() -> None:
    ledger = Ledger(ban_after=3)
    both = {W, OTHER}
    for step, suspects in enumerate([both, {W}, both, both]):
        ledger.record(step, Counter(suspects), suspects, verified=both)
    assert ledger.banned_at == {W: 2}
    assert ledger.streaks[OTHER] == 2


def longest_run(pattern: str) -> int:
    return max(map(len, pattern.replace("-", "").split("o")))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(pattern=st.text("xo-", max_size=20), ban_after=st.integers(1, 5), cut=st.integers(0, 20))
def test_saving_and_loading_between_any_two_steps_changes_nothing(pattern: str, ban_after: int, cut: int) -> None:
    whole, first, second = (Ledger(ban_after) for _ in range(3))
    record(whole, pattern)
    record(first, pattern[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    record(second, pattern[cut:], start=min(cut, len(pattern)))
    assert second.state_dict() == whole.state_dict()
    assert (W in whole.banned) == (longest_run(pattern) >= ban_after)


def plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and plain(entry) for key, entry in value.items())
    return all(map(plain, value)) if isinstance(value, (list, tuple)) else type(value) is int


def test_the_state_is_plain() -> None:
    ledger = Ledger(ban_after=2)
    record(ledger, "xxx")
    record(ledger, "x", worker=OTHER, start=3)
    state = ledger.state_dict()
    assert plain(state)
    assert state == {
        "flags": [[1, 0, 6], [2, 1, 2]],
        "streaks": [[1, 0, 3], [2, 1, 1]],
        "banned_at": [[1, 0, 1]],
        "exonerated": [],
        "audits": 0,
        "hosts": [],
    }


def test_loading_replaces_what_was_known() -> None:
    ledger = Ledger(ban_after=1)
    record(ledger, "x")
    ledger.load_state_dict(Ledger().state_dict())
    assert not ledger.banned and not ledger.flags and ledger.total_flags == 0
    assert ledger.ban_after == 1
    assert record(ledger, "x") == [0]


# --- Audits


def test_one_signal_that_does_not_match_bans() -> None:
    ledger = Ledger(ban_after=5)
    assert ledger.record_audits(3, audits=4, flagged=Counter({OTHER: 1, W: 2}), exonerated=Counter({Worker(0, 0): 3})) == [W, OTHER]
    assert ledger.banned_at == {W: 3, OTHER: 3} and ledger.flags == {W: 2, OTHER: 1}
    assert ledger.record_audits(4, audits=2, flagged=Counter({W: 1}), exonerated=Counter()) == []
    assert (ledger.audits, ledger.banned_at[W], ledger.total_flags) == (6, 3, 4)


def test_exonerated_flags_do_not_count_as_flags_and_ban_nobody() -> None:
    ledger = Ledger(ban_after=1)
    for step in range(9):
        assert ledger.record_audits(step, audits=1, flagged=Counter(), exonerated=Counter({W: 1})) == []
    assert (ledger.total_flags, ledger.exonerated, ledger.audits, ledger.banned) == (0, {W: 9}, 9, frozenset())


def test_audits_of_a_run_that_bans_nobody_are_counted_only() -> None:
    ledger = Ledger(ban_after=None)
    assert ledger.record_audits(0, audits=1, flagged=Counter({W: 1}), exonerated=Counter()) == []
    assert not ledger.banned and ledger.flags == {W: 1} and ledger.audits == 1


def test_a_ban_is_entered_once() -> None:
    ledger = Ledger()
    assert ledger.ban(3, [OTHER, W]) == [W, OTHER]
    assert ledger.ban(5, [W]) == [] and ledger.banned_at[W] == 3


def test_audits_are_saved_and_older_states_load_without_them() -> None:
    ledger, loaded = Ledger(), Ledger()
    ledger.record_audits(3, audits=4, flagged=Counter({W: 1}), exonerated=Counter({OTHER: 2}))
    loaded.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert loaded == ledger and plain(ledger.state_dict())
    older = {name: entries for name, entries in ledger.state_dict().items() if name not in ("audits", "exonerated")}
    loaded.load_state_dict(older)
    assert (loaded.audits, loaded.exonerated, loaded.banned) == (0, {}, {W})


def test_an_exported_ledger_names_the_banned_and_anything_else_is_refused(tmp_path: Path) -> None:
    ledger, path = Ledger(ban_after=2), tmp_path / "ledger.json"
    ledger.export(path)
    assert Ledger.banned_in(path) == []
    ledger.ban(5, [Worker(2, 1), Worker(0, 3)])
    ledger.export(path)
    assert Ledger.banned_in(path) == [Worker(0, 3), Worker(2, 1)] and list(tmp_path.iterdir()) == [path]
    for text in ("", "[]", '{"banned": [{"stage": 1}]}', '{"banned": 3}'):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=r"ledger.json is not a ledger .*Ledger.export"):
            Ledger.banned_in(path)
    with pytest.raises(ConfigurationError, match="FileNotFoundError"):
        Ledger.banned_in(tmp_path / "none.json")
