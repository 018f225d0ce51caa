from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.trust.identity import Identity, PublicKey
from lightning_sentinel.trust.known_workers import read_known_workers, require_distinct, require_known

ALICE, BOB, EVE = (Identity.seeded(0, name).public for name in ("alice", "bob", "eve"))


def listed(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "known_workers"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigurationError) as raised:
        read_known_workers(path)
    assert str(path) in str(raised.value)
    return str(raised.value)


def test_keys_have_comments_or_none(tmp_path: Path) -> None:
    path = listed(tmp_path, f"# first\n\n{BOB} bob,  second rack # 7\n  \n   {ALICE}\n  # last\n{EVE} \r\n")
    assert read_known_workers(path) == {BOB: "bob,  second rack # 7", ALICE: "", EVE: ""}
    assert list(read_known_workers(path)) == [BOB, ALICE, EVE]


@pytest.mark.parametrize("line", ["alice", "ed25519:", f"{ALICE}x", f"{str(ALICE)[:-1]}", f"ssh-{ALICE} alice", "ed25519: AAAA"])
def test_a_line_without_a_key(tmp_path: Path, line: str) -> None:
    path = listed(tmp_path, f"# first\n{BOB}\n{line}\n")
    message = refusal(path)
    assert message.startswith(f"{path}:3: {line.split()[0]!r} is no public key.")
    assert message.endswith("A line that is a comment begins with #.")


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    path = listed(tmp_path, f"{BOB} bob\n\n{ALICE} alice\n{BOB} eve\n")
    assert refusal(path).startswith(f"{path}:4: the key {BOB} is on line 1 as well ('bob' and 'eve').")


@pytest.mark.parametrize("content", ["", "\n\n", "# nobody\n"])
def test_a_list_that_admits_nobody(tmp_path: Path, content: str) -> None:
    assert "has no key on it, and would admit no worker" in refusal(listed(tmp_path, content))


def test_what_is_no_list(tmp_path: Path) -> None:
    assert "cannot be read (FileNotFoundError" in refusal(tmp_path / "absent")
    assert "cannot be read (IsADirectoryError" in refusal(tmp_path)
    assert "cannot be read (UnicodeDecodeError" in refusal(listed(tmp_path, b"\xff\xfe\x00"))
    assert "is larger than 1048576 bytes" in refusal(listed(tmp_path, "#" * 2**21))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_with_one_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = listed(tmp_path_factory.getbasetemp(), content)
    with pytest.raises(ConfigurationError, match=re.escape(str(path))):
        read_known_workers(path)


def test_only_the_known_are_admitted() -> None:
    require_known([ALICE, BOB], {ALICE: "", BOB: "", EVE: ""})
    with pytest.raises(ConfigurationError) as raised:
        require_known([EVE, ALICE, BOB], [ALICE])
    assert str(raised.value).startswith(f"The key of rank 0 ({EVE}), rank 2 ({BOB}) is not on the list of known workers.")


def test_a_key_belongs_to_one_worker() -> None:
    require_distinct([ALICE, BOB, EVE])
    with pytest.raises(ConfigurationError, match=r"Ranks 1 and 3 have the same key, .* a key file that belongs to two workers"):
        require_distinct([ALICE, BOB, EVE, PublicKey(BOB.raw)])
