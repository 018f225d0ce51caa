from __future__ import annotations

import hashlib
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sentinel.errors import ConfigurationError, MalformedMessageError
from lightning_sentinel.trust.digests import (
    DIGEST_BYTES,
    Algorithm,
    Digest,
    agreed_algorithm,
    available_algorithms,
    digest_of,
    digest_of_tensor,
)

SHA = Algorithm.SHA256
BLAKE = Algorithm.BLAKE3


class TestBytes:
    @settings(deadline=None)
    @given(st.binary())
    def test_sha256_is_that_of_python(self, contents: bytes) -> None:
        assert digest_of(contents, SHA) == Digest(SHA, hashlib.sha256(contents).digest())

    def test_blake3_is_that_of_its_authors(self) -> None:
        """The test vector of the specification for no input."""
        pytest.importorskip("blake3")
        assert digest_of(b"", BLAKE).value.hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"

    @settings(deadline=None)
    @given(st.binary(), st.binary())
    def test_names_its_contents(self, contents: bytes, other: bytes) -> None:
        for algorithm in available_algorithms():
            digest = digest_of(contents, algorithm)
            assert digest.names(contents)
            assert digest.names(other) == (contents == other)


class TestTensors:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool])
    @pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0, 4), (4, 0), (1,) * 8])
    def test_is_of_dtype_shape_and_elements(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        name = str(dtype).split(".")[1]
        elements = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
        contents = f"{name}:{','.join(map(str, shape))}\n".encode() + elements
        assert digest_of_tensor(tensor, SHA).value == hashlib.sha256(contents).digest()

    def test_needs_no_contiguous_elements_and_no_leaf(self) -> None:
        tensor = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
        for view in (tensor.T, tensor[::2], tensor[:, 1:3], tensor * 1):
            assert digest_of_tensor(view, SHA) == digest_of_tensor(view.detach().clone().contiguous(), SHA)

    def test_what_looks_alike_differs(self) -> None:
        alike = [
            torch.zeros(2, 3),
            torch.zeros(3, 2),
            torch.zeros(6),
            -torch.zeros(2, 3),
            torch.zeros(2, 3, dtype=torch.float64),
            torch.zeros(2, 3, dtype=torch.int32),
            torch.zeros(2, 6, dtype=torch.bfloat16),
            torch.zeros(0, 3),
            torch.zeros(0, 2),
            torch.zeros(3, 0),
        ]
        assert len({digest_of_tensor(tensor, SHA) for tensor in alike}) == len(alike)

    def test_what_is_not_finite_has_one(self) -> None:
        tensor = torch.tensor([torch.nan, torch.inf])
        assert digest_of_tensor(tensor, SHA).names(tensor.clone())
        assert not digest_of_tensor(tensor, SHA).names(-tensor)

    def test_one_bit_is_another_tensor(self) -> None:
        tensor = torch.ones(64, 64, dtype=torch.bfloat16)
        changed = tensor.clone()
        changed[63, 63] = torch.nextafter(changed[63, 63], torch.tensor(2.0, dtype=torch.bfloat16))
        for algorithm in available_algorithms():
            assert not digest_of_tensor(tensor, algorithm).names(changed)


class TestAgreement:
    def test_of_the_best_that_all_have(self) -> None:
        assert agreed_algorithm([{SHA, BLAKE}] * 3) is BLAKE
        assert agreed_algorithm([{SHA, BLAKE}, {SHA}]) is SHA

    def test_whatever_one_says(self) -> None:
        assert agreed_algorithm([[1, 2], [], [1, 2]]) is SHA
        assert agreed_algorithm([[3, -1, 2**70], [1, 2]]) is SHA
        assert agreed_algorithm([[2, 2, 3], [1, 2]]) is BLAKE

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "blake3", None)
        available_algorithms.cache_clear()
        try:
            assert available_algorithms() == (SHA,)
        finally:
            available_algorithms.cache_clear()
        assert digest_of(b"abc", SHA).names(b"abc")
        with pytest.raises(ConfigurationError, match="pip install blake3"):
            Digest(BLAKE, bytes(32)).names(b"abc")


class TestEncoding:
    @settings(deadline=None)
    @given(st.sampled_from(Algorithm), st.binary(min_size=32, max_size=32))
    def test_is_read_back(self, algorithm: Algorithm, value: bytes) -> None:
        digest = Digest(algorithm, value)
        assert len(digest.encode()) == DIGEST_BYTES
        assert Digest.decode(digest.encode()) == digest

    @settings(deadline=None)
    @given(st.binary(max_size=70))
    def test_of_any_bytes(self, encoded: bytes) -> None:
        try:
            digest = Digest.decode(encoded)
        except MalformedMessageError:
            return
        assert digest.encode() == encoded

    @pytest.mark.parametrize(("encoded", "says"), [(b"", "missing"), (b"\x09" + bytes(32), "09"), (b"\x01" * 32, "31 bytes")])
    def test_says_what_is_wrong(self, encoded: bytes, says: str) -> None:
        with pytest.raises(MalformedMessageError, match=says):
            Digest.decode(encoded)
