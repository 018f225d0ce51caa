from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_sentinel.errors import ConfigurationError, MissingExtraError
from lightning_sentinel.metrics import AnomalyScore

mpl.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

STAGES, REPLICAS = 3, 4


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def steps_of_scores(steps: int, seed: int = 0) -> Tensor:
    """Scores as a run gives them: no activation of the last stage, no gradient of the first, some signals unscored."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(steps, STAGES, REPLICAS, 2, generator=generator) * 2
    scores[torch.rand(scores.shape, generator=generator) < 0.2] = math.nan
    scores[:, -1, :, 0] = math.nan
    scores[:, 0, :, 1] = math.nan
    return scores


def metric_of(scores: Tensor) -> AnomalyScore:
    metric = AnomalyScore(STAGES, REPLICAS)
    for step in scores:
        metric.update(step)
    return metric


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:All-NaN")
def test_means_are_numpys() -> None:
    scores = steps_of_scores(20)
    metric = metric_of(scores)
    means = np.nanmean(scores.double().numpy(), axis=0)
    np.testing.assert_allclose(metric.matrix().numpy(), np.nanmax(means, axis=-1), rtol=1e-5)
    assert metric.compute().shape == ()
    assert metric.compute().item() == pytest.approx(np.nanmax(means), rel=1e-5)
    assert metric.latest.item() == pytest.approx(np.nanmax(scores[-1].numpy()))


def test_the_mean_leaves_out_steps_without_a_score() -> None:
    metric = AnomalyScore(1, 1)
    for score in (2.0, math.nan, 4.0):
        metric.update(torch.tensor([[[score, math.nan]]]))
    assert metric.compute().item() == 3.0
    assert metric.count.tolist() == [[[2, 0]]]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_scored_is_nan() -> None:
    metric = AnomalyScore(STAGES, REPLICAS)
    assert metric.compute().isnan()
    metric.update(torch.full((STAGES, REPLICAS, 2), math.nan))
    assert metric.compute().isnan() and metric.latest.isnan() and metric.matrix().isnan().all()


def test_a_worker_without_scores_is_nan_in_the_matrix_only() -> None:
    scores = steps_of_scores(20)
    scores[:, 1, 2] = math.nan
    metric = metric_of(scores)
    assert metric.matrix().isnan().nonzero().tolist() == [[1, 2]]
    assert metric.compute().isfinite()


def test_one_step_that_is_far_out_does_not_hide_the_others() -> None:
    scores = torch.full((1000, 2, 2, 2), 0.5)
    scores[3, 0, 1, 0] = 1e6
    metric = AnomalyScore(2, 2)
    assert max(metric(step).item() for step in scores) == 1e6
    assert metric.compute().item() == pytest.approx(0.5 + 9.5 / 1000)
    assert metric.matrix()[1].tolist() == [0.5, 0.5]


def test_an_infinite_score_stays_infinite() -> None:
    scores = steps_of_scores(20)
    scores[0, 1, 1, 0] = math.inf
    metric = metric_of(scores)
    assert metric.compute().item() == math.inf
    assert metric.matrix().isinf().nonzero().tolist() == [[1, 1]]
    assert metric.latest.isfinite()


@pytest.mark.parametrize("shape", [(STAGES, REPLICAS), (REPLICAS, STAGES, 2), (STAGES, REPLICAS, 3), ()])
def test_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"\(stages, replicas, directions\) = \(3, 4, 2\)"):
        AnomalyScore(STAGES, REPLICAS).update(torch.zeros(shape))


def test_a_mesh_without_workers_is_refused() -> None:
    with pytest.raises(ConfigurationError):
        AnomalyScore(0, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_of_any_precision_are_summed_in_the_states(dtype: torch.dtype) -> None:
    metric = metric_of(steps_of_scores(5).to(dtype))
    assert metric.total.dtype == torch.float32
    assert metric.compute().isfinite()


def test_calling_it_returns_the_highest_score_of_the_step_and_accumulates() -> None:
    scores = steps_of_scores(6)
    scores[0] += 10  # the first step is the highest: a running maximum would show
    called, updated = AnomalyScore(STAGES, REPLICAS), metric_of(scores)
    for step in scores:
        value = called(step)
        assert value.item() == called.latest.item() == np.nanmax(step.numpy())
    torch.testing.assert_close(called.matrix(), updated.matrix(), equal_nan=True)
    assert called.latest == updated.latest


def test_scores_carry_no_graph_into_the_state() -> None:
    scores = steps_of_scores(1)[0].requires_grad_()
    metric = AnomalyScore(STAGES, REPLICAS)
    metric(scores)
    assert not metric.total.requires_grad and not metric.latest.requires_grad


def test_it_survives_inference_mode() -> None:
    metric = AnomalyScore(STAGES, REPLICAS)
    with torch.inference_mode():
        metric.update(steps_of_scores(1)[0])
        metric.reset()
    metric.update(steps_of_scores(1)[0])
    assert metric.compute().isfinite()


def test_merging_two_is_updating_one() -> None:
    scores = steps_of_scores(9)
    first, second, both = metric_of(scores[:4]), metric_of(scores[4:]), metric_of(scores)
    highest = max(first.latest, second.latest)
    first.merge_state(second)
    torch.testing.assert_close(first.matrix(), both.matrix(), equal_nan=True)
    torch.testing.assert_close(first.compute(), both.compute())
    assert first.latest == highest


def test_merging_with_one_that_saw_nothing_changes_nothing() -> None:
    metric = metric_of(steps_of_scores(3))
    value, latest = metric.compute(), metric.latest
    metric.merge_state(AnomalyScore(STAGES, REPLICAS))
    assert metric.compute() == value and metric.latest == latest


def test_ranks_that_know_the_same_agree_with_one_that_is_alone() -> None:
    world = {
        "dist_sync_fn": lambda state, group=None: [state, state, state],
        "distributed_available_fn": lambda: True,
    }
    metric, alone = AnomalyScore(STAGES, REPLICAS, **world), metric_of(steps_of_scores(5))
    for step in steps_of_scores(5):
        metric.update(step)
    torch.testing.assert_close(metric.compute(), alone.compute())
    assert torch.equal(metric.count, alone.count), "compute() must leave the local state as it was"


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_reset_forgets() -> None:
    metric = metric_of(steps_of_scores(3))
    metric.reset()
    assert metric.compute().isnan() and metric.latest.isnan() and not metric.count.any()


def test_pickle_and_deepcopy_keep_the_value() -> None:
    metric = metric_of(steps_of_scores(3))
    for twin in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric), metric.clone()):
        twin.update(steps_of_scores(1, seed=1)[0])
        assert twin.latest != metric.latest
        assert twin.mesh == metric.mesh


def test_state_dict_round_trip() -> None:
    metric, other = metric_of(steps_of_scores(3)), AnomalyScore(STAGES, REPLICAS)
    assert metric.state_dict() == {}
    metric.persistent(True)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    torch.testing.assert_close(other.matrix(), metric.matrix(), equal_nan=True)


def test_it_works_in_a_collection() -> None:
    collection = MetricCollection({"anomaly": AnomalyScore(STAGES, REPLICAS)})
    collection.update(steps_of_scores(1)[0])
    assert collection.compute()["anomaly"].isfinite()


def test_plot_writes_every_value_into_its_cell() -> None:
    scores = steps_of_scores(4)
    scores[:, 1, 2] = math.nan
    scores[:, 0, 3, 0] = math.inf
    metric = metric_of(scores)
    figure, ax = metric.plot()
    figure.canvas.draw()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("replica", "stage")
    written = {text.get_position(): text.get_text() for text in ax.texts}
    assert len(written) == STAGES * REPLICAS
    assert (written[2, 1], written[3, 0]) == ("-", "inf")
    assert written[0, 2] == f"{metric.matrix()[2, 0]:.3g}"


def test_plot_marks_the_fence_in_the_colour_scale() -> None:
    figure, ax = metric_of(steps_of_scores(1)).plot()
    (image,) = ax.get_images()
    assert image.norm(1.0) == 0.5
    bar = image.colorbar.ax
    assert bar is figure.axes[1]
    assert any("fence" in label.get_text() for label in bar.get_yticklabels())
    assert any(set(line.get_ydata()) == {1.0} for line in bar.get_lines())


def test_plot_draws_on_given_axes_and_given_values() -> None:
    figure, ax = plt.subplots()
    returned = AnomalyScore(2, 2).plot(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), ax=ax)
    assert returned == (figure, ax)
    assert [text.get_text() for text in ax.texts] == ["0", "1", "2", "3"]


def test_plot_of_values_over_steps_is_a_curve() -> None:
    metric = AnomalyScore(STAGES, REPLICAS)
    values = [metric(step) for step in steps_of_scores(5)]
    figure, ax = metric.plot(values)
    assert isinstance(figure, plt.Figure)
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), torch.stack(values).numpy())
    assert metric.plot(values[0])[1].get_ylabel() == "AnomalyScore"


def test_plot_refuses_a_matrix_of_another_mesh() -> None:
    with pytest.raises(ConfigurationError, match=r"matrix\(\)"):
        AnomalyScore(2, 2).plot(torch.zeros(2, 3))


@pytest.mark.parametrize("module", ["matplotlib", "matplotlib.pyplot"])
def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    metric = metric_of(steps_of_scores(1))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"AnomalyScore\.plot\(\).*lightning-sentinel\[report\]"):
        metric.plot()
