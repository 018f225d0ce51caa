from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sentinel.errors import MalformedMessageError, PipelineModelError, SentinelError
from lightning_sentinel.pipeline.messages.headers import (
    DTYPES,
    HEADER_WORDS,
    Allowance,
    Expected,
    Header,
    Kind,
    MessageId,
    decode,
    encode,
    extent,
)

DUE = MessageId(step=7, slot=2, kind=Kind.ACTIVATION)
ANY = Expected(DTYPES, most_elements=100)
INT64 = st.integers(-(2**63), 2**63 - 1)
MAGIC, STEP, SLOT, KIND, DTYPE, NUMBER, AXES, SIZES = range(8)


def refusal(header: Tensor, expected: Expected = ANY, message_id: MessageId = DUE) -> str:
    with pytest.raises(MalformedMessageError) as raised:
        decode(header, message_id, expected)
    assert raised.value.rank is None
    message = str(raised.value)
    assert message.startswith(f"Expected the {message_id}; what came ")
    return message


def changed(word: int, value: int, shape: tuple[int, ...] = (2, 5)) -> Tensor:
    header = encode(DUE, shape, torch.float32)
    header[word] = value
    return header


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (100,), (2, 5), (0, 4), (4, 0), (1,) * 8])
def test_what_was_encoded_is_decoded(shape: tuple[int, ...], dtype: torch.dtype, kind: Kind) -> None:
    message_id = MessageId(3, 0, kind)
    header = encode(message_id, shape, dtype, number=64)
    assert (header.shape, header.dtype, header.device.type) == ((HEADER_WORDS,), torch.int64, "cpu")
    allowed = dataclasses.replace(ANY, numbers=range(64, 65))
    assert decode(header, message_id, allowed) == Header(shape, dtype, 64)
    assert decode(header, message_id, dataclasses.replace(allowed, shape=shape, most_elements=0)) == Header(shape, dtype, 64)


@pytest.mark.parametrize("expected", [Expected(DTYPES, 10, samples=2), Expected.like(torch.ones(2, 5))])
def test_all_that_is_known_of_the_shape_may_agree(expected: Expected) -> None:
    assert decode(encode(DUE, (2, 5), torch.float32), DUE, expected).shape == (2, 5)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2,), torch.int64), ((2,), torch.complex64), ((2,), torch.bool), ((1,) * 9, torch.float32)]
)
def test_what_cannot_cross_is_not_encoded(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(PipelineModelError, match="at most 8 axes: end the stage") as raised:
        encode(DUE, shape, dtype)
    assert f"shape {shape} and dtype {dtype}" in str(raised.value)


class TestMalformed:
    @pytest.mark.parametrize("value", [0, -1, 2**63 - 1, -(2**63)])
    def test_magic(self, value: int) -> None:
        assert f"word {value}, not" in refusal(changed(MAGIC, value))

    def test_version(self) -> None:
        other = int(encode(DUE, (), torch.float32)[MAGIC]) + 1
        assert "does not begin as a header of this version does" in refusal(changed(MAGIC, other))

    @pytest.mark.parametrize("value", [0, 5, -1, 2**62])
    def test_kind(self, value: int) -> None:
        assert f"unknown kind {value}" in refusal(changed(KIND, value))

    @pytest.mark.parametrize("value", [4, -1, 2**62])
    def test_dtype_out_of_range(self, value: int) -> None:
        assert f"has dtype number {value}, and allowed are torch.float32, torch.float64" in refusal(changed(DTYPE, value))

    def test_dtype_not_allowed(self) -> None:
        expected = Expected((torch.float16,), 100)
        assert "has dtype torch.float32, and allowed are torch.float16" in refusal(changed(DTYPE, 0), expected)

    @pytest.mark.parametrize("value", [-1, 9, 2**62])
    def test_axes(self, value: int) -> None:
        assert f"announces {value} axes, and there can be 0 to 8" in refusal(changed(AXES, value))

    @pytest.mark.parametrize("word", [SIZES, SIZES + 1, HEADER_WORDS - 1])
    def test_negative_sizes(self, word: int) -> None:
        assert "must not be negative" in refusal(changed(word, -2))

    @pytest.mark.parametrize("word", [SIZES + 2, HEADER_WORDS - 1])
    def test_sizes_behind_the_axes(self, word: int) -> None:
        assert "be 0 from there on" in refusal(changed(word, 1))

    def test_fewer_axes_than_sizes(self) -> None:
        assert "announces 1 axes and the sizes [2, 5," in refusal(changed(AXES, 1))

    @pytest.mark.parametrize("shape", [(101,), (11, 10), (2**62,), (2**62,) * 8, (2**32, 2**32), (0, 101), (2**62, 0, 2**62)])
    def test_too_large(self, shape: tuple[int, ...]) -> None:
        message = refusal(encode(DUE, shape, torch.float32))
        assert f"announces sizes {list(shape)}, and there is memory for 100 elements" in message

    @pytest.mark.parametrize("shape", [(5, 2), (2, 5, 1), (10,), (), (2**62, 2**62)])
    def test_shape(self, shape: tuple[int, ...]) -> None:
        message = refusal(encode(DUE, shape, torch.float32), Expected.like(torch.ones(2, 5)))
        assert f"announces shape {shape}, not (2, 5)" in message

    @pytest.mark.parametrize("shape", [(1, 2), (5, 2), ()])
    def test_samples(self, shape: tuple[int, ...]) -> None:
        message = refusal(encode(DUE, shape, torch.float32), dataclasses.replace(ANY, samples=2))
        assert f"{shape}, whose first axis should have 2 samples" in message

    @pytest.mark.parametrize("value", [-1, 0, 9, 2**62])
    def test_number(self, value: int) -> None:
        message = refusal(changed(NUMBER, value), dataclasses.replace(ANY, numbers=range(1, 9)))
        assert f"carries the number {value}, and allowed are 1 to 8" in message

    def test_a_signal_has_no_number(self) -> None:
        assert "carries the number 64, and allowed are 0 to 0" in refusal(changed(NUMBER, 64))


class TestMessageId:
    @pytest.mark.parametrize(
        "message_id", [MessageId(7, 1, Kind.ACTIVATION), MessageId(6, 2, Kind.ACTIVATION), MessageId(6, 9, Kind.ACTIVATION)]
    )
    def test_duplicate_or_late(self, message_id: MessageId) -> None:
        message = refusal(encode(message_id, (2, 5), torch.float32))
        assert f"is a duplicate or late: the activation of step {message_id.step}, micro-batch {message_id.slot}." in message

    @pytest.mark.parametrize(
        "message_id", [MessageId(7, 3, Kind.ACTIVATION), MessageId(8, 2, Kind.ACTIVATION), MessageId(8, 0, Kind.ACTIVATION)]
    )
    def test_early(self, message_id: MessageId) -> None:
        message = refusal(encode(message_id, (2, 5), torch.float32))
        assert f"is early, or one before it was left out: the activation of step {message_id.step}" in message

    @pytest.mark.parametrize("kind", [Kind.GRADIENT, Kind.NOTE_ACTIVATION, Kind.NOTE_GRADIENT])
    def test_of_another_kind(self, kind: Kind) -> None:
        message_id = MessageId(7, 2, kind)
        assert f"is of another kind: the {message_id}." in refusal(encode(message_id, (2, 5), torch.float32))
        assert "is of another kind: the activation" in refusal(encode(DUE, (2, 5), torch.float32), message_id=message_id)

    def test_which_message_matters_more_than_what_is_in_it(self) -> None:
        assert "duplicate" in refusal(encode(MessageId(1, 1, Kind.ACTIVATION), (2**62,), torch.float32))


def test_the_error_is_one_of_ours_and_no_lost_connection() -> None:
    assert issubclass(MalformedMessageError, SentinelError)
    assert not issubclass(MalformedMessageError, RuntimeError)


# Words that get past one check or another more often than any do.
WORDS = st.one_of(INT64, st.integers(-2, 10), st.sampled_from([7, 2, 1, 2**31, 2**32, 2**62]))
EXPECTED = st.builds(
    Expected,
    dtypes=st.lists(st.sampled_from(DTYPES), unique=True, max_size=4).map(tuple),
    most_elements=st.integers(0, 1000),
    shape=st.none() | st.lists(st.integers(0, 5), max_size=8).map(tuple),
    samples=st.none() | st.integers(0, 5),
    numbers=st.builds(range, st.integers(0, 3), st.integers(0, 9)),
)


def believed_or_refused(words: Tensor, expected: Expected) -> None:
    """The only two things that may happen, and what is believed is what was allowed."""
    try:
        header = decode(words, DUE, expected)
    except MalformedMessageError:
        behind = extent(words, expected)
        if behind is not None:
            message_id, dtype, elements = behind
            assert 0 <= elements <= expected.most_elements and dtype in DTYPES and message_id.kind in Kind
        return
    assert torch.equal(encode(DUE, header.shape, header.dtype, header.number), words)
    assert header.dtype in expected.dtypes and header.number in expected.numbers
    if expected.shape is not None:
        assert header.shape == expected.shape
    else:
        assert torch.empty(header.shape, device="meta").numel() <= expected.most_elements
        assert expected.samples in (None, *header.shape[:1])


@settings(max_examples=300, deadline=None)
@given(st.lists(INT64, min_size=HEADER_WORDS, max_size=HEADER_WORDS), EXPECTED)
def test_any_integers(words: list[int], expected: Expected) -> None:
    with pytest.raises(MalformedMessageError):
        decode(torch.tensor(words), DUE, expected)


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS, min_size=HEADER_WORDS - 4, max_size=HEADER_WORDS - 4), EXPECTED)
def test_any_integers_behind_the_right_place(words: list[int], expected: Expected) -> None:
    header = torch.cat((encode(DUE, (), torch.float32)[:4], torch.tensor(words)))
    believed_or_refused(header, expected)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=8), st.sampled_from(DTYPES), st.integers(0, HEADER_WORDS - 1), WORDS, EXPECTED)
def test_one_word_changed(shape: list[int], dtype: torch.dtype, word: int, value: int, expected: Expected) -> None:
    header = encode(DUE, shape, dtype)
    header[word] = value
    believed_or_refused(header, expected)
    believed_or_refused(header, ANY)


class TestAllowance:
    @pytest.fixture(autouse=True)
    def _memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=64_000))

    def test_the_first_may_fill_a_quarter_of_the_memory_that_is_free(self) -> None:
        expected = Allowance().expected()
        assert expected.most_elements * torch.float32.itemsize == 64_000 / 4
        assert (expected.dtypes, expected.shape, expected.numbers) == (DTYPES, None, range(1))

    @settings(derandomize=True, deadline=None, max_examples=50)
    @given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6))
    def test_later_ones_may_be_sixteen_times_the_largest(self, sizes: list[int]) -> None:
        allowance = Allowance()
        for size in sizes:
            allowance.saw(torch.empty(size))
        # Signals without elements say nothing of how large others may be.
        assert allowance.expected().most_elements == (16 * max(sizes) or 4000)

    def test_numbers_are_those_that_are_asked_for(self) -> None:
        assert Allowance().expected(numbers=range(1, 9)).numbers == range(1, 9)

    @pytest.mark.parametrize(("elements", "fits"), [(160, True), (161, False)])
    def test_it_decides_what_is_believed(self, elements: int, fits: bool) -> None:
        allowance = Allowance()
        allowance.saw(torch.empty(2, 5))
        header = encode(DUE, (elements,), torch.float32)
        if fits:
            assert decode(header, DUE, allowance.expected()).shape == (elements,)
        else:
            assert "there is memory for 160 elements" in refusal(header, allowance.expected())
