from __future__ import annotations

import base64
import os
import pickle
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.errors import ConfigurationError, MissingExtraError
from lightning_sentinel.trust.identity import Identity, PublicKey

ONE = Identity.seeded(0, "one")
OTHER = Identity.seeded(0, "other")


def refusal(path: Path) -> str:
    with pytest.raises(ConfigurationError) as raised:
        Identity.kept(path)
    assert str(path) in str(raised.value)
    return str(raised.value)


def written(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


class TestSignatures:
    def test_another_implementation_takes_it(self) -> None:
        Ed25519PublicKey.from_public_bytes(ONE.public.raw).verify(ONE.sign(b"said"), b"said")

    def test_it_takes_another_implementations(self) -> None:
        private = Ed25519PrivateKey.generate()
        public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        assert PublicKey(public).verifies(private.sign(b"said"), b"said")

    def test_a_vector_of_the_standard(self) -> None:
        """RFC 8032, section 7.1, test 2."""
        private = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
        identity = Identity(private)
        assert identity.public.raw.hex() == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
        assert identity.sign(b"\x72").hex().startswith("92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da")

    def test_neither_another_message_nor_another_key(self) -> None:
        signature = ONE.sign(b"said")
        assert not ONE.public.verifies(signature, b"not said")
        assert not OTHER.public.verifies(signature, b"said")

    @settings(deadline=None)
    @given(st.binary(max_size=80), st.binary(min_size=32, max_size=32))
    def test_any_bytes_are_no_signature(self, signature: bytes, key: bytes) -> None:
        assert not ONE.public.verifies(signature, b"said")
        assert not PublicKey(key).verifies(ONE.sign(b"said"), b"said")


class TestPublicKeys:
    @settings(deadline=None)
    @given(st.binary(min_size=32, max_size=32))
    def test_are_printed_and_read(self, raw: bytes) -> None:
        key = PublicKey(raw)
        assert str(key) == f"ed25519:{base64.b64encode(raw).decode()}"
        assert PublicKey.of(str(key)) == key

    @settings(deadline=None)
    @given(st.text())
    def test_of_any_text(self, text: str) -> None:
        with pytest.raises(ConfigurationError, match="is no public key"):
            PublicKey.of(text)

    @pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t + "=", lambda t: t[8:], str.upper, lambda t: f" {t}"])
    def test_of_almost_the_text(self, change: object) -> None:
        with pytest.raises(ConfigurationError, match="is no public key"):
            PublicKey.of(change(str(ONE.public)))  # type: ignore[operator]

    def test_have_one_text_only(self) -> None:
        """The last character before the padding has two bits that are no part of the key."""
        text = str(PublicKey(bytes(32)))
        assert base64.b64decode(f"{text[8:-2]}B=", validate=True) == bytes(32)
        with pytest.raises(ConfigurationError, match="is no public key"):
            PublicKey.of(f"{text[:-2]}B=")

    def test_of_another_length(self) -> None:
        with pytest.raises(ConfigurationError, match="A public key of 31 bytes"):
            PublicKey(bytes(31))


class TestWhereTheyComeFrom:
    def test_drawn_ones_differ(self) -> None:
        assert len({Identity.draw().public for _ in range(8)}) == 8

    def test_seeded_ones_repeat(self) -> None:
        assert Identity.seeded(0, "one").public == ONE.public
        assert len({ONE.public, OTHER.public, Identity.seeded(1, "one").public}) == 3

    def test_the_secret_is_not_printed_or_pickled(self) -> None:
        assert repr(ONE) == f"Identity({ONE.public})"
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(ONE)

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setitem(sys.modules, "cryptography", None)
        monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
        for make in (Identity.draw, lambda: Identity.kept(tmp_path / "key"), lambda: ONE.public.verifies(bytes(64), b"")):
            with pytest.raises(MissingExtraError, match=r"Signing what workers say needs .*'lightning-sentinel\[trust\]'"):
                make()


class TestKeyFiles:
    def test_is_made_for_its_owner_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "keys" / "worker.key"
        before = os.umask(0)
        try:
            made = Identity.kept(path)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [file.name for file in path.parent.iterdir()] == ["worker.key"]
        key = load_pem_private_key(path.read_bytes(), None)
        assert isinstance(key, Ed25519PrivateKey)
        assert key.public_key().public_bytes_raw() == made.public.raw
        assert Identity.kept(path).public == made.public

    def test_of_openssl(self, tmp_path: Path) -> None:
        private = Ed25519PrivateKey.generate()
        path = written(tmp_path / "key", private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o400)
        assert Identity.kept(path).public.raw == private.public_key().public_bytes_raw()

    def test_made_by_several_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "worker.key"
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda _: Identity.kept(path).public, range(16)))
        assert len(set(made)) == 1
        assert [file.name for file in tmp_path.iterdir()] == ["worker.key"]

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o666])
    def test_that_others_may_use(self, tmp_path: Path, mode: int) -> None:
        path = tmp_path / "worker.key"
        Identity.kept(path)
        path.chmod(mode)
        assert f"its mode is {mode:o}" in refusal(path)
        assert f"chmod 600 {path}" in refusal(path)

    def test_a_directory(self, tmp_path: Path) -> None:
        assert f"is a directory, and a key is kept in a file. Name one in it, such as {tmp_path / 'worker.key'}" in refusal(
            tmp_path
        )

    def test_a_pipe(self, tmp_path: Path) -> None:
        path = tmp_path / "pipe"
        os.mkfifo(path, 0o600)
        assert "is no regular file" in refusal(path)

    @pytest.mark.parametrize(
        ("content", "cause"),
        [
            (b"", "it is empty"),
            (b"\x00" * 32, "it has no private key in PEM format"),
            (b"x" * 10_000, "it is larger than 4096 bytes"),
            (str(ONE.public).encode(), "it has no private key in PEM format"),
        ],
    )
    def test_no_key(self, tmp_path: Path, content: bytes, cause: str) -> None:
        path = written(tmp_path / "key", content)
        assert f"is no key file: {cause}. Name a file that is not there yet" in refusal(path)
        assert path.read_bytes() == content

    @pytest.mark.parametrize("kind", ["rsa", "curve"])
    def test_another_kind_of_key(self, tmp_path: Path, kind: str) -> None:
        key = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(ec.SECP256R1())
        path = written(tmp_path / "key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        assert "it holds a key of another kind" in refusal(path)

    def test_encrypted(self, tmp_path: Path) -> None:
        private = Ed25519PrivateKey.generate()
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word"))
        assert "it is encrypted" in refusal(written(tmp_path / "key", pem))

    def test_cannot_be_made(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("")
        message = refusal(file / "worker.key")
        assert "can be neither read nor made (FileExistsError: File exists)" in message
        assert "leave identity out" in message
