"""The seeds' methods as published, quirks included, and what they cannot do."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from wsiscale.criteria import (
    CRITERIA,
    Criterion,
    bagamaev2022,
    bagamaev2022_grid,
    bagamaev2022_with_labels,
    find_criterion,
    peak,
    penkin2022,
    penkin2022_grid,
    penkin2023,
)
from wsiscale.errors import OptionError
from wsiscale.geometry import scale_grid
from wsiscale.testing.responses import noise_response, planted_response, response_of
from wsiscale.types import LayerMoments, ScaleResponse

SEEDS = [CRITERIA[name] for name in ("confidence", "penkin2022", "penkin2023", "bagamaev2022")]
WITH_RULE = pytest.mark.parametrize("criterion", [c for c in SEEDS if c.decide is not None], ids=lambda c: c.name)
ALL = pytest.mark.parametrize("criterion", SEEDS, ids=lambda c: c.name)

# How near to a planted optimum, on a grid of 8 per octave; the mode of the votes is on the grid, and jumps.
OCTAVES = {"confidence": 0.1, "penkin2022": 0.1, "penkin2023": 0.25, "bagamaev2022": 0.1}


def answer(criterion: Criterion, response: ScaleResponse) -> float | None:
    if criterion.decide is not None:
        return criterion.decide(response)
    return peak(response.scales, criterion.score(response))


def staged(scales: NDArray[np.float64], *stages: list[list[float]]) -> ScaleResponse:
    """One place; each stage is its channels' curves over ascending magnification, as the paper draws them."""
    layers = {}
    for number, channels in enumerate(stages):
        mean = np.array(channels, np.float32).T[None, ::-1]  # (1, S, K), scale ascending
        layers[f"stage{number}"] = LayerMoments(mean=mean, square=mean**2)
    return ScaleResponse(scales=scales, slide_mpp=None, outputs=None, features=None, layers=layers, stages=tuple(layers))


def features_only(scales: NDArray[np.float64], features: NDArray[np.float64], weight: NDArray[np.float64]) -> ScaleResponse:
    return response_of(scales=scales, features=features, head_weight=weight)


# ---- peak ----


def test_a_parabola_on_the_log2_axis_is_found_exactly_on_even_and_uneven_grids() -> None:
    for scales in (scale_grid(0.5, 16, per_octave=2), np.array([0.5, 1.2, 2.5, 3.7, 4.1, 9.0])):
        for best in (1.3, 2.9, 3.9):
            assert peak(scales, -(np.log2(scales / best) ** 2)) == pytest.approx(best, rel=1e-9)


def test_a_peak_at_an_end_is_that_end() -> None:
    scales = scale_grid(1, 8)

    assert peak(scales, scales) == 8
    assert peak(scales, -scales) == 1
    assert peak(scales, np.minimum(scales, 6)) == 8  # a plateau that runs into the end may go on beyond it


def test_a_plateau_is_answered_by_its_middle_on_the_log2_axis() -> None:
    scales = np.array([0.5, 1, 2, 4, 8, 16])

    assert peak(scales, np.array([0, 0.9, 1, 1, 1, 0])) == pytest.approx(4)
    assert peak(scales, np.array([0, 1, 1, 0.5, 0, 0])) == pytest.approx(2**0.5)


def test_no_peak_is_nan_not_a_guess() -> None:
    scales = np.array([1.0, 2, 4])

    assert np.isnan(peak(scales, np.ones(3)))
    assert np.isnan(peak(scales, np.array([0, np.nan, 1])))
    assert np.isnan(peak(scales, np.array([0, np.inf, 1])))
    assert peak(scales[:1], np.ones(1)) == 1


# ---- find_criterion ----


def test_a_criterion_is_found_by_name_as_a_file_as_a_module_and_as_itself(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from wsiscale.criteria import Criterion\n"
        "def widest(response): return response.scales\n"
        "finest = Criterion('finest', lambda response: -response.scales, views=('rot90',))\n"
    )
    response = noise_response()

    assert find_criterion("penkin2023") is CRITERIA["penkin2023"]
    assert find_criterion(CRITERIA["confidence"]) is CRITERIA["confidence"]
    assert find_criterion(f"{own}:finest").views == ("rot90",)
    assert find_criterion(f"{own}:widest").score(response).tolist() == response.scales.tolist()
    assert find_criterion("wsiscale.criteria.confidence:score").layers == "auto"
    assert find_criterion(lambda r: r.scales).score(response).tolist() == response.scales.tolist()


def test_what_is_no_criterion_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there are confidence, penkin2022, penkin2023, bagamaev2022"):
        find_criterion("confidense")
    with pytest.raises(OptionError, match="is a tuple"):
        find_criterion("wsiscale.testing.responses:STAGES")
    with pytest.raises(OptionError, match=r"shape \(\); one score for each of the 41 scales"):
        find_criterion(lambda response: response.scales.mean()).score(noise_response())


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=list(CRITERIA))
def test_criteria_pickle_to_workers(criterion: Criterion) -> None:
    there = pickle.loads(pickle.dumps(criterion))

    assert (there.name, there.views, there.layers) == (criterion.name, criterion.views, criterion.layers)
    assert there == criterion or there.rows is not None  # a sum's parts compare by identity


# ---- every criterion ----


@ALL
def test_a_planted_optimum_in_the_middle_of_the_range_is_recovered(criterion: Criterion) -> None:
    for seed in range(5):
        response = planted_response(3.0, seed=seed)

        assert np.log2(answer(criterion, response) / 3.0) == pytest.approx(0, abs=OCTAVES[criterion.name])


@pytest.mark.parametrize("name", ["confidence", "penkin2022", "penkin2023"])
def test_a_planted_optimum_is_recovered_wherever_it_lies(name: str) -> None:
    for scale in (1.6, 5.0, 11.0):
        assert np.log2(answer(CRITERIA[name], planted_response(scale, seed=1)) / scale) == pytest.approx(0, abs=OCTAVES[name])


@ALL
def test_the_order_of_places_channels_and_classes_says_nothing(criterion: Criterion) -> None:
    response = planted_response(2.0, places=7, channels=5, classes=3, noise=0.2)
    k, c = np.array([3, 0, 4, 1, 2]), np.array([2, 0, 1])
    shuffled = replace(
        response.take(np.array([4, 2, 6, 0, 1, 5, 3])),
        features=response.features[[4, 2, 6, 0, 1, 5, 3]][..., k],
        head_weight=response.head_weight[c][:, k],
    )
    shuffled = replace(
        shuffled,
        outputs=replace(shuffled.outputs, probabilities=shuffled.outputs.probabilities[..., c]),
        layers={n: LayerMoments(m.mean[..., k], m.square[..., k]) for n, m in shuffled.layers.items()},
    )

    np.testing.assert_allclose(criterion.score(shuffled), criterion.score(response), rtol=1e-6)
    assert answer(criterion, shuffled) == pytest.approx(answer(criterion, response))


@ALL
def test_a_score_is_the_mean_of_the_places_own_scores(criterion: Criterion) -> None:
    response = noise_response(places=9)

    alone = [criterion.score(response.take(np.array([i]))) for i in range(9)]

    np.testing.assert_allclose(np.mean(alone, axis=0), criterion.score(response), rtol=1e-6)


@WITH_RULE
def test_a_decision_combines_the_places_own_decisions(criterion: Criterion) -> None:
    response = noise_response(places=9)

    alone = [criterion.decide(response.take(np.array([i]))) for i in range(9)]

    assert criterion.combine(np.array(alone, float)) == pytest.approx(criterion.decide(response))
    assert criterion.combine(np.array([np.nan, *alone], float)) == pytest.approx(criterion.decide(response))
    assert criterion.combine(np.array([np.nan])) is None


@ALL
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_an_answer_that_is_not_finite_gives_no_answer(criterion: Criterion, wrong: float) -> None:
    response = planted_response(3.0, places=3)
    response.outputs.confidence[1, 4] = wrong
    response.outputs.probabilities[1, 4, 0] = wrong
    response.features[1, 4, 2] = wrong
    response.layers["stage2"].mean[1, 4, 2] = wrong

    assert not np.isfinite(criterion.score(response)).all()
    assert np.isnan(peak(response.scales, criterion.score(response)))
    if criterion.decide is not None:
        assert criterion.decide(response) is None


@ALL
def test_a_network_that_lacks_what_is_needed_is_told_so(criterion: Criterion) -> None:
    bare = ScaleResponse(scales=np.array([1.0, 2, 4]), slide_mpp=None, outputs=None, features=None)

    with pytest.raises(OptionError, match=f"{criterion.name} "):
        criterion.score(bare)


@ALL
def test_one_scale_or_two_are_no_crash(criterion: Criterion) -> None:
    for scales in (np.array([2.0]), np.array([2.0, 4.0])):
        response = noise_response(scales=scales, places=1)

        assert criterion.score(response).shape == scales.shape
        assert answer(criterion, response) in (None, *np.append(scales, 3.0))


# ---- confidence and penkin2023 ----


def test_confidence_is_the_mean_over_places() -> None:
    response = noise_response(places=2, scales=np.array([1.0, 2.0]))
    response.outputs.confidence[:] = [[0.5, 0.9], [0.7, 0.6]]

    np.testing.assert_allclose(CRITERIA["confidence"].score(response), [0.6, 0.75], rtol=1e-6)


def test_rho_projects_on_the_class_direction_without_its_length_and_without_the_bias() -> None:
    # Two places, two scales, two classes; by hand: W/|W| = (0.6, 0.8) and (1, 0).
    weight = np.array([[3.0, 4.0], [10.0, 0.0]])
    features = np.array([[[1.0, 2.0], [2.0, 0.0]], [[0.0, 5.0], [-1.0, -1.0]]])
    response = replace(features_only(np.array([1.0, 2.0]), features, weight), head_bias=np.array([100, -100], np.float32))

    rho = penkin2023.best_projection(response)

    np.testing.assert_allclose(rho, [[2.2, 2.0], [4.0, -1.0]], rtol=1e-6)
    np.testing.assert_allclose(penkin2023.score(response), [3.1, 0.5], rtol=1e-6)
    assert penkin2023.decide(response) == 1.0


def test_where_the_probability_saturates_rho_still_has_a_peak() -> None:
    # The published example: a tumour patch at 95 to 97 % from x12 to x43, and rho highest at x14.
    scales = scale_grid(1, 16, per_octave=4)
    length = 40 - 2 * np.log2(scales / 3) ** 2
    response = features_only(scales, length[None, :, None] * np.array([1.0, -1.0]), np.array([[1.0, 0], [0, 1.0]]))

    confidence = CRITERIA["confidence"].score(response)

    assert (confidence == 1).all()
    assert np.isnan(peak(scales, confidence))
    assert peak(scales, CRITERIA["penkin2023"].score(response)) == pytest.approx(3, rel=1e-3)
    assert penkin2023.decide(response) == scales[np.abs(np.log2(scales / 3)).argmin()]


def test_the_slide_is_the_mode_of_the_votes_and_of_equals_the_one_nearest_to_the_median() -> None:
    assert penkin2023.combine(np.array([1.0, 8, 8, 2, 4])) == 8
    assert penkin2023.combine(np.array([1.0, 1, 2, 2, 4, 8, 8])) == 2
    assert penkin2023.combine(np.array([16.0, 2, 0.5])) == 2  # all differ: not the finest of them


def test_a_single_logit_counts_as_two_classes() -> None:
    scales = np.array([1.0, 2.0])
    # One feature: the network is ever surer of "no".
    features = np.array([[[-1.0], [-3.0]]])
    two = features_only(scales, features, np.array([[-1.0], [1.0]]))
    one = replace(two, head_weight=np.array([[2.0]], np.float32))

    assert penkin2023.decide(one) == penkin2023.decide(two) == 2
    np.testing.assert_allclose(penkin2023.score(one), [1, 3])
    np.testing.assert_allclose(
        bagamaev2022.channel_weights(one, np.array([0])), bagamaev2022.channel_weights(two, np.array([0]))
    )


def test_a_class_without_weights_has_no_direction() -> None:
    response = features_only(np.array([1.0, 2.0]), -np.ones((1, 2, 2)), np.array([[0.0, 0.0], [3.0, 4.0]]))

    np.testing.assert_allclose(penkin2023.score(response), [-1.4, -1.4])


# ---- penkin2022 ----


def test_the_published_grid_has_21_scales_with_a_dead_zone_around_the_original() -> None:
    grid = penkin2022_grid()

    assert len(grid) == 21
    assert (np.diff(grid) > 0).all()
    assert grid[[0, -1]].tolist() == [0.25, 3.0]  # four times the original size, and a third of it
    assert grid[(grid > 0.8) & (grid < 1.25)].tolist() == [1.0]
    np.testing.assert_array_equal([penkin2022.signed(s) for s in grid], penkin2022.GRID[::-1])
    np.testing.assert_allclose(penkin2022_grid(reference=4.0), 4 * grid)


def test_half_and_double_size_average_to_leave_it_as_it_is() -> None:
    # The signed axis: x1/2 is -2, x2 is +2, and the published aggregation is the mean.
    assert penkin2022.combine(np.array([2.0, 0.5])) == 1.0
    assert penkin2022.combine(np.array([3.0, 0.5])) == 1.0  # -3 and +2: -0.5, which is "original" as well
    assert penkin2022.combine(np.array([4.0, 0.25, 0.25])) == pytest.approx(0.75)  # mean +4/3
    assert penkin2022.combine(np.array([1.0, 0.9, 1.1])) == 1.0


def test_an_optimum_near_the_original_size_is_pulled_onto_it() -> None:
    # x4/3, next to the dead zone: places that peak a little nearer to x1 vote 0, not 1.2, and the mean falls in it.
    assert penkin2022.decide(planted_response(0.75, seed=1)) == 1.0


def test_blocks_vote_with_their_maximum_and_the_place_with_their_mean() -> None:
    scales = np.array([0.25, 0.5, 1.0, 2.0, 4.0])
    # Over ascending magnification x1/4, x1/2, x1, x2, x4: one block peaks at x2, another at x1.
    response = staged(scales, [[0, 1, 2, 5, 1], [0, 1, 1, 3, 1]], [[0, 1, 9, 3, 2]])

    # The votes +2 and 0 make +1, which is "original".
    assert penkin2022.decide(response) == 1.0
    assert penkin2022.decide(staged(scales, [[0, 1, 2, 5, 1]])) == 0.5
    np.testing.assert_allclose(penkin2022.score(staged(scales, [[0, 1, 2, 5, 1]])), [0.2, 1, 0.4, 0.2, 0])


def test_a_channel_is_kept_as_soon_as_either_extremum_is_interior() -> None:
    curves = {
        "rising": ([1, 2, 3, 4], False),
        "both extrema inside": ([2, 4, 1, 3], True),
        "maximum inside, minimum at an end": ([1, 4, 3, 2], True),
        "minimum inside, maximum at an end": ([4, 1, 2, 3], True),
        "not monotone, but both extrema at the ends": ([1, 3, 2, 4], False),
        "constant": ([5, 5, 5, 5], False),
        "constant but for less than a part in 1e5": ([5, 5.00001, 5, 5], False),
    }

    kept = penkin2022.kept_channels(np.array([curve for curve, _ in curves.values()], float).T[None])

    assert dict(zip(curves, kept[0].tolist(), strict=True)) == {name: keep for name, (_, keep) in curves.items()}


def test_the_filter_lets_noise_pass() -> None:
    curves = np.random.default_rng(0).normal(size=(1, 21, 1000))

    assert penkin2022.kept_channels(curves).mean() > 0.98


def test_dropped_channels_do_not_count() -> None:
    scales = np.array([0.25, 0.5, 1.0, 2.0, 4.0])
    rising = [0.0, 100, 200, 300, 400]

    assert penkin2022.decide(staged(scales, [[0, 7, 2, 5, 1], rising])) == 2.0


def test_a_block_votes_for_its_minimum_where_only_that_is_interior() -> None:
    scales = np.array([0.25, 0.5, 1.0, 2.0, 4.0])

    assert penkin2022.decide(staged(scales, [[5, 1, 2, 3, 4]])) == 2.0  # x1/2, where the network answers least


def test_of_two_interior_extrema_the_one_further_from_zero_votes() -> None:
    axis = np.array([-4.0, -2, 0, 2, 4])

    votes = penkin2022.block_votes(axis, np.array([[2.0, 0, 1, 5, 3], [0, -7, 1, 5, 3], [0, -5, 1, 5, 3]]))

    assert votes.tolist() == [2, -2, -2]  # a tie goes to the minimum, as the published program has it


def test_monotone_blocks_give_no_answer() -> None:
    response = staged(np.array([0.5, 1.0, 2.0]), [[1, 2, 3], [2, 4, 5]], [[3, 2, 1]])

    assert penkin2022.decide(response) is None
    assert penkin2022.score(response).tolist() == [0, 0, 0]


def test_a_block_without_a_vote_is_left_out_of_the_mean() -> None:
    scales = np.array([0.25, 0.5, 1.0, 2.0, 4.0])

    assert penkin2022.decide(staged(scales, [[0, 1, 2, 5, 1]], [[1, 2, 3, 4, 5]])) == 0.5


# ---- bagamaev2022 ----


def test_the_published_grid_has_95_scales_around_5_2() -> None:
    grid = bagamaev2022_grid()

    assert (len(grid), grid[0], grid[-1]) == (95, 0.5, 9.9)
    np.testing.assert_allclose(np.diff(grid), 0.1)
    assert np.median(grid) == 5.2


def test_channel_weights_are_the_gradient_of_the_probability() -> None:
    rng = np.random.default_rng(3)
    features, weight = rng.normal(size=(2, 6, 5)), rng.normal(size=(4, 5))
    classes = np.array([3, 1])

    def probability(features: NDArray[np.float64]) -> NDArray[np.float64]:  # (N, S) of the place's class
        e = np.exp(features @ weight.T)
        return np.stack([e[n, :, c] / e[n].sum(axis=1) for n, c in enumerate(classes)])

    expected = np.empty((2, 5))
    for k in range(5):
        step = np.eye(5)[k] * 1e-5
        slope = (probability(features + step) - probability(features - step)) / 2e-5
        expected[:, k] = np.abs(slope.mean(axis=1))

    weights = bagamaev2022.channel_weights(features_only(scale_grid(1, 2, per_octave=5), features, weight), classes)

    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-7)


def test_half_of_the_channels_stay_rounded_as_python_rounds_and_ties_stay_with_them() -> None:
    def kept(weights: list[float]) -> list[bool]:
        return bagamaev2022.kept_channels(np.array([weights]))[0].tolist()

    assert kept([0.1, 0.4, 0.2, 0.3]) == [False, True, False, True]
    assert sum(kept([1, 2, 3, 4, 5])) == 2  # round(2.5) is 2
    assert sum(kept([1, 2, 3, 4, 5, 6, 7])) == 4  # and round(3.5) is 4
    assert kept([1, 2, 2, 2]) == [False, True, True, True]
    assert kept([1]) == [False]  # round(0.5) is 0


def test_extrema_are_where_the_derivative_changes_sign() -> None:
    scales = np.arange(5, 100) / 10
    # Derivative zero at 2.2 and 7.31; the nearest scales are 2.2 and 7.3.
    curve = ((scales - 2.2) * (scales - 7.31)).cumsum()

    slope_zero = bagamaev2022.extrema(
        (scales**3 / 3 - (2.2 + 7.31) / 2 * scales**2 + 2.2 * 7.31 * scales)[None, :, None], scales
    )

    assert scales[slope_zero[0, :, 0] > 0] == pytest.approx([2.2, 7.3])
    assert bagamaev2022.extrema(curve[None, :, None], scales).sum() == 2


def test_extrema_agree_with_their_definition_spelled_out() -> None:
    rng = np.random.default_rng(0)
    curves = rng.integers(0, 4, size=(3, 12, 5)).astype(float)  # many ties, so that slopes are often exactly zero
    scales = np.arange(12.0)

    found = bagamaev2022.extrema(curves, scales)

    for n, k in np.ndindex(3, 5):
        slope = np.gradient(curves[n, :, k])
        expected = [0] * 12
        for i in range(11):
            if slope[i] == 0:
                expected[i] += 1
            elif slope[i] * slope[i + 1] < 0:
                expected[i if abs(slope[i]) < abs(slope[i + 1]) else i + 1] += 1
        assert found[n, :, k].tolist() == expected


def test_a_clean_bump_is_found_by_its_maximum_and_its_two_inflections() -> None:
    grid = bagamaev2022_grid()
    bump = np.exp(-(((grid - 4) / 1.2) ** 2) / 2)[None, :, None] * np.array([1.0, -0.7, 0.9, -0.5])
    response = features_only(grid, bump, np.array([[1.0, -1, 1, -1], [-1, 1, -1, 1]]))

    found = bagamaev2022.extrema_counts(response, np.array([0]))

    assert grid[found[0] > 0][:3] == pytest.approx([4 - 1.4, 4, 4 + 1.4], abs=0.11)  # sigma of 1.2 and 0.8 together: 1.44
    assert bagamaev2022.decide(response) == pytest.approx(4.0)


def test_the_three_ways_of_pooling_extrema_agree_where_there_is_one_and_differ_where_not() -> None:
    grid = bagamaev2022_grid()
    one = np.exp(-(((grid - 4) / 1.2) ** 2) / 2)
    two = one + 0.5 * np.exp(-(((grid - 8.5) / 0.7) ** 2) / 2)
    weight = np.array([[1.0, 0.1], [-1.0, -0.1]])  # only the first channel is kept

    def place(curve: NDArray[np.float64], pool: bagamaev2022.Pool) -> float | None:
        response = features_only(grid, np.stack([curve, grid], axis=1)[None], weight)
        return bagamaev2022_with_labels(response, np.array([0]), pool=pool)

    assert place(one, "one") == pytest.approx(4.0)
    assert place(np.tanh(grid - 6), "one") == pytest.approx(6.0)  # no extremum, and one inflection
    assert place(two, "one") is None
    # The highest point of the curve, 4, and its steepest, the left flank, 4 - 1.44; their median is their middle.
    assert place(two, "global") == pytest.approx(4 - 0.72, abs=0.1)
    assert place(two, "all") == pytest.approx(6.0, abs=1.0)


@pytest.mark.parametrize("kind", ["white", "walk"])
def test_the_thesis_method_finds_the_middle_of_its_range_in_noise(kind: str) -> None:
    # Its published evaluation had one true scale, 5, in a range whose middle is 5.2: noise scores 20 of 20 where the thesis's
    # own network scored 10 within 0.5. Nothing that passes such an evaluation has been shown to work.
    grid = bagamaev2022_grid()

    found = [
        bagamaev2022.decide(noise_response(seed=seed, places=50, scales=grid, classes=20, kind=kind)) for seed in range(20)
    ]

    assert np.mean(found) == pytest.approx(5.2, abs=0.15)
    assert all(4.5 < f < 5.5 for f in found)


def test_on_a_wider_range_the_same_noise_moves_the_answer_with_the_middle() -> None:
    wide = np.arange(5, 200) / 10

    found = [bagamaev2022.decide(noise_response(seed=s, places=50, scales=wide, classes=20, kind="walk")) for s in range(5)]

    assert np.mean(found) == pytest.approx(10.2, abs=0.3)


def test_a_dead_channel_votes_for_the_middle_of_the_range() -> None:
    grid = bagamaev2022_grid()
    response = features_only(grid, np.zeros((1, 95, 4)), np.array([[1.0, -1, 1, -1], [-1, 1, -1, 1]]))

    assert bagamaev2022.decide(response) == pytest.approx(5.15)  # a zero at the last scale does not count


def test_an_optimum_away_from_the_middle_is_pulled_there_by_a_little_noise() -> None:
    found = [bagamaev2022.decide(planted_response(1.0, seed=s, scales=bagamaev2022_grid(), noise=0.05)) for s in range(3)]

    assert min(found) > 3


def test_the_predicted_class_stands_in_for_the_label() -> None:
    response = planted_response(4.0, scales=bagamaev2022_grid(), noise=0.3)
    predicted = response.outputs.probabilities.mean(axis=1).argmax(axis=1)

    assert bagamaev2022_with_labels(response, predicted) == bagamaev2022.decide(response)
    assert bagamaev2022_with_labels(response, (predicted + 1) % 4) != bagamaev2022.decide(response)


def test_the_score_is_highest_at_the_decision() -> None:
    response = planted_response(4.0, scales=bagamaev2022_grid(), places=33, noise=0.3)

    assert response.scales[bagamaev2022.score(response).argmax()] == pytest.approx(bagamaev2022.decide(response), abs=0.06)


# ---- the planted and the noise answers themselves ----


@pytest.mark.parametrize("make", [noise_response, lambda **kw: planted_response(2.0, **kw)], ids=["noise", "planted"])
def test_made_up_answers_are_those_of_one_network(make: Callable[..., ScaleResponse]) -> None:
    response = make(places=3, channels=6, classes=4, seed=5)
    outputs = response.outputs

    logits = response.features @ response.head_weight.T
    np.testing.assert_allclose(outputs.logits, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs.probabilities.sum(axis=2), 1, rtol=1e-5)
    np.testing.assert_allclose(np.log(outputs.probabilities), logits - outputs.energy[..., None], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(outputs.confidence, outputs.probabilities.max(axis=2))
    assert ((outputs.entropy >= 0) & (outputs.entropy <= np.log(4) + 1e-6)).all()
    assert (outputs.margin >= 0).all()
    assert all((m.mean >= 0).all() and (m.square >= m.mean**2).all() for m in response.layers.values())
    np.testing.assert_array_equal(make(places=3, channels=6, classes=4, seed=5).features, response.features)
    assert not np.array_equal(make(places=3, channels=6, classes=4, seed=6).features, response.features)
