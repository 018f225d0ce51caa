"""Workers with keys: who is admitted, and whom a ban follows."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_sentinel.trust.identity import Identity
from tests.distributed import identity_tasks, world


def test_workers_prove_their_keys_and_strangers_are_refused_on_all_ranks(tmp_path: Path) -> None:
    first, second = (str(Identity.kept(tmp_path / f"{rank}.key").public) for rank in range(2))
    (tmp_path / "known").write_text(f"# both machines\n{first} the first\n{second} the second\n")
    (tmp_path / "one of them").write_text(f"{first} the first\n")
    for told in world.run(identity_tasks.attempts, 2, str(tmp_path)):
        assert told["known"] == {"keys": [first, second], "banned": []}
        assert told["one of them"].startswith(f"The key of rank 1 ({second}) is not on the list of known workers.")
        assert told["shared"].startswith("Ranks 0 and 1 have the same key, ed25519:")
        assert told["one without"].startswith("Rank(s) 1 have no key that is kept, and the others have.")
        # The ledger of an earlier run bans the key of rank 1, which served another place of another mesh.
        assert told["banned"].startswith("All workers of stage 0 are banned")
    entries = json.loads((tmp_path / "ledger.json").read_text())["banned"]
    assert [entry["key"] for entry in entries] == [second]
