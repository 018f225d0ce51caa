"""The transcript of a run: each rank's row of a step's collective, signed, and bound to the table that the rank saw before.

The host would wait for the signatures of all rows. So a thread checks them while the next step runs, and what it found counts then.
All ranks know the same by that time: the next row says which table its rank saw, and ranks that saw different tables end the run
with the names of the liars. So nobody can have one rank believe what another one does not, neither as a sender of two rows nor as
a relay that alters a row on its way.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sentinel.errors import MalformedMessageError, TableMismatchError
from lightning_sentinel.mesh import Mesh, Worker
from lightning_sentinel.pipeline.processes.wire import world
from lightning_sentinel.trust.commitments import Copy, causes_of_difference, table_digest
from lightning_sentinel.trust.credentials import Credentials
from lightning_sentinel.trust.digests import DIGEST_BYTES, Digest, digest_of
from lightning_sentinel.trust.identity import SIGNATURE_BYTES
from lightning_sentinel.trust.signing import Signed
from lightning_sentinel.trust.statements import Moment, RowStatement

__all__ = ["BINDING_BYTES", "SignedRow", "Table", "Transcript"]

_MOST_CHECKED = 64
"""Signatures that a rank checks in a step: some 6 ms of a thread's time."""

BINDING_BYTES = 2 * DIGEST_BYTES + SIGNATURE_BYTES
"""At the end of a row: digests of the votes that its rank heard and of the table that it saw, and its signature."""


class Table(NamedTuple):
    """What all ranks said in a step.

    Args:
        rows: the contents of each rank's row.
        forgers: workers whose row of the step before bore no valid signature. All ranks saw the same row, so each of them knows it.
    """

    rows: list[bytes]
    forgers: frozenset[Worker]


class SignedRow(NamedTuple):
    """A rank's row as it came.

    Args:
        signed: what its rank says about it, with a signature that may be anything.
        contents: of the row.
    """

    signed: Signed[RowStatement]
    contents: bytes


class _Checked(NamedTuple):
    """A table, once its signatures are checked.

    Args:
        moment: of its step.
        said: its digest.
        rows: as they came, by worker.
        forgers: workers whose row bears no valid signature.
    """

    moment: Moment
    said: Digest
    rows: dict[Worker, Signed[RowStatement]]
    forgers: frozenset[Worker]


class Transcript:
    """Exchanges the rows of each step.

    Args:
        mesh: all workers, one a rank.
        credentials: with which this rank signs its rows, and knows those of others.
    """

    def __init__(self, mesh: Mesh, credentials: Credentials) -> None:
        self.credentials = credentials
        self._mesh = mesh
        self._nothing = digest_of(b"", credentials.algorithm)
        self._heard = self._nothing
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="transcript")
        self._last: Future[_Checked] | None = None
        self._before: _Checked | None = None
        self._now: tuple[Moment, Sequence[bytes]] | None = None
        """The latest step, and the rows of its exchange as they came."""

    def hear(self, said: Tensor) -> None:
        """Take note of what all ranks said outside of the rows, so that they find out if they heard different things.

        Args:
            said: on the host; gathered from all ranks.
        """
        self._heard = digest_of(self._heard.encode() + said.numpy().tobytes(), self.credentials.algorithm)

    def exchange(self, moment: Moment, contents: bytes) -> Table:
        """Gather the rows of a step from all ranks; a collective.

        Args:
            moment: of the step; each has another one.
            contents: of this rank's row, as many bytes as on all ranks.

        Raises:
            TableMismatchError: on all ranks, if they saw different tables in the step before, or heard different votes.
        """
        algorithm = self.credentials.algorithm
        last = self._last_checked()
        before = table_digest([], algorithm) if last is None else last.said
        own = self._mesh.worker(world().rank)
        row = contents + self._heard.encode()
        signed = self.credentials.sign(RowStatement(moment, own, digest_of(row, algorithm), before))
        message = row + before.encode() + signed.signature
        gathered = world().all_gather(torch.frombuffer(bytearray(message), dtype=torch.uint8))
        everyone = [one.numpy().tobytes() for one in gathered]
        self._require_one_table(moment, everyone, last)
        self._heard = self._nothing
        self._last = self._thread.submit(self._checked, moment, everyone)
        self._before, self._now = last, (moment, everyone)
        return Table([one[:-BINDING_BYTES] for one in everyone], frozenset() if last is None else last.forgers)

    def rows(self) -> dict[Worker, SignedRow]:
        """The rows of the latest exchange, by worker."""
        if self._now is None:
            return {}
        moment, everyone = self._now
        return {worker: self._row(moment, worker, message) for worker, message in zip(self._mesh.workers, everyone)}

    def rows_before(self) -> dict[Worker, Signed[RowStatement]]:
        """What ranks said about their rows in the exchange before the latest one, by worker."""
        return {} if self._before is None else self._before.rows

    def _row(self, moment: Moment, worker: Worker, message: bytes) -> SignedRow:
        contents = message[: DIGEST_BYTES - BINDING_BYTES]
        before = _digest(message[-SIGNATURE_BYTES - DIGEST_BYTES : -SIGNATURE_BYTES], self._nothing)
        statement = RowStatement(moment, worker, digest_of(contents, self.credentials.algorithm), before)
        return SignedRow(Signed(statement, message[-SIGNATURE_BYTES:]), contents)

    def _last_checked(self) -> _Checked | None:
        return None if self._last is None else self._last.result()

    def _checked(self, moment: Moment, everyone: Sequence[bytes]) -> _Checked:
        """Check the signatures of a table; runs in the thread."""
        rows = {worker: self._row(moment, worker, one).signed for worker, one in zip(self._mesh.workers, everyone)}
        said = table_digest(rows.values(), self.credentials.algorithm)
        forgers = frozenset(worker for worker in _checked_workers(said, self._mesh) if not self.credentials.hold(rows[worker]))
        return _Checked(moment, said, rows, forgers)

    def _require_one_table(self, moment: Moment, everyone: Sequence[bytes], last: _Checked | None) -> None:
        """End the run if ranks saw different tables, or heard different votes; on all ranks, which see the same rows of this step.

        A rank that does not, because a row was altered on its way to it, passes over the row: its signature does not hold any more.
        All ranks know of that row one step later.
        """
        if len({one[-BINDING_BYTES:-SIGNATURE_BYTES] for one in everyone}) == 1:
            return
        now = self._checked(moment, everyone)
        said = {worker: one for worker, one in zip(self._mesh.workers, everyone) if worker not in now.forgers}
        heard = {worker: one[-BINDING_BYTES : DIGEST_BYTES - BINDING_BYTES] for worker, one in said.items()}
        before = {worker: one[DIGEST_BYTES - BINDING_BYTES : -SIGNATURE_BYTES] for worker, one in said.items()}
        if len(set(before.values())) > 1 and last is not None:
            raise TableMismatchError(f"{self._at(last.moment)}: {self._causes(before, last)} {_REMEDY}")
        if len(set(heard.values())) > 1:
            odd = _names(_unlike_most(heard))
            raise TableMismatchError(f"Ranks have heard different votes: others than most have {odd}. {_REMEDY}")

    @staticmethod
    def _at(moment: Moment) -> str:
        return f"Ranks saw different rows in the exchange of step {moment.step}"

    def _causes(self, before: Mapping[Worker, bytes], last: _Checked) -> str:
        """Why ranks saw different tables in the step before, from the copies that they show.

        Args:
            before: which table each rank says that it saw, in its row of this step; without ranks whose row is not signed.
            last: the table of the step before.
        """
        shown = b"".join(_shown(last.rows[worker]) for worker in self._mesh.workers)
        gathered = world().all_gather(torch.frombuffer(bytearray(shown), dtype=torch.uint8))
        everyone = dict(zip(self._mesh.workers, gathered))
        copies = [self._copy(worker, said, everyone[worker].numpy().tobytes(), last) for worker, said in before.items()]
        odd = _unlike_most(before)
        if not self.credentials.keys:
            return f"another table than most saw {_names(odd)}; without keys nobody can tell who changed what."
        usual = next((copy for copy in copies if copy.holder not in odd), copies[0])
        words: dict[str, None] = {}
        for copy in copies:
            causes = causes_of_difference(usual, copy, self.credentials.keys, last.moment)
            for liar in sorted(causes.equivocated):
                words[f"{liar} signed two different rows"] = None
            for liar in sorted(causes.misreported):
                words[f"{liar} shows another table than the one that it signed for"] = None
            for holder, rows in sorted(causes.altered.items()):
                words[f"{holder}, or who passes rows on to it, has altered the row of {_names(rows)}"] = None
        return "; ".join(words or [f"another table than most saw {_names(odd)}"]) + "."

    def _copy(self, holder: Worker, said: bytes, shown: bytes, last: _Checked) -> Copy:
        size = len(shown) // self._mesh.size
        rows = {}
        for number, worker in enumerate(self._mesh.workers):
            one = shown[number * size : (number + 1) * size]
            row, earlier = (_digest(one[place : place + DIGEST_BYTES], self._nothing) for place in (0, DIGEST_BYTES))
            rows[worker] = Signed(RowStatement(last.moment, worker, row, earlier), one[2 * DIGEST_BYTES :])
        return Copy(holder, _digest(said, self._nothing), rows)


_REMEDY = (
    "What ranks decide from such a table differs, so the run ends. Leave the named workers out, or the machines that pass rows on"
    " to them, and start again from the last checkpoint."
)


def _checked_workers(table: Digest, mesh: Mesh) -> Sequence[Worker]:
    """The workers whose signatures are checked in a step: all, or on a large mesh some that nobody knows before the table is made.

    Example:
        >>> from lightning_sentinel.trust.digests import Algorithm
        >>> table = digest_of(b"a table", Algorithm.SHA256)
        >>> len(_checked_workers(table, Mesh(2, 4))), len(_checked_workers(table, Mesh(16, 16)))
        (8, 64)
    """
    if mesh.size <= _MOST_CHECKED:
        return mesh.workers
    return random.Random(table.value).sample(mesh.workers, _MOST_CHECKED)


def _unlike_most(said: Mapping[Worker, bytes]) -> list[Worker]:
    """The workers that say something else than most do; all of them, where there is no majority."""
    (usual, count), *_ = Counter(said.values()).most_common(1)
    return [worker for worker, one in said.items() if one != usual or 2 * count <= len(said)]


def _names(workers: Iterable[Worker]) -> str:
    return ", ".join(map(str, sorted(workers)))


def _shown(signed: Signed[RowStatement]) -> bytes:
    return signed.statement.row.encode() + signed.statement.table_before.encode() + signed.signature


def _digest(encoded: bytes, otherwise: Digest) -> Digest:
    try:
        return Digest.decode(encoded)
    except MalformedMessageError:
        return otherwise
