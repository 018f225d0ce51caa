from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.verification import Ledger
from lightning_sentinel.verification.majority import most_bans

W, OTHER = Worker(1, 0), Worker(2, 1)
MESH = Mesh(stages=3, replicas=5)


def record(ledger: Ledger, pattern: str, worker: Worker = W, start: int = 0) -> list[int]:
    """Enter one step for each letter, and return the steps that ban: x suspect, o verified and no suspect, - not verified."""
    bans = []
    for step, letter in enumerate(pattern, start):
        suspects = {worker} if letter == "x" else set()
        flagged = Counter({worker: 2}) if letter == "x" else Counter()
        banned = ledger.record(step, flagged, suspects, verified=set() if letter == "-" else {worker}, mesh=MESH)
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
    assert not ledger.banned and ledger.streaks[W].steps == 100 and ledger.total_flags == 200


def test_flags_alone_make_no_streak() -> None:
    ledger = Ledger(ban_after=1)
    assert ledger.record(0, Counter({W: 3}), suspects=set(), verified={W}, mesh=MESH) == []
    assert ledger.flags == Counter({W: 3}) and not ledger.streaks


def test_bans_come_in_order() -> None:
    workers = {Worker(2, 1), Worker(0, 1), Worker(2, 0), Worker(0, 0)}
    banned = Ledger(ban_after=1).record(4, Counter(workers), suspects=workers, verified=MESH, mesh=MESH)
    assert banned == [Worker(0, 0), Worker(0, 1), Worker(2, 0), Worker(2, 1)]


def test_workers_have_streaks_of_their_own() -> None:
    ledger = Ledger(ban_after=3)
    both = {W, OTHER}
    for step, suspects in enumerate([both, {W}, both, both]):
        ledger.record(step, Counter(suspects), suspects, verified=both, mesh=MESH)
    assert ledger.banned_at == {W: 2}
    assert ledger.streaks[OTHER].steps == 2


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
    return all(map(plain, value)) if isinstance(value, (list, tuple)) else type(value) in (int, float, type(None))


def test_the_state_is_plain() -> None:
    ledger = Ledger(ban_after=2)
    record(ledger, "xxx")
    record(ledger, "x", worker=OTHER, start=3)
    state = ledger.state_dict()
    assert plain(state)
    assert state == {
        "flags": [[1, 0, 6], [2, 1, 2]],
        "banned_at": [[1, 0, 1]],
        "exonerated": [],
        "strikes": [],
        "refuted": [],
        "refuted_at": [],
        "muted": [],
        "spared": [],
        "suspects": [[1, 0, [3, 0, []]], [2, 1, [1, 0, []]]],
        "habits": [[1, 0, 2.8525, 2.8525], [2, 1, 1.0, 1.0]],
        "shuffled_at": 4,
        "audits": 0,
        "hosts": [],
        "keys": [],
        "contradicted": [],
        "evidence": [],
    }


class TestContradictions:
    MESH = Mesh(3, 4)
    LIAR = Worker(1, 2)

    def told(self, *partners: Worker, forgers: tuple[Worker, ...] = (), ban_after: int | None = 5) -> tuple[Ledger, list[Worker]]:
        """The ledger after a step for each of these partners of the liar, and whom it has banned."""
        ledger = Ledger(ban_after)
        banned = [
            one
            for step, other in enumerate(partners)
            for one in ledger.record_contradictions(step, [(self.LIAR, other)], (), self.MESH)
        ]
        return ledger, banned + ledger.record_contradictions(9, [], forgers, self.MESH)

    def test_one_is_no_proof_and_gives_both_other_neighbours(self) -> None:
        ledger, banned = self.told(Worker(0, 0), Worker(0, 0), Worker(2, 1))
        assert not banned
        assert ledger.order(3) == 3 and ledger.order(2) is None

    def test_more_of_one_stage_than_can_lie_there_are(self) -> None:
        assert self.told(Worker(0, 0), Worker(0, 3))[1] == [self.LIAR]

    def test_of_two_live_workers_nobody_can_tell(self) -> None:
        ledger = Ledger()
        ledger.ban(0, [Worker(0, 1), Worker(0, 2)])
        for step, other in enumerate((Worker(0, 0), Worker(0, 3))):
            assert not ledger.record_contradictions(step, [(self.LIAR, other)], (), self.MESH)

    def test_who_contradicted_liars_alone_is_none_however_few_are_left_of_their_stage(self) -> None:
        ledger, mesh, honest = Ledger(), Mesh(3, 5), Worker(2, 0)
        liars = [Worker(1, 0), Worker(1, 3)]
        for step, replica in enumerate(range(3)):
            assert set(ledger.record_contradictions(step, [(liar, Worker(0, replica)) for liar in liars], (), mesh)) == (
                set(liars) if step == 2 else set()
            )
        ledger.contradicted[honest] = set(liars)
        assert ledger.record_contradictions(3, [(Worker(1, 1), honest)], (), mesh) == []
        assert ledger.record_contradictions(4, [(Worker(1, 2), honest)], (), mesh) == [honest]

    def test_whose_word_nobody_signed_is_banned_at_once_where_anybody_is(self) -> None:
        assert self.told(forgers=(self.LIAR,))[1] == [self.LIAR]
        assert not self.told(Worker(0, 0), Worker(0, 3), forgers=(self.LIAR,), ban_after=None)[1]

    def test_they_are_kept(self) -> None:
        ledger, _ = self.told(Worker(0, 0))
        again = Ledger()
        again.load_state_dict(ledger.state_dict())
        assert again.contradicted == {self.LIAR: {Worker(0, 0)}, Worker(0, 0): {self.LIAR}}


def test_loading_replaces_what_was_known() -> None:
    ledger = Ledger(ban_after=1)
    record(ledger, "x")
    ledger.load_state_dict(Ledger().state_dict())
    assert not ledger.banned and not ledger.flags and ledger.total_flags == 0
    assert ledger.ban_after == 1
    assert record(ledger, "x") == [0]


# --- Audits


def audited(ledger: Ledger, step: int, *guilty: Worker, mesh: Mesh = MESH, outvoted: Collection[Worker] = ()) -> list[Worker]:
    return ledger.record_audits(step, 4, Counter(guilty), Counter(), set(guilty), outvoted, mesh)


@pytest.mark.parametrize(("replicas", "banned_at"), [(2, None), (3, 4), (4, 4), (5, 3), (6, 3)])
def test_how_often_a_worker_must_be_found_to_lie_depends_on_how_many_can_tell(replicas: int, banned_at: int | None) -> None:
    ledger, mesh = Ledger(ban_after=5), Mesh(3, replicas)
    for step in (3, 4, 9):
        assert audited(ledger, step, W, W, mesh=mesh) == ([W] if step == banned_at else [])
    assert ledger.banned_at == ({} if banned_at is None else {W: banned_at}) and ledger.flags == {W: 6}


def test_of_a_stage_with_bans_those_that_are_left_count() -> None:
    ledger = Ledger()
    assert audited(ledger, 3, Worker(1, 4)) == [Worker(1, 4)]
    assert audited(ledger, 4, W) == [] and audited(ledger, 5, W) == [W], "four are left, who must say so twice"


@settings(derandomize=True, deadline=None, max_examples=60)
@given(replicas=st.integers(1, 9), after=st.integers(1, 3), audits=st.booleans(), seed=st.integers(0, 999))
def test_whatever_is_found_most_of_a_stage_is_never_banned(replicas: int, after: int, audits: bool, seed: int) -> None:
    ledger, mesh, random = Ledger(after), Mesh(2, replicas), Random(seed)
    for step in range(12):
        bad = {worker for worker in mesh if random.random() < 0.7}
        if audits:
            audited(ledger, step, *bad, mesh=mesh, outvoted=bad)
        else:
            ledger.record(step, Counter(bad), bad, set(mesh), mesh)
        for stage in range(2):
            banned, muted = (sum(worker.stage == stage for worker in found) for found in (ledger.banned, ledger.muted))
            assert banned <= most_bans(replicas) and muted <= most_bans(replicas)
            assert replicas - banned > 0 and (2 * banned < replicas or replicas == 2)


def test_of_too_many_those_that_come_last_are_spared() -> None:
    ledger, stage = Ledger(ban_after=1), [Worker(1, replica) for replica in range(5)]
    for step, worker in enumerate(stage[:3]):
        ledger.record(step, Counter([worker]), [worker], stage, MESH)
    assert ledger.banned == set(stage[:2]) and ledger.spared == {stage[2]: 2}
    ledger.record(3, Counter(), [], stage, MESH)
    assert ledger.spared == {}, "who is in line again is spared nothing"


def test_where_most_of_a_stage_are_suspects_nobody_is_banned() -> None:
    ledger, stage = Ledger(ban_after=1), [Worker(1, replica) for replica in range(5)]
    for step in range(100):
        assert ledger.record(step, Counter(stage[:3]), stage[:3], stage, MESH) == []


def test_who_is_outvoted_or_lied_has_no_say_any_more() -> None:
    ledger = Ledger(false_accusations=None)
    audited(ledger, 3, W, outvoted={Worker(1, 3)})
    audited(ledger, 5, outvoted={Worker(1, 3), Worker(1, 4), OTHER})
    assert ledger.muted == {W: 3, Worker(1, 3): 3, OTHER: 5}, "and never so many that those who lie have most of the say"


class TestFalseAccusations:
    def told(self, ledger: Ledger, *steps: int, replicas: int = 5) -> list[list[Worker]]:
        """Whom the ledger bans in each of these steps, in all of which most say the opposite of a worker."""
        return [audited(ledger, step, mesh=Mesh(3, replicas), outvoted={W}) for step in steps]

    def test_who_is_outvoted_in_three_steps_is_banned_and_has_its_word_until_then(self) -> None:
        ledger = Ledger()
        assert self.told(ledger, 4, 9) == [[], []] and not ledger.muted and ledger.last_found == {1: 9}
        assert self.told(ledger, 30) == [[W]] and ledger.banned_at == ledger.muted == {W: 30}

    def test_a_step_that_is_done_again_counts_once(self) -> None:
        assert self.told(Ledger(), 4, 4, 4, 5, 5, 6) == [[], [], [], [], [], [W]]

    @pytest.mark.parametrize(
        ("ban_after", "false_accusations", "replicas"), [(5, None, 5), (None, 3, 5), (5, 3, 4), (5, 1, 3), (5, 1, 2)]
    )
    def test_where_nobody_is_banned_for_it_the_word_is_lost_the_first_time(
        self, ban_after: int | None, false_accusations: int | None, replicas: int
    ) -> None:
        ledger = Ledger(ban_after, false_accusations)
        assert self.told(ledger, 4, 5, 6, 7, replicas=replicas) == [[]] * 4
        assert ledger.muted == {W: 4} and not ledger.spared

    def test_after_a_ban_too_few_are_left_for_another_one(self) -> None:
        ledger = Ledger(false_accusations=2)
        self.told(ledger, 0)
        audited(ledger, 1, Worker(1, 4))
        assert self.told(ledger, 2, 3) == [[], []] and W in ledger.muted

    @pytest.mark.parametrize("replicas", [5, 6, 9])
    def test_never_half_of_a_stage_is_banned_and_who_is_spared_loses_its_word(self, replicas: int) -> None:
        ledger, mesh = Ledger(false_accusations=1), Mesh(1, replicas)
        workers = [Worker(0, replica) for replica in range(replicas)]
        for step in range(3):
            audited(ledger, step, mesh=mesh, outvoted=workers)
        assert len(ledger.banned) == most_bans(replicas) < replicas / 2
        assert len(ledger.spared) == replicas - most_bans(replicas) and len(ledger.muted) == most_bans(replicas)

    @settings(derandomize=True, deadline=None, max_examples=50)
    @given(steps=st.lists(st.integers(0, 9), max_size=9).map(sorted), cut=st.integers(0, 9), needed=st.integers(1, 4))
    def test_saving_and_loading_between_any_two_steps_changes_nothing(self, steps: list[int], cut: int, needed: int) -> None:
        whole, first, second = (Ledger(false_accusations=needed) for _ in range(3))
        banned = self.told(whole, *steps)
        self.told(first, *steps[:cut])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert banned == [*banned[:cut], *self.told(second, *steps[cut:])]
        assert second == whole and (W in whole.banned) == (len(set(steps)) >= needed)


def test_exonerated_flags_do_not_count_as_flags_and_ban_nobody() -> None:
    ledger = Ledger(ban_after=1)
    for step in range(9):
        assert ledger.record_audits(step, 1, Counter(), Counter({W: 1}), (), (), MESH) == []
    assert (ledger.total_flags, ledger.exonerated, ledger.audits, ledger.banned) == (0, {W: 9}, 9, frozenset())


def test_audits_of_a_run_that_bans_nobody_are_counted_only() -> None:
    ledger = Ledger(ban_after=None)
    assert audited(ledger, 0, W) == []
    assert not ledger.banned and ledger.flags == {W: 1} and ledger.audits == 4


def test_a_ban_is_entered_once() -> None:
    ledger = Ledger()
    assert ledger.ban(3, [OTHER, W]) == [W, OTHER]
    assert ledger.ban(5, [W]) == [] and ledger.banned_at[W] == 3


def test_audits_are_saved_and_older_states_load_without_them() -> None:
    ledger, loaded = Ledger(), Ledger()
    ledger.record_audits(3, 4, Counter({W: 1}), Counter({OTHER: 2}), {W}, {OTHER}, MESH)
    loaded.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert loaded == ledger and plain(ledger.state_dict())
    older = {name: entries for name, entries in ledger.state_dict().items() if name not in ("audits", "exonerated", "strikes")}
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
