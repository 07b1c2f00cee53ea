"""The recovery benchmark judges rightly: what it says of answers whose worth is known."""

# ruff: noqa: E402

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wsiscale.criteria import CRITERIA, DEFAULT_CRITERION, Criterion
from wsiscale.geometry import scale_grid
from wsiscale.testing.responses import planted_response
from wsiscale.types import BatchNormStatistics, LayerMoments, ScaleResponse

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.recovery import cases, methods, photos, real, run, stress, tables, thesis, tissue
from benchmarks.recovery.cases import Case, MissingDataError, Oracle, Range, Setting

GRID = scale_grid(0.5, 16, per_octave=4)


def oracle_at(best: float, scales: np.ndarray = GRID) -> Oracle:
    """Falls by 0.1 an octave on the fine side of `best`, and by 0.2 on the coarse side."""
    octaves = np.log2(scales / best)
    quality = 0.9 - np.where(octaves < 0, -0.1 * octaves, 0.2 * octaves)
    return Oracle(scales=scales, quality=quality, lo=quality - 0.02, hi=quality + 0.02)


def case_at(best: float, **changes: object) -> Case:
    """A network that answers most at the scale where it is best."""
    response = planted_response(best, scales=GRID, places=16)
    whole = Case(
        name=f"planted/{best:g}",
        family="planted",
        network="net",
        slide="slide",
        half="develop",
        response=replace(response, views={"pixel_shuffled": flat(response)}),
        oracle=oracle_at(best),
        train_scale=2.0,
        range="whole",
        upsampled=True,
    )
    return replace(whole, **changes)


def flat(response: ScaleResponse) -> ScaleResponse:
    """The same network on tiles without structure: it answers alike at every scale."""
    assert response.outputs is not None
    alike = {name: np.zeros_like(value) + 0.5 for name, value in vars(response.outputs).items()}
    return replace(response, outputs=type(response.outputs)(**alike))


def rows(case: Case, names: tuple[str, ...] = ("confidence",)) -> dict[str, tables.Record]:
    chosen = methods.methods({name: CRITERIA[name] for name in names})
    return {name: tables.judged(case, name, method(case)) for name, method in chosen.items()}


def test_regret_and_error_are_those_of_the_scale_that_was_chosen() -> None:
    case = case_at(4.0)

    coarse = tables.judged(case, "m", methods.Answer(8.0, ci90=(3.0, 9.0)))
    fine = tables.judged(case, "m", methods.Answer(2.0, ci90=(1.5, 2.5)))

    assert coarse.regret == pytest.approx(0.2)
    assert fine.regret == pytest.approx(0.1)
    assert coarse.error == pytest.approx(1, abs=0.1)
    assert fine.error == pytest.approx(-1, abs=0.1)
    assert coarse.error_train == pytest.approx(2)
    assert (coarse.covered, coarse.covered_train) == (True, False)
    assert (fine.covered, fine.covered_train) == (False, True)


def test_quality_between_measured_scales_is_linear_in_octaves() -> None:
    ends = np.array([1.0, 0.0])

    assert Oracle(scales=np.array([1.0, 4.0]), quality=ends, lo=ends, hi=ends).regret(2.0) == pytest.approx(0.5)


def test_the_answers_that_know_nothing_are_what_they_are_called() -> None:
    found = rows(case_at(4.0))

    assert found["range centre (log)"].scale == pytest.approx(np.sqrt(8))
    assert found["range centre (linear)"].scale == pytest.approx(8.25)
    assert found["do nothing"].scale == 1.0
    assert found["training µm/px"].scale == 2.0
    assert found["oracle"].regret == pytest.approx(0, abs=0.02)
    assert found["do nothing"].regret == pytest.approx(0.2)


def test_noise_answers_know_nothing_of_the_scale() -> None:
    answers = [rows(case_at(best, name=f"{best}-{i}"))["noise answers"].scale for best in (1.0, 8.0) for i in range(8)]

    assert np.log2(answers).std() > 0.7


def test_do_nothing_and_training_stay_inside_of_the_range() -> None:
    (case,) = cases.over_ranges(case_at(4.0), (Range("coarse", 4, 16),))

    found = rows(case)

    assert found["do nothing"].scale == found["training µm/px"].scale == pytest.approx(4.0)


def test_a_planted_optimum_is_found_with_and_without_abstention() -> None:
    found = rows(case_at(4.0))

    for method in ("confidence", "confidence + abstains"):
        assert abs(found[method].error) < 0.15, method
        assert found[method].regret < 0.03
    assert found["confidence + abstains"].covered is not None
    # Plain tiles; and those with shuffled pixels, which only `estimate` looks at.
    assert found["confidence"].forwards == 16 * len(GRID)
    assert found["confidence + abstains"].forwards == 2 * 16 * len(GRID)


def test_a_criterion_gets_only_what_estimate_would_have_asked_for() -> None:
    seen = []

    def look(response: ScaleResponse) -> np.ndarray:
        seen.append((set(response.layers), set(response.views)))
        return np.log2(response.scales)

    case = case_at(4.0)
    methods.methods({"plain": Criterion("plain", look)})["plain"](case)
    methods.methods({"staged": Criterion("staged", look, layers="stages", views=("pixel_shuffled",))})["staged"](case)

    assert seen == [(set(), set()), (set(case.response.stages), {"pixel_shuffled"})]


def test_a_criterion_that_cannot_be_asked_is_named_with_the_reason() -> None:
    turned = Criterion("turned", CRITERIA["confidence"].score, views=("rot90",))
    normed = Criterion("normed", CRITERIA["confidence"].score, layers="batchnorm")
    not_asked = Counter()

    records = run.evaluated(case_at(4.0), methods.methods({"turned": turned, "normed": normed}), not_asked)

    assert not {r.method for r in records} & {"turned", "normed"}
    reasons = {method: reason for _, method, reason in not_asked}
    assert "rot90" in reasons["turned"]
    assert "BatchNorm" in reasons["normed + abstains"]


def test_abstentions_count_as_doing_nothing_and_not_as_good_answers() -> None:
    case = case_at(4.0)
    answers = [methods.Answer(4.0, ci90=(3.5, 4.5)), methods.Answer(None, abstained="flat_curve")]

    summary = tables.summarised([tables.judged(case, "m", answer) for answer in answers])

    assert summary.cases == 2
    assert summary.abstained == 0.5
    assert summary.regret == pytest.approx(0)
    assert summary.regret_fallback == pytest.approx(0.1)
    assert summary.near == summary.covered == 1.0


def test_the_worst_family_is_the_one_with_the_highest_mean_regret() -> None:
    near, far = case_at(4.0), case_at(4.0, family="far")
    records = [tables.judged(near, "m", methods.Answer(4.0)), tables.judged(far, "m", methods.Answer(16.0))]

    summary = tables.summarised(records)

    assert summary.regret == pytest.approx(0.2)
    assert summary.regret_worst_family == pytest.approx(0.4)
    assert summary.error_90 > summary.error_median


def test_a_range_cuts_response_views_and_oracle_alike() -> None:
    whole = case_at(4.0)
    fine, coarse = cases.over_ranges(whole, (Range("A", 0.5, 2), Range("B", 2, 16)))

    assert (fine.name, coarse.name) == ("planted/4/A", "planted/4/B")
    assert (fine.upsampled, coarse.upsampled) == (True, False)
    for case, ends in ((fine, (0.5, 2)), (coarse, (2, 16))):
        for scales in (case.response.scales, case.response.views["pixel_shuffled"].scales, case.oracle.scales):
            assert (scales[0], scales[-1]) == pytest.approx(ends)
        assert case.response.outputs.confidence.shape == (16, len(case.response.scales))
        covered = np.isin(GRID, case.response.scales)
        for moment in ("mean", "square"):
            cut, all_of_it = (getattr(r.layers["stage1"], moment) for r in (case.response, whole.response))
            np.testing.assert_array_equal(cut, all_of_it[:, covered])
    assert fine.oracle.best == pytest.approx(2.0)


def test_a_cached_response_comes_back_as_it_went() -> None:
    response = full_response()

    found = cases._unpack_response(cases._pack_response(response))

    assert found.stages == response.stages
    assert found.slide_mpp == response.slide_mpp
    assert found.batchnorm["stage2"].eps == 1e-3
    np.testing.assert_array_equal(found.batchnorm["stage2"].var, response.batchnorm["stage2"].var)
    np.testing.assert_array_equal(found.layers["stage2"].square, response.layers["stage2"].square)
    np.testing.assert_array_equal(found.agreement["rot90"], response.agreement["rot90"])
    view = found.views["rot90"]
    np.testing.assert_array_equal(view.outputs.margin, response.views["rot90"].outputs.margin)
    np.testing.assert_array_equal(view.features, response.views["rot90"].features)
    np.testing.assert_array_equal(view.head_weight, response.head_weight)


def full_response() -> ScaleResponse:
    """Something in every field."""
    plain = planted_response(2.0, scales=GRID, places=3)
    ones = np.arange(1, 17, dtype=np.float32)
    norms = {"stage2": BatchNormStatistics(mean=ones, var=2 * ones, weight=3 * ones, bias=4 * ones, eps=1e-3)}
    layers = {name: LayerMoments(m.mean, 2 * m.square) for name, m in plain.layers.items()}
    plain = replace(plain, batchnorm=norms, layers=layers, agreement={"rot90": plain.outputs.confidence})
    other = replace(planted_response(5.0, scales=GRID, places=3), batchnorm=norms, head_weight=plain.head_weight)
    return replace(plain, views={"rot90": other})


def test_joined_images_are_one_slide_with_the_places_of_all() -> None:
    response = full_response()
    first, second = response.take(np.array([0])), response.take(np.array([1, 2]))

    together = cases.joined([first, second])

    assert together.places == 3
    np.testing.assert_array_equal(together.outputs.logits, response.outputs.logits)
    np.testing.assert_array_equal(together.layers["stage3"].square, response.layers["stage3"].square)
    np.testing.assert_array_equal(together.views["rot90"].features, response.views["rot90"].features)
    np.testing.assert_array_equal(together.agreement["rot90"], response.agreement["rot90"])


def test_what_is_cached_is_asked_for_once(tmp_path: Path) -> None:
    asked = []
    setting = Setting(cache=tmp_path)

    def make() -> Oracle:
        asked.append(1)
        return oracle_at(2.0)

    first, second = (setting.cached_oracle("family/net/slide", make) for _ in range(2))

    assert len(asked) == 1
    assert first.measure == second.measure == "accuracy"
    np.testing.assert_array_equal(first.quality, second.quality)
    with pytest.raises(MissingDataError, match="where the cache does"):
        replace(setting, cached=True).cached_oracle("family/net/other", make)


def test_halves_are_disjoint_in_networks_and_slides_and_crossed_pairs_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "split.json"
    networks, slides = [f"n{i}" for i in range(5)], [f"s{i}" for i in range(8)]
    halves = {"networks": cases.drawn("f networks", networks), "slides": cases.drawn("f slides", slides)}
    cases.write_split({"f": halves, "one": {**halves, "networks": cases.drawn("one networks", ["only"])}}, file=file)

    given = {(n, s): cases.half_of("f", network=n, slide=s, file=file) for n in networks for s in slides}

    for kind in (0, 1):
        sides = [{pair[kind] for pair, half in given.items() if half == side} for side in ("develop", "report")]
        assert not sides[0] & sides[1]
    counts = {half: list(given.values()).count(half) for half in ("develop", "report", None)}
    assert counts == {"develop": 2 * 4, "report": 3 * 4, None: 20}
    assert {cases.half_of("one", network="only", slide=s, file=file) for s in slides} == {"develop", "report"}
    with pytest.raises(KeyError, match="'n9'"):
        cases.half_of("f", network="n9", slide="s0", file=file)


def test_a_split_once_written_stays(tmp_path: Path) -> None:
    file = tmp_path / "split.json"
    first = {"f": {"networks": {"develop": ["a"], "report": ["b"]}, "slides": {"develop": ["c"], "report": ["d"]}}}
    cases.write_split(first, file=file)

    cases.write_split({"f": {"networks": {"develop": ["b"], "report": ["a"]}}, "g": first["f"]}, file=file)

    assert json.loads(file.read_text())["families"] == {"g": first["f"], "f": first["f"]}


def test_the_committed_split_is_the_one_that_its_rule_draws() -> None:
    committed = json.loads(cases.SPLIT_FILE.read_text())["families"]

    assert committed == real.split() | thesis.split() | photos.split() | stress.split() | tissue.split()
    for family in committed.values():
        assert not set(family["slides"]["develop"]) & set(family["slides"]["report"])


def test_no_patch_is_on_both_sides_of_the_split() -> None:
    halves = real.split()["crc"]["slides"]

    pairs = [{number for slide in halves[half] for number in slide.rpartition("-")[2]} for half in ("develop", "report")]

    assert sorted("".join(sorted(pair)) for pair in pairs) == ["12", "34"]


def test_ranges_have_their_middles_on_either_side_of_the_training_scale() -> None:
    for ranges, train in ((real.NUCLEI32_RANGES, 1.0), (real.EMBEDDED_RANGES, 2.0), (real.CRC_RANGES, 1.0)):
        middles = {cut.tag: np.log2(np.sqrt(cut.lo * cut.hi) / train) for cut in ranges}

        assert middles["B"] < -0.25 < 0
        assert middles["A"] > 0.2


def test_an_auc_is_one_where_nuclei_are_told_half_where_nothing_is_and_zero_where_all_is_wrong() -> None:
    nucleus = np.array([True, False, True, False])
    right = np.array([0.9, 0.2, 0.8, 0.1])

    shown = np.stack([right, np.full(4, 0.5), 1 - right], axis=1)

    np.testing.assert_allclose(real._auc(shown, nucleus), [1, 0.5, 0])


def test_the_band_of_an_oracle_is_wider_where_its_units_differ_more() -> None:
    units = np.linspace(0, 1, 20)[:, None] * np.array([0.1, 0.8]) + np.array([0.8, 0.1])  # (units, S)

    oracle = real._bootstrapped(GRID[:2], 20, lambda drawn: units[drawn].mean(axis=0), measure="accuracy", seed=0)

    np.testing.assert_allclose(oracle.quality, [0.85, 0.5])
    assert (oracle.lo < oracle.quality).all()
    assert (oracle.quality < oracle.hi).all()
    assert np.diff(oracle.hi - oracle.lo) > 0.1


def test_blocks_of_an_overlap_add_up() -> None:
    rng = np.random.default_rng(0)
    found, there = rng.random((2, 500, 250)) < 0.3

    both, of_found, of_there = real._overlap(found, there).sum(axis=1)

    assert (both, of_found, of_there) == ((found & there).sum(), found.sum(), there.sum())


def test_a_run_without_data_says_what_it_skips_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--families", "nuclei32,crc", "--data", str(tmp_path / "absent"), "--cache", str(tmp_path)]

    code = run.main(arguments)

    assert code == 1
    assert "nuclei32 is skipped" in capsys.readouterr().err


def test_a_report_names_every_row_and_what_is_missing(tmp_path: Path) -> None:
    given = [case_at(2.0, name="planted/a"), case_at(4.0, name="planted/b", half="report")]
    not_asked = Counter({("planted", "normed", "the network has no BatchNorm"): 2})
    chosen = methods.methods({"confidence": CRITERIA["confidence"]})
    records = [record for case in given for record in run.evaluated(case, chosen, not_asked)]

    run.write_report(tmp_path, records, given, absent={"crc": "not here"}, not_asked=not_asked)

    text = (tmp_path / "benchmark.md").read_text()
    for line in ("| range centre (linear) | 1 ", "| confidence + abstains | 1 ", "crc: not here", "no BatchNorm | 2 |"):
        assert line in text
    assert "half, all families" in text
    lines = (tmp_path / "benchmark.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3 * len(chosen)  # in each half: all, the family, its only range
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"benchmark_develop.png", "benchmark_report.png"}


def test_a_nucleus_network_is_better_at_its_own_scale_than_far_from_it(real_data: Path, tmp_path: Path) -> None:
    stack, nucleus = labelled_tiles(real_data)

    oracle = real._auc_oracle(real._fold(real_data, "nuclei32-fold2"), stack, nucleus, seed=0)

    assert oracle.at(1.0) > 0.75
    assert oracle.at(1.0) > oracle.at(8.0) + 0.1


def labelled_tiles(data: Path) -> tuple[object, np.ndarray]:
    """Tiles of 32 px around labelled pixels of one image, at three scales."""
    slide = real.MONUSEG[0]
    image, mask = real._monuseg(data, slide)
    pixels, nucleus = real._labelled_pixels(mask, slide)
    some = np.r_[0:40, real.NUCLEI32_PIXELS : real.NUCLEI32_PIXELS + 40]
    reader, pad = real._mirrored(image, 256, mpp=real.MONUSEG_MPP)
    stack = real.scale_stack(reader, pixels[some] + pad, scales=[1.0, 2.0, 8.0], size=32)
    return stack, nucleus[some]


def test_the_default_is_held_against_others_on_the_cases_that_it_answers() -> None:
    near, far = case_at(4.0), replace(case_at(4.0), name="planted/other", tags=frozenset({"mixed"}))
    default = DEFAULT_CRITERION + methods.ABSTAINS
    records = [
        tables.judged(near, default, methods.Answer(4.0, ci90=(3, 5))),
        tables.judged(far, default, methods.Answer(None, abstained="flat_curve")),
        tables.judged(near, "confidence", methods.Answer(8.0)),
        tables.judged(far, "confidence", methods.Answer(4.0)),
    ]

    by_kind, against = tables.kind_table(records).splitlines(), tables.same_cases_table(records).splitlines()

    assert by_kind[2].startswith("| planted | 1 | 0% | 1 | 0% | 0.00")
    assert by_kind[3].startswith("| planted mixed | 1 | 100% | 1 | 100% | - |")
    assert by_kind[4].startswith("| all | 2 | 50% | 2 | 50% | 0.00")
    assert len(against) == 3
    assert against[2].startswith("| confidence | 1 | 0.000 | 0.200 | 0.0")


@pytest.mark.parametrize(
    ("best", "changes", "clear"),
    [
        (4.0, {}, True),
        (0.5, {}, True),  # the finest that the slide has
        (16.0, {}, False),  # what is coarser was not offered
        (15.0, {}, False),
        (4.0, {"tags": frozenset({"single-class"})}, False),
        (4.0, {"oracle": replace(oracle_at(4.0), quality=np.full(len(GRID), 0.9))}, False),
        (4.0, {"oracle": replace(oracle_at(4.0), quality=oracle_at(4.0).quality - 0.3)}, False),
    ],
)
def test_a_case_is_clear_where_labels_show_a_scale_to_be_found(best: float, changes: dict[str, object], clear: bool) -> None:
    assert case_at(best, **changes).clear is clear
