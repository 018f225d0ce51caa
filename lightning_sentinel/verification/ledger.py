"""The ledger: how often each worker was flagged, and which workers are banned."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.verification.bans import Ban
from lightning_sentinel.verification.majority import live_workers, most_bans, refutations_to_ban, strikes_to_ban
from lightning_sentinel.verification.streaks import Habits, Streak, is_proof, sighting
from lightning_sentinel.verification.table import mask_of

__all__ = ["Ledger"]

_COUNTS = ("flags", "banned_at", "exonerated", "strikes", "refuted", "refuted_at", "muted", "spared")
"""Saved attributes that map workers to numbers."""

_CALM_STEPS = 16
"""How long workers keep their shuffled lanes: a worker that came back to a liar's lane would be a suspect again."""


@dataclass
class Ledger:
    """Counts flags and audits, and decides which workers to ban for them.

    By flags alone it bans a worker that is a suspect in ``ban_after`` consecutive steps, or in more of them where others of its
    stage are suspects as well (:func:`lightning_sentinel.verification.streaks.is_proof`). A step in which a worker was verified and
    is no suspect ends its streak; a step in which none of its signals could be verified (its pipeline was tainted before it, or is
    left out) does not. By audits it bans a worker that most of its stage found to lie in as many steps as :func:`strikes_to_ban`
    says, or that said the opposite of most in as many as :func:`refutations_to_ban` does.

    It never bans more workers of a stage than :func:`most_bans`, so that bans never end a run.

    Args:
        ban_after: consecutive steps as a suspect that lead to a ban, where the others of the stage are in line; ``None`` bans no
            worker.
        false_accusations: see :class:`lightning_sentinel.config.Response`.

    Example:
        >>> from collections import Counter
        >>> ledger, worker, mesh = Ledger(ban_after=2), Worker(1, 0), Mesh(stages=2, replicas=3)
        >>> ledger.record(7, Counter({worker: 3}), suspects={worker}, verified={worker}, mesh=mesh)
        []
        >>> ledger.record(8, Counter({worker: 4}), suspects={worker}, verified={worker}, mesh=mesh)
        [Worker(stage=1, replica=0)]
        >>> ledger.banned, ledger.banned_at[worker], ledger.flags[worker]
        (frozenset({Worker(stage=1, replica=0)}), 8, 7)
    """

    ban_after: int | None = 5
    false_accusations: int | None = 3
    flags: Counter[Worker] = field(default_factory=Counter)
    """Signals flagged so far, by sender."""
    streaks: dict[Worker, Streak] = field(default_factory=dict)
    """Consecutive steps as a suspect, of workers that were suspects when last verified."""
    habits: Habits = field(default_factory=Habits)
    """How often workers were suspects lately."""
    banned_at: dict[Worker, int] = field(default_factory=dict)
    """The step at which a worker was banned."""
    audits: int = 0
    """Signals recomputed by another worker so far; none without audits."""
    exonerated: Counter[Worker] = field(default_factory=Counter)
    """Flags that an audit dropped, by sender; they do not count as flags."""
    strikes: Counter[Worker] = field(default_factory=Counter)
    """Steps in which most of its stage found a worker to lie."""
    refuted: Counter[Worker] = field(default_factory=Counter)
    """Steps in which most of its stage voted the opposite of a worker."""
    refuted_at: dict[Worker, int] = field(default_factory=dict)
    """The latest of these steps."""
    muted: dict[Worker, int] = field(default_factory=dict)
    """The step from which a worker's votes do not count, because most of its stage found it to lie, or voted the opposite and it is
    not banned for that."""
    spared: dict[Worker, int] = field(default_factory=dict)
    """The step from which a worker would be banned, if more of its stage could be."""
    shuffled_at: int | None = None
    """The latest step for which a new shuffle was requested."""
    contradicted: dict[Worker, set[Worker]] = field(default_factory=dict)
    """The workers that say something else than a worker does about a message between the two."""
    hosts: dict[Worker, str] = field(default_factory=dict)
    """The machine that serves a worker; empty if unknown."""
    keys: dict[Worker, str] = field(default_factory=dict)
    """The public key of a worker; empty if workers have none."""
    odd_copies: frozenset[Worker] = frozenset()
    """Workers whose copy of their stage's weights was not that of most when it was last saved; not kept in checkpoints."""
    evidence: dict[Worker, str] = field(default_factory=dict)
    """The file in a run's folder ``sentinel`` that shows why a worker was banned."""

    @property
    def banned(self) -> frozenset[Worker]:
        return frozenset(self.banned_at)

    def banned_senders(self, mesh: Mesh) -> Tensor:
        """``(boundaries, replicas)`` bool, whether the worker of a boundary's sending stage is banned."""
        return mask_of(self.banned_at, mesh)[[boundary.sender for boundary in mesh.boundaries]]

    @property
    def total_flags(self) -> int:
        return self.flags.total()

    @property
    def last_found(self) -> dict[int, int]:
        """The step in which somebody was last banned, refuted or lost its word, by stage."""
        found: dict[int, int] = {}
        for worker, when in (*self.banned_at.items(), *self.refuted_at.items(), *self.muted.items()):
            found[worker.stage] = max(when, found.get(worker.stage, when))
        return found

    def order(self, step: int) -> int | None:
        """The number of the shuffle by which workers serve pipelines: a new one in every step while shuffling could clear a
        suspect, and the last of these for some steps after; ``None`` if each worker serves its own pipeline."""
        latest = self.shuffled_at
        return latest if latest is not None and latest <= step < latest + _CALM_STEPS else None

    def record(
        self,
        step: int,
        flagged: Counter[Worker],
        suspects: Collection[Worker],
        verified: Collection[Worker],
        mesh: Mesh,
        unmistakable: Collection[Worker] = (),
        scores: Mapping[Worker, float] = MappingProxyType({}),
    ) -> list[Worker]:
        """Record one step's flags.

        Args:
            step: number of the training batch.
            flagged: how many signals of each worker were flagged.
            suspects: workers that were out of line for most of the step.
            verified: workers with at least one verified signal.
            mesh: all workers.
            unmistakable: suspects whose deviation no received signal can explain.
            scores: how far out suspects were; equally far by default.

        Returns:
            the workers that this step bans, in order.
        """
        self.flags.update(flagged)
        self.habits.add(suspects, verified)
        condemned = []
        for worker in sorted(verified):
            if worker not in suspects:
                self.streaks.pop(worker, None)
                self.spared.pop(worker, None)
                continue
            streak = self.streaks.setdefault(worker, Streak())
            streak.add(sighting(worker, suspects, verified, unmistakable, scores))
            if self.ban_after is not None and is_proof(streak, self.ban_after, self.habits.of_others(worker)):
                condemned.append(worker)
        banned = self._condemn(step, condemned, mesh)
        waiting = self.streaks.keys() - self.banned_at.keys() - self.spared.keys()
        if self.ban_after is not None and any(self.streaks[worker].shuffles for worker in waiting):
            self.shuffled_at = step + 1
        return banned

    def record_audits(
        self,
        step: int,
        audits: int,
        flagged: Counter[Worker],
        exonerated: Counter[Worker],
        guilty: Collection[Worker],
        outvoted: Collection[Worker],
        mesh: Mesh,
    ) -> list[Worker]:
        """Record one step's audits.

        Args:
            step: number of the training batch.
            audits: how many signals were recomputed.
            flagged: how many signals of each worker did not match.
            exonerated: how many flagged signals of each worker did match.
            guilty: workers that most of their stage found to lie; each once a step, however often the step is done.
            outvoted: workers that voted the opposite of most of their stage.
            mesh: all workers.

        Returns:
            the workers that this step bans, in order.
        """
        self.audits += audits
        self.flags.update(flagged)
        self.exonerated.update(exonerated)
        self.strikes.update(guilty)
        # A step may be done again, and counts once.
        self.refuted.update(worker for worker in outvoted if self.refuted_at.get(worker) != step)
        self.refuted_at.update(dict.fromkeys(outvoted, step))
        condemned = {worker for worker in guilty if self._is_enough(worker, mesh)}
        for worker in sorted({*outvoted, *guilty}):
            needed = self._refutations_to_ban(worker, mesh)
            if worker not in guilty and needed is not None:
                if self.refuted[worker] < needed:
                    continue
                condemned.add(worker)
            if self._of_stage(self.muted, worker) < most_bans(mesh.replicas):
                self.muted.setdefault(worker, step)
        return [] if self.ban_after is None else self._condemn(step, condemned, mesh)

    def record_contradictions(
        self, step: int, pairs: Collection[tuple[Worker, Worker]], forgers: Collection[Worker], mesh: Mesh
    ) -> list[Worker]:
        """Record which workers contradict each other about a message that one sent and the other received.

        One of the two lies, and nobody can tell which. But a worker that contradicts more workers of one stage than can be
        malicious there lies. In a stage of two, that cannot be told either.

        Args:
            step: number of the training batch.
            pairs: the workers that contradict each other; from the next step on others are put beside them.
            forgers: workers whose word bore no valid signature or seal, which is a lie without doubt.
            mesh: all workers.

        Returns:
            the workers that this step bans, in order.

        Example:
            >>> ledger, mesh, liar = Ledger(), Mesh(stages=2, replicas=3), Worker(0, 0)
            >>> ledger.record_contradictions(7, [(liar, Worker(1, 0))], [], mesh)
            []
            >>> ledger.record_contradictions(8, [(liar, Worker(1, 2))], [], mesh)
            [Worker(stage=0, replica=0)]
        """
        for one, other in pairs:
            self.contradicted.setdefault(one, set()).add(other)
            self.contradicted.setdefault(other, set()).add(one)
        if pairs:
            self.shuffled_at = step + 1
        if self.ban_after is None:
            return []
        liars = [worker for pair in pairs for worker in pair if self._contradicts_too_many(worker, mesh)]
        return self._condemn(step, {*forgers, *liars}, mesh)

    def _contradicts_too_many(self, worker: Worker, mesh: Mesh) -> bool:
        # Who contradicted somebody that is banned has been right.
        of_stages = Counter(other.stage for other in self.contradicted[worker] if other not in self.banned_at)
        live = {stage: live_workers(stage, self.banned_at, mesh) for stage in of_stages}
        return any(strikes_to_ban(live[stage]) is not None and count > most_bans(live[stage]) for stage, count in of_stages.items())

    def _is_enough(self, worker: Worker, mesh: Mesh) -> bool:
        needed = strikes_to_ban(live_workers(worker.stage, self.banned_at, mesh))
        return needed is not None and self.strikes[worker] >= needed

    def _refutations_to_ban(self, worker: Worker, mesh: Mesh) -> int | None:
        live = live_workers(worker.stage, self.banned_at, mesh)
        return None if self.ban_after is None else refutations_to_ban(live, self.false_accusations)

    def _condemn(self, step: int, workers: Collection[Worker], mesh: Mesh) -> list[Worker]:
        """Ban as many of the workers as possible, the most flagged first."""
        banned = []
        for worker in sorted(workers, key=lambda worker: (-self.flags[worker], worker)):
            if worker in self.banned_at:
                continue
            if self._of_stage(self.banned_at, worker) < most_bans(mesh.replicas):
                banned += self.ban(step, [worker])
            else:
                self.spared.setdefault(worker, step)
        return sorted(banned)

    @staticmethod
    def _of_stage(workers: Collection[Worker], worker: Worker) -> int:
        return sum(other.stage == worker.stage for other in workers)

    def ban(self, step: int, workers: Collection[Worker]) -> list[Worker]:
        """Ban workers. Returns those that were not banned before, in order."""
        new = sorted(worker for worker in workers if worker not in self.banned_at)
        self.banned_at.update(dict.fromkeys(new, step))
        return new

    def bans(self, mesh: Mesh) -> list[Ban]:
        """All bans, with the machine that served each worker, and its key.

        Args:
            mesh: of this run.
        """
        hosts = len(set(self.hosts.values()))
        return [
            Ban(
                worker,
                step,
                self.flags[worker],
                self.hosts.get(worker),
                hosts,
                mesh,
                key=self.keys.get(worker),
                evidence=self.evidence.get(worker),
            )
            for worker, step in sorted(self.banned_at.items())
        ]

    def export(self, path: Path | str) -> None:
        """Write the banned workers with step, flags and machine as JSON, for people and for the next run.

        Args:
            path: of the file; it is replaced atomically.

        Example:
            >>> import tempfile
            >>> ledger, path = Ledger(), Path(tempfile.mkdtemp()) / "ledger.json"
            >>> _ = ledger.ban(64, [Worker(1, 2)])
            >>> ledger.export(path)
            >>> Ledger.banned_in(path)
            [Worker(stage=1, replica=2)]
        """
        path = Path(path)
        banned = [
            {
                "stage": worker.stage,
                "replica": worker.replica,
                "step": step,
                "flags": self.flags[worker],
                "host": self.hosts.get(worker),
                "key": self.keys.get(worker),
                "evidence": self.evidence.get(worker),
            }
            for worker, step in sorted(self.banned_at.items())
        ]
        whole = path.with_name(path.name + ".new")
        whole.write_text(json.dumps({"banned": banned, "flags": self.total_flags, "audits": self.audits}, indent=1) + "\n")
        whole.replace(path)

    @staticmethod
    def banned_in(path: Path | str) -> list[Worker]:
        """The workers that an exported ledger bans: ``Response(banned=Ledger.banned_in(path))``.

        Raises:
            ConfigurationError: if the file is not an exported ledger.
        """
        try:
            entries = json.loads(Path(path).read_text())["banned"]
            return [Worker(int(entry["stage"]), int(entry["replica"])) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{path} is not a ledger ({type(error).__name__}: {error}). Give a file that Ledger.export wrote, such as"
                " sentinel/ledger.json in the log directory of a run."
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, names and lists, so that a checkpoint loads with ``weights_only=True``."""
        entries = {
            name: [[worker.stage, worker.replica, number] for worker, number in sorted(getattr(self, name).items())]
            for name in _COUNTS
        }
        hosts = [[worker.stage, worker.replica, host] for worker, host in sorted(self.hosts.items())]
        keys = [[worker.stage, worker.replica, key] for worker, key in sorted(self.keys.items())]
        streaks = [[worker.stage, worker.replica, streak.state()] for worker, streak in sorted(self.streaks.items())]
        return {
            **entries,
            "suspects": streaks,
            "habits": self.habits.state(),
            "shuffled_at": self.shuffled_at,
            "audits": self.audits,
            "hosts": hosts,
            "keys": keys,
            "evidence": [[worker.stage, worker.replica, name] for worker, name in sorted(self.evidence.items())],
            "contradicted": [
                [one.stage, one.replica, other.stage, other.replica]
                for one, others in sorted(self.contradicted.items())
                for other in sorted(others)
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        entries = {name: {Worker(s, r): number for s, r, number in state.get(name, ())} for name in _COUNTS}
        self.flags = Counter(entries["flags"])
        self.streaks = {Worker(s, r): Streak.of_state(streak) for s, r, streak in state.get("suspects", ())}
        self.banned_at = entries["banned_at"]
        self.exonerated = Counter(entries["exonerated"])
        self.strikes = Counter(entries["strikes"])
        self.refuted = Counter(entries["refuted"])
        self.refuted_at = entries["refuted_at"]
        self.muted = entries["muted"]
        self.spared = entries["spared"]
        self.habits = Habits.of_state(state.get("habits", []))
        self.shuffled_at = state.get("shuffled_at")
        self.audits = state.get("audits", 0)
        self.hosts = {Worker(s, r): host for s, r, host in state.get("hosts", ())}
        self.keys = {Worker(s, r): key for s, r, key in state.get("keys", ())}
        self.evidence = {Worker(s, r): name for s, r, name in state.get("evidence", ())}
        self.contradicted = {}
        for s, r, other_s, other_r in state.get("contradicted", ()):
            self.contradicted.setdefault(Worker(s, r), set()).add(Worker(other_s, other_r))
