"""What malicious workers say beside the signals that they send."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from lightning_sentinel.attacks import Adversary, Site, get
from lightning_sentinel.attacks.wrappers import parts_of
from lightning_sentinel.errors import ConfigurationError
from lightning_sentinel.mesh import Direction, Mesh, Worker

MESH = Mesh(stages=3, replicas=5)
LIAR, ALLY, HONEST = (Worker(1, replica) for replica in range(3))
A, G = Direction.ACTIVATION, Direction.GRADIENT
ROW, USUAL = torch.tensor([0.5, -2.0, 0.0]), torch.tensor([1.0, torch.nan, 0.0])


def adversary(attack, **options):
    return Adversary(attack, MESH, workers=[LIAR, ALLY], **options)


def told(attack, sender, row=ROW):
    return adversary(attack).row(row, USUAL, LIAR, sender, A, step=3, micro_batch=1).tolist()


def test_a_row_of_an_ally_is_the_usual_one_as_far_as_that_is_known():
    assert told("false_rows", ALLY) == [1.0, -2.0, 0.0]
    assert told("false_rows", HONEST) == ROW.tolist()
    assert told({"name": "false_rows", "hide": None}, ALLY) == ROW.tolist()


def test_an_ally_can_be_called_tainted_and_others_odd():
    attack = {"name": "false_rows", "hide": "taint", "invent": 3.0}
    assert told(attack, ALLY) == [0.5, -2.0, 1.0]
    assert told(attack, HONEST) == [3.5, 1.0, 0.0]


def test_a_false_note_is_that_on_other_samples_and_honest_for_allies():
    values = torch.arange(12.0).view(3, 2, 2)
    lies = adversary({"name": "false_notes", "strength": 0.25})
    note = lies.note(values, LIAR, HONEST, A, step=0, micro_batch=0)
    torch.testing.assert_close(note, 0.75 * values + 0.25 * values[[2, 0, 1]])
    assert torch.equal(lies.note(values, LIAR, ALLY, A, step=0, micro_batch=0), values)
    single = adversary("false_notes").note(values[:1], LIAR, HONEST, A, step=0, micro_batch=0)
    assert torch.equal(single, values[:1].flip(1)), "of one sample the positions are exchanged"


@pytest.mark.parametrize(
    ("attack", "votes"),
    [
        ("false_votes", {(0, HONEST): 1, (1, HONEST): 1, (0, ALLY): 0, (1, ALLY): 0}),
        ({"name": "false_votes", "accuse": False}, {(0, HONEST): 0, (1, HONEST): 1, (1, ALLY): 0}),
        ({"name": "false_votes", "cover": False}, {(0, HONEST): 1, (0, ALLY): 0, (1, ALLY): 1}),
    ],
)
def test_votes(attack, votes):
    lies = adversary(attack)
    assert {(word, about): lies.vote(word, LIAR, about, G, step=0) for word, about in votes} == votes
    assert lies.vote(0, HONEST, HONEST, G, step=0) == 0, "who is honest says what it found"


def test_what_is_committed_to_is_another_signal_at_the_end_that_lies_and_true_to_allies():
    signal, before, behind = torch.tensor([2.0, -1.0]), Worker(0, 0), Worker(2, 4)

    def sides(attack):
        """Whether it lies as the sender and as the receiver of activations, then of gradients."""
        ends = [(A, behind), (A, before), (G, before), (G, behind)]
        said = [adversary(attack).commitment(signal, LIAR, neighbour, direction, 0, 0) for direction, neighbour in ends]
        assert all(torch.equal(one, signal) or torch.equal(one, -signal) for one in said)
        return [not torch.equal(one, signal) for one in said]

    assert sides("equivocate") == [True] * 4
    assert sides({"name": "equivocate", "side": "sender"}) == [True, False, True, False]
    assert sides({"name": "equivocate", "side": "receiver"}) == [False, True, False, True]
    lies = Adversary("equivocate", MESH, workers=[LIAR, before])
    assert torch.equal(lies.commitment(signal, LIAR, before, A, 0, 0), signal)
    assert torch.equal(lies.commitment(signal, behind, LIAR, A, 0, 0), signal), "who is honest says what it found"


def test_a_share_of_messages_is_lied_about_and_the_same_ones_when_a_step_is_done_again():
    lies = adversary({"name": "equivocate", "probability": 0.25})
    places = [(step, slot) for step in range(200) for slot in range(2)]
    first, again = ([float(lies.commitment(torch.ones(1), LIAR, HONEST, A, *place)) for place in places] for _ in range(2))
    # Of 400 draws the share has a standard deviation of 0.022.
    assert first == again and first.count(-1.0) / len(places) == pytest.approx(0.25, abs=0.07)


def test_words_are_false_in_the_steps_and_directions_that_are_attacked():
    lies = adversary("false_votes", start_step=4, direction="gradient")
    assert [lies.vote(0, LIAR, HONEST, direction, step) for direction in (A, G) for step in (3, 4)] == [0, 0, 0, 1]


def test_one_worker_can_lie_in_several_roles():
    attack = {"name": "several", "attacks": ["scale", {"name": "scale", "factor": 3.0}, "false_votes"]}
    lies = adversary(json.loads(json.dumps(attack)))
    assert lies.tamper(torch.ones(1), LIAR, A, step=0, micro_batch=0).item() == -3.0
    assert lies.vote(0, LIAR, HONEST, A, step=0) == 1
    assert {site: bool(lies.liars(site)) for site in (Site.MESSAGE, Site.ROWS, Site.NOTES, Site.VOTES)} == {
        Site.MESSAGE: True,
        Site.ROWS: False,
        Site.NOTES: False,
        Site.VOTES: True,
    }
    assert lies.fails(LIAR, 0) is None


def test_parts_with_a_memory_are_the_workers_own():
    lies = adversary({"name": "several", "attacks": [{"name": "delay", "steps": 1}, "false_votes"]})
    first, second = (lies.attack_of(worker).attacks[0] for worker in (LIAR, ALLY))
    assert first == second and first is not second
    sent = [lies.tamper(torch.full((1,), float(step)), LIAR, A, step, 0).item() for step in range(3)]
    assert sent == [0.0, 0.0, 1.0]


def test_wrappers_around_several_draw_once_for_all_of_them():
    lies = adversary({"name": "intermittent", "attack": {"name": "several", "attacks": ["zeros", "false_votes"]}})
    lied = [lies.tamper(torch.ones(1), LIAR, A, step, 0).item() == 0 for step in range(30)]
    voted = [lies.vote(0, LIAR, HONEST, A, step) == 1 for step in range(30)]
    assert lied == voted and len(set(lied)) == 2
    assert [type(part).__name__ for part in parts_of(get("collude"))] == ["Collude"]


def test_faults_and_roles_go_together():
    lies = adversary({"name": "several", "attacks": [{"name": "gradient_contribution", "factor": 2.0}, "bad_rows"]})
    assert lies.fails(LIAR, 0) is Site.LAYER
    assert lies.weight_gradient(torch.ones(1), LIAR, 0, 0, 0).item() == 2.0
    assert lies.layer_output(torch.ones(8, 2), LIAR, 0, 0).sum() < 16


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{name: false_rows, hide: all}", r"FalseRows\(hide='all'\) \(str\) cannot work: hide must be 'usual', 'taint' or None"),
        ("{name: false_rows, invent: .nan}", r"FalseRows\(invent=nan\) cannot work"),
        ("{name: false_notes, strength: 0}", r"FalseNotes\(strength=0\) cannot work: strength must be a number above 0"),
        ("{name: false_votes, accuse: false, cover: false}", r"FalseVotes\(cover=False\) cannot work"),
        (
            "{name: equivocate, side: left}",
            r"Equivocate\(side='left'\) \(str\) cannot work: side must be 'sender', 'receiver' or 'both'",
        ),
        ("{name: equivocate, probability: 0}", r"Equivocate\(.*\) cannot work: probability must be a number above 0"),
        ("{name: several, attacks: []}", r"Several\(attacks=\[\]\) cannot work: attacks must be a list of at least one"),
        ("{name: several, attacks: zeros}", r"Several\(attacks='zeros'\) cannot work"),
        ("{name: several, attacks: [zero]}", "There is no attack 'zero'"),
    ],
)
def test_what_cannot_work_is_said(written, message):
    with pytest.raises(ConfigurationError, match=message):
        adversary(yaml.safe_load(written))
