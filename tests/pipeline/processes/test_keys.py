from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_sentinel.errors import ConfigurationError, MalformedMessageError
from lightning_sentinel.pipeline.processes.keys import exchange_keys
from lightning_sentinel.trust.identity import Identity, PublicKey
from tests.pipeline.ranks import ranks

ALICE, BOB, EVE = (Identity.seeded(0, name) for name in ("alice", "bob", "eve"))


def exchanged(identities: Sequence[Identity | None], known: Sequence[PublicKey] | None = None, **says: Any) -> list[Any]:
    """What each rank learns, or the error that it raises; ``rank_1=...`` changes what rank 1 says."""

    def work(rank: int) -> Any:
        try:
            return exchange_keys(world, identities[rank], known)
        except (ConfigurationError, MalformedMessageError) as error:
            return error

    with ranks(len(identities)) as world:
        world.says = {int(name.removeprefix("rank_")): change for name, change in says.items()}
        return world.run(work)


def test_all_learn_all_keys() -> None:
    keys = tuple(identity.public for identity in (ALICE, BOB, EVE))
    assert exchanged([ALICE, BOB, EVE]) == [keys] * 3
    assert exchanged([ALICE, BOB, EVE], known=keys) == [keys] * 3


def test_without_keys_there_is_nothing_to_learn() -> None:
    assert exchanged([None, None]) == [(), ()]


def refusals(found: Sequence[Any], kind: type[Exception]) -> set[str]:
    assert all(isinstance(one, kind) for one in found), found
    return {str(one) for one in found}


def test_a_key_on_some_ranks_only_is_refused_on_all() -> None:
    (said,) = refusals(exchanged([ALICE, None, BOB, None]), ConfigurationError)
    assert said.startswith(
        "Rank(s) 1, 3 have no key, and the others have. Give the same SentinelStrategy(identity=...) on every machine"
    )


def test_two_workers_with_one_key_are_refused_on_all() -> None:
    (said,) = refusals(exchanged([ALICE, BOB, ALICE]), ConfigurationError)
    assert said.startswith(f"Ranks 0 and 2 have the same key, {ALICE.public}")


def test_who_is_not_known_is_named_on_all() -> None:
    (said,) = refusals(exchanged([ALICE, EVE, BOB], known=[ALICE.public, BOB.public]), ConfigurationError)
    assert said.startswith(f"The key of rank 1 ({EVE.public}) is not on the list of known workers")


def test_a_key_of_which_only_the_public_half_is_there_is_refused_on_all() -> None:
    def borrowed(said: torch.Tensor) -> torch.Tensor:
        return torch.cat((torch.frombuffer(bytearray(ALICE.public.raw), dtype=torch.uint8), said[32:]))

    found = exchanged([ALICE, EVE], rank_1=borrowed)
    (said,) = refusals(found, MalformedMessageError)
    assert said.startswith(f"Rank 1 names the key {ALICE.public} and does not prove that it is its own")
    assert {error.rank for error in found} == {1}


def test_what_was_answered_in_another_run_proves_nothing() -> None:
    heard = []

    def overheard(said: torch.Tensor) -> torch.Tensor:
        heard.append(said.clone())
        return heard[0]

    assert exchanged([BOB, ALICE], rank_1=overheard)[0] == (BOB.public, ALICE.public)
    (said,) = refusals(exchanged([BOB, EVE], rank_1=lambda said: heard[0]), MalformedMessageError)
    assert "does not prove" in said
