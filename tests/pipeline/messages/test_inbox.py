from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sentinel.errors import MalformedMessageError
from lightning_sentinel.pipeline.messages.headers import NOTHING, Expected, Kind, MessageId
from lightning_sentinel.pipeline.messages.inbox import Inbox

NO = torch.tensor(False)
SENDER = 5
CHANNELS = 4


def at(slot: int, kind: Kind = Kind.ACTIVATION) -> MessageId:
    return MessageId(7, slot, kind)


class Sender:
    """In place of a transport: what it is to hand out next, or to raise."""

    def __init__(self) -> None:
        self.next: list[Tensor | MalformedMessageError] = []
        self.is_new_shape = 0
        self.expected: list[Expected] = []

    def receive(self, rank: int, message_id: MessageId, expected: Expected) -> tuple[Tensor, Tensor, int]:
        assert rank == SENDER
        self.expected.append(expected)
        message = self.next.pop(0)
        if isinstance(message, MalformedMessageError):
            raise message
        return message, NO, self.is_new_shape


def work_on(activation: Tensor, slot: int) -> Tensor:
    """Layers that work on any number of samples and positions."""
    return activation @ torch.ones(CHANNELS, 2)


def malformed(taken: bool = True) -> MalformedMessageError:
    return MalformedMessageError("Rank 5 sent a malformed message.", rank=SENDER, taken=taken)


@pytest.fixture
def sender() -> Sender:
    return Sender()


@pytest.fixture
def inbox(sender: Sender) -> Inbox:
    transport: Any = sender
    inbox = Inbox(transport, torch.device("cpu"), work_on)
    inbox.begin(replaces=True)
    return inbox


def received(inbox: Inbox, sender: Sender, *messages: Tensor | MalformedMessageError, samples: int = 2) -> list[Tensor]:
    sender.next += messages
    return [inbox.activation(SENDER, at(slot), samples)[0] for slot in range(len(messages))]


USUAL = torch.ones(2, 3, CHANNELS)


def is_nothing(signal: Tensor, shape: tuple[int, ...]) -> bool:
    return signal.shape == shape and bool(signal.isnan().all())


@pytest.mark.filterwarnings("ignore:Rank 5")
class TestMalformed:
    def test_a_signal_that_is_not_finite_takes_its_place(self, inbox: Inbox, sender: Sender) -> None:
        first, second, third = received(inbox, sender, USUAL.half(), malformed(), USUAL.half())
        assert torch.equal(first, USUAL) and torch.equal(third, USUAL)
        assert is_nothing(second, (2, 3, CHANNELS)) and second.dtype == torch.float16

    def test_it_has_as_many_samples_as_the_micro_batch(self, inbox: Inbox, sender: Sender) -> None:
        received(inbox, sender, USUAL)
        assert is_nothing(received(inbox, sender, malformed(), samples=9)[0], (9, 3, CHANNELS))

    def test_unless_samples_are_not_along_the_first_axis(self, inbox: Inbox, sender: Sender) -> None:
        received(inbox, sender, USUAL, samples=3)
        assert is_nothing(received(inbox, sender, malformed(), samples=9)[0], (2, 3, CHANNELS))

    def test_a_gradient_has_the_shape_of_the_output(self, inbox: Inbox, sender: Sender) -> None:
        sender.next.append(malformed())
        signal, tainted = inbox.gradient(SENDER, at(0, Kind.GRADIENT), torch.ones(7, 2))
        assert is_nothing(signal, (7, 2)) and not tainted

    def test_the_first_signal_of_all_ends_the_run(self, inbox: Inbox, sender: Sender) -> None:
        with pytest.raises(MalformedMessageError):
            received(inbox, sender, malformed())

    def test_what_is_still_on_the_wire_ends_the_run(self, inbox: Inbox, sender: Sender) -> None:
        with pytest.raises(MalformedMessageError):
            received(inbox, sender, USUAL, malformed(taken=False))
        sender.next = [malformed(taken=False)]
        with pytest.raises(MalformedMessageError):
            inbox.gradient(SENDER, at(0, Kind.GRADIENT), torch.ones(7, 2))

    def test_nothing_is_replaced_where_nobody_would_answer(self, inbox: Inbox, sender: Sender) -> None:
        received(inbox, sender, USUAL)
        inbox.begin(replaces=False)
        with pytest.raises(MalformedMessageError):
            received(inbox, sender, malformed())
        sender.next = [malformed()]
        with pytest.raises(MalformedMessageError):
            inbox.gradient(SENDER, at(0, Kind.GRADIENT), torch.ones(7, 2))


def test_said_once(inbox: Inbox, sender: Sender) -> None:
    received(inbox, sender, USUAL)
    with pytest.warns(RuntimeWarning, match=r"Rank 5 sent .* counts as a signal that is not finite") as said:
        received(inbox, sender, malformed(), malformed())
    assert len(said) == 1


@pytest.mark.filterwarnings("ignore:Rank 5")
class TestShapes:
    def test_samples_of_other_lengths_are_ordinary(self, inbox: Inbox, sender: Sender) -> None:
        """Whoever loaded them says that they are new; and of the next stages each knows that it is new to itself."""
        received(inbox, sender, USUAL)
        sender.is_new_shape = 1
        (longer,) = received(inbox, sender, torch.ones(2, 8, CHANNELS))
        assert longer.shape == (2, 8, CHANNELS) and inbox.is_new_shape(0)

    def test_news_travels_on(self, inbox: Inbox, sender: Sender) -> None:
        received(inbox, sender, USUAL)
        assert inbox.is_new_shape(0), "the first shape of all"
        received(inbox, sender, USUAL)
        assert not inbox.is_new_shape(0)
        sender.is_new_shape = 1
        received(inbox, sender, USUAL)
        assert inbox.is_new_shape(0), "to the sender, if not to this stage"

    def test_a_shape_that_is_new_and_works_is_believed(self, inbox: Inbox, sender: Sender) -> None:
        """A worker that has just taken over a lane has not seen all that its neighbours have."""
        received(inbox, sender, USUAL)
        assert received(inbox, sender, torch.ones(2, 8, CHANNELS))[0].shape == (2, 8, CHANNELS)

    def test_one_that_the_layers_fail_on_is_malformed(self, inbox: Inbox, sender: Sender) -> None:
        received(inbox, sender, USUAL)
        with pytest.warns(RuntimeWarning, match=r"Rank 5 sent the activation .* in shape \(2, 3, 3\), on which .* RuntimeError"):
            (signal,) = received(inbox, sender, torch.ones(2, 3, CHANNELS - 1))
        assert is_nothing(signal, (2, 3, CHANNELS))

    def test_if_it_is_news_to_the_sender_too_the_model_is_to_speak(self, inbox: Inbox, sender: Sender) -> None:
        """Samples that the model cannot work on are nobody's lie: the layers' own error is to end the run."""
        received(inbox, sender, USUAL)
        sender.is_new_shape = 1
        (signal,) = received(inbox, sender, torch.ones(2, 3, CHANNELS - 1))
        assert signal.shape == (2, 3, CHANNELS - 1)

    def test_the_first_stage_knows_what_it_loaded(self, inbox: Inbox) -> None:
        is_new_shape = []
        for slot, inputs in enumerate((USUAL, USUAL, torch.ones(2, 8, CHANNELS), [USUAL], USUAL)):
            inbox.loaded(inputs, slot)
            is_new_shape.append(inbox.is_new_shape(slot))
        assert is_new_shape == [True, False, True, True, False]

    def test_the_number_of_samples_is_checked(self, inbox: Inbox, sender: Sender) -> None:
        received(inbox, sender, USUAL, USUAL)
        assert [expected.samples for expected in sender.expected] == [None, 2]
        inbox.begin(replaces=False)
        received(inbox, sender, USUAL)
        assert sender.expected[-1].samples is None, "nobody says that a plain pipeline has its samples along the first axis"


@pytest.mark.parametrize("evaluation", [True, False])
def test_nothing_comes_in_an_evaluation_only(inbox: Inbox, sender: Sender, evaluation: bool) -> None:
    """Of whatever dtype, and the next activation is judged by those before it."""
    inbox.begin(replaces=False, lets_nothing_in=evaluation)
    sender.next = [torch.ones(2, CHANNELS, dtype=torch.bfloat16), torch.empty(0)]
    inbox.activation(SENDER, at(0), 2)
    sender.is_new_shape = NOTHING
    if not evaluation:
        inbox.activation(SENDER, at(1), 2)
        assert NOTHING not in sender.expected[-1].numbers and sender.expected[-1].dtypes == (torch.bfloat16,)
        return
    assert inbox.activation(SENDER, at(1), 2)[0] is None
    assert NOTHING in sender.expected[-1].numbers and torch.float32 in sender.expected[-1].dtypes
    inbox.begin(replaces=True)
    sender.next, sender.is_new_shape = [torch.ones(2, CHANNELS, dtype=torch.bfloat16)], 0
    inbox.activation(SENDER, at(0), 2)
    assert sender.expected[-1].dtypes == (torch.bfloat16,)
