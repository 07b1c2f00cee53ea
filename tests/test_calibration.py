"""Which µm/px is believed."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wsiscale.calibration import calibrate, read_mpp_table
from wsiscale.errors import OptionError
from wsiscale.types import Calibration, ScaleTags

# Any number at all; and numbers as slides have them, and near the bounds, of which there would be few among the others.
BOUNDS = [0.02, 0.1, 0.25, 0.2625, 0.5, 4.0, 10.0, 20.0, 40.0, 72.0, 96.0, 300.0, 50_800.0]
NEAR = [bound * by for bound in BOUNDS for by in (1, 1 - 1e-6, 1 + 1e-6, 0.95, 1.05, 0.001, 1000)]
anything = (
    st.none()
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.floats(0.01, 40)
    | st.sampled_from([*NEAR, *[None] * len(NEAR)])  # and often nothing, as one number is enough to be an answer
)
NAMES = {"not_finite", "dpi_default", "out_of_range", "anisotropic", "power_conflict"}


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_numbers_give_a_calibration_or_a_usage_error(count: int) -> None:
    met: Counter[str] = Counter()

    @given(x=anything, y=anything, power=anything, dpi=anything, override=anything)
    @example(x=0.25, y=0.25, power=40.0, dpi=0.0, override=None)
    @example(x=None, y=None, power=None, dpi=0.0, override=None)
    @example(x=None, y=None, power=40.0, dpi=None, override=None)
    @example(x=1e300, y=1e300, power=None, dpi=None, override=5e-324)
    @example(x=-0.25, y=-0.25, power=None, dpi=None, override=0.25)
    # Without a database and a clock, so that it is the same examples everywhere; what fails is printed as an @example.
    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    def holds(x: float | None, y: float | None, power: float | None, dpi: float | None, override: float | None) -> None:
        met["examples"] += 1
        tags = ScaleTags(mpp_x=x, mpp_y=y, tag="tag", objective_power=power, resolution_dpi=dpi)
        try:
            result = calibrate(tags, override=override)
        except OptionError:
            assert override is not None
            assert not (math.isfinite(override) and override > 0)
            return
        met[f"{result.source} {result.verdict}"] += 1

        assert result == result  # a NaN inside would make it unequal to itself
        assert (result.mpp is None) == (result.verdict in ("refused", "missing")) == (result.source == "none")
        assert (result.source == "override") == (override is not None)
        assert result.detail
        claims = [n for n in (x, y) if n is not None] or ([25_400 / dpi] if dpi else [math.inf] if dpi == 0 else [])
        if override is not None:
            assert result.mpp == override
        elif not claims:
            assert (result.verdict, result.claimed, result.reasons) == ("missing", None, ())  # and no number from the power
        elif result.verdict == "refused":
            assert result.reasons
            assert set(result.reasons) <= NAMES
        else:
            assert result.mpp is not None
            assert min(claims) * (1 - 1e-9) <= result.mpp <= max(claims) * (1 + 1e-9)  # never repaired
            assert min(claims) >= 0.02 * (1 - 1e-8)
            assert max(claims) <= min(20 * (1 + 1e-8), min(claims) * 1.05 * (1 + 1e-8))
            assert dpi is None or not any(abs(dpi / default - 1) <= 0.02 for default in (72, 96, 150, 300))
            if power is not None and math.isfinite(power) and power > 0:
                assert 3 * (1 - 1e-8) <= claims[0] * power <= 25 * (1 + 1e-8)
            usual = 0.1 * (1 - 1e-8) <= result.mpp <= 4 * (1 + 1e-8)
            assert (result.verdict, result.reasons) == (("trusted", ()) if usual else ("suspicious", ("unusual",)))

    holds()

    assert met["examples"] >= count
    for kind in ("metadata trusted", "metadata suspicious", "none refused", "none missing", "override trusted"):
        assert met[kind] > count / 200, met  # or else it says little of that kind


# 60 rows: µm/px in x and y, objective power, dots per inch; the verdict and its reasons.
TABLE: list[tuple[float | None, float | None, float | None, float | None, str, str]] = [
    (None, None, None, None, "missing", ""),
    (None, None, 40, None, "missing", ""),  # 10 / 40 would be a guess
    (None, None, math.nan, None, "missing", ""),
    (0.499, 0.499, 20, None, "trusted", ""),
    (0.2498, 0.2498, 40, None, "trusted", ""),
    (0.25, None, None, None, "trusted", ""),
    (None, 0.25, None, None, "trusted", ""),
    (0.25, 0.25, 40, 101_600, "trusted", ""),
    # the usual, and the possible
    (0.1, 0.1, None, None, "trusted", ""),
    (0.0999, 0.0999, None, None, "suspicious", "unusual"),
    (4.0, 4.0, None, None, "trusted", ""),
    (4.001, 4.001, None, None, "suspicious", "unusual"),
    (0.02, 0.02, None, None, "suspicious", "unusual"),
    (0.0199, 0.0199, None, None, "refused", "out_of_range"),
    (20, 20, None, None, "suspicious", "unusual"),
    (20.01, 20.01, None, None, "refused", "out_of_range"),
    (0.0, 0.0, None, None, "refused", "out_of_range"),
    (-0.0, -0.0, None, None, "refused", "out_of_range"),
    (0.0, None, None, None, "refused", "out_of_range"),
    (-0.25, -0.25, None, None, "refused", "out_of_range"),
    (-0.25, 0.25, None, None, "refused", "out_of_range"),
    (0.25, 0.0, None, None, "refused", "out_of_range"),
    (5e-324, 5e-324, None, None, "refused", "out_of_range"),
    (1e9, 1e9, None, None, "refused", "out_of_range"),
    (1.7e308, 1.7e308, None, None, "refused", "out_of_range"),
    # a unit taken for another: cm for mm (twice seen), mm, nm and m for µm, inches for cm
    (0.00499, 0.00499, None, None, "refused", "out_of_range"),
    (0.000499, 0.000499, None, None, "refused", "out_of_range"),
    (499.0, 499.0, None, None, "refused", "out_of_range"),
    (4.99e-7, 4.99e-7, None, None, "refused", "out_of_range"),
    (20_000.0, 20_000.0, None, None, "refused", "out_of_range"),
    (0.499 * 25.4, 0.499 * 25.4, 20, None, "refused", "power_conflict"),
    # no numbers
    (math.nan, math.nan, None, None, "refused", "not_finite"),
    (math.nan, 0.25, None, None, "refused", "not_finite"),
    (0.25, math.nan, 40, None, "refused", "not_finite"),
    (math.inf, math.inf, None, None, "refused", "not_finite"),
    (0.25, -math.inf, None, None, "refused", "not_finite"),
    # x and y apart
    (0.25, 0.2625, None, None, "trusted", ""),
    (0.25, 0.2626, None, None, "refused", "anisotropic"),
    (0.2626, 0.25, None, None, "refused", "anisotropic"),
    (0.25, 0.5, 40, None, "refused", "anisotropic"),
    (0.25, 25.0, None, None, "refused", "out_of_range anisotropic"),
    # the objective
    (0.075, 0.075, 40, None, "suspicious", "unusual"),  # 3.0
    (0.0749, 0.0749, 40, None, "refused", "power_conflict"),
    (0.625, 0.625, 40, None, "trusted", ""),  # 25
    (0.626, 0.626, 40, None, "refused", "power_conflict"),
    (0.5, 0.5, 1.25, None, "refused", "power_conflict"),
    (0.499, 0.499, 0, None, "trusted", ""),  # a power of 0, below, or NaN says nothing
    (0.499, 0.499, -20, None, "trusted", ""),
    (0.499, 0.499, math.nan, None, "trusted", ""),
    (0.499, 0.499, math.inf, None, "trusted", ""),
    (0.0001, 0.0001, 40, None, "refused", "out_of_range power_conflict"),
    # the resolution
    (None, None, None, 50_800, "trusted", ""),
    (None, None, 20, 50_800, "trusted", ""),
    (None, None, None, 72, "refused", "dpi_default"),
    (None, None, 40, 300, "refused", "dpi_default power_conflict"),
    (25_400 / 96, 25_400 / 96, None, 96, "refused", "dpi_default"),
    (None, None, None, 600, "refused", "out_of_range"),
    (None, None, None, 1270, "suspicious", "unusual"),  # 20 µm/px
    (None, None, None, 0, "refused", "not_finite"),
    (None, None, None, -72, "refused", "out_of_range"),
]


@pytest.mark.parametrize(("x", "y", "power", "dpi", "verdict", "reasons"), TABLE)
def test_every_row_of_the_table_has_its_verdict(
    x: float | None, y: float | None, power: float | None, dpi: float | None, verdict: str, reasons: str
) -> None:
    result = calibrate(ScaleTags(mpp_x=x, mpp_y=y, tag="aperio.MPP", objective_power=power, resolution_dpi=dpi))

    assert result.verdict == verdict
    assert result.reasons == tuple(reasons.split())
    if verdict in ("refused", "missing"):
        assert (result.mpp, result.source) == (None, "none")
    else:
        first = x or y or 25_400 / dpi  # type: ignore[operator]
        second = y or first
        assert result.mpp == pytest.approx(math.sqrt(first * second), rel=1e-12)
    assert result.tag == (None if verdict == "missing" else "aperio.MPP")


@pytest.mark.parametrize("dpi", [72, 96, 150, 300])
@pytest.mark.parametrize("rounded_to", [None, 1.0, 1 / 2.54])
def test_a_default_resolution_is_refused_by_name_also_where_it_was_rounded(dpi: int, rounded_to: float | None) -> None:
    # 72 dpi is 28.346 dots per centimetre, which some writers round to 28.
    there = dpi if rounded_to is None else round(dpi * rounded_to) / rounded_to

    result = calibrate(ScaleTags(resolution_dpi=there))

    assert result.verdict == "refused"
    assert result.reasons == ("dpi_default",)
    assert result.claimed == pytest.approx(25_400 / there)
    assert f"{dpi} dpi" in result.detail
    assert "tiff.XResolution" in result.detail


def test_a_resolution_that_is_no_default_is_taken() -> None:
    result = calibrate(ScaleTags(resolution_dpi=50_800))

    assert result == Calibration(
        mpp=0.5,
        source="metadata",
        claimed=0.5,
        tag="tiff.XResolution",
        verdict="trusted",
        detail="0.5 µm/px (tiff.XResolution)",
    )


def test_x_and_y_may_differ_by_5_percent_and_their_geometric_mean_is_taken() -> None:
    alike = calibrate(ScaleTags(mpp_x=0.25, mpp_y=0.2625, tag="aperio.MPP"))
    unlike = calibrate(ScaleTags(mpp_x=0.25, mpp_y=0.2626, tag="aperio.MPP"))
    turned = calibrate(ScaleTags(mpp_x=0.2626, mpp_y=0.25, tag="aperio.MPP"))

    assert alike.mpp == pytest.approx(math.sqrt(0.25 * 0.2625))
    assert unlike.reasons == turned.reasons == ("anisotropic",)
    assert unlike.mpp is None
    assert "0.25 x 0.2626" in unlike.detail


def test_one_axis_stands_for_both() -> None:
    assert calibrate(ScaleTags(mpp_x=0.25)).mpp == calibrate(ScaleTags(mpp_y=0.25)).mpp == 0.25


def test_a_slide_that_says_nothing_is_missing_not_refused() -> None:
    result = calibrate(ScaleTags(objective_power=40))

    assert (result.mpp, result.source, result.verdict) == (None, "none", "missing")


def test_a_suspicious_value_is_used_and_said() -> None:
    result = calibrate(ScaleTags(mpp_x=8, mpp_y=8, tag="aperio.MPP"))

    assert result.mpp == 8
    assert "8 µm/px (aperio.MPP)" in result.detail
    assert "0.1 to 4" in result.detail


def test_the_users_word_wins_and_a_contradiction_is_recorded() -> None:
    tags = ScaleTags(mpp_x=0.00499, mpp_y=0.00499, tag="tiff.XResolution")

    result = calibrate(tags, override=0.499)
    agreeing = calibrate(ScaleTags(mpp_x=0.499, mpp_y=0.499, tag="aperio.MPP"), override=0.5)

    assert (result.mpp, result.source, result.verdict) == (0.499, "override", "trusted")
    assert result.reasons == ("contradicts_file",)
    assert "0.00499 (tiff.XResolution)" in result.detail
    assert agreeing.reasons == ()


@pytest.mark.parametrize("override", [0.0, -0.5, math.nan, math.inf])
def test_an_override_that_is_no_length_is_a_usage_error(override: float) -> None:
    with pytest.raises(OptionError, match="above 0"):
        calibrate(ScaleTags(), override=override)


@pytest.mark.parametrize(
    "text",
    [
        "wsi,mpp\na/one.svs,0.25\ntwo.svs,0.5\n",
        "path,mpp\na/one.svs,0.25\ntwo.svs,0.5\n",
        "sample_id,image_path,spacing_at_level_0\nx,a/one.svs,0.25\ny,two.svs,0.5\n",
        "\ufeffMPP , note, WSI\r\n0.25,,a/one.svs\r\n\r\n 0.5 ,tall,two.svs\r\n",  # as a spreadsheet saves it
    ],
)
def test_a_table_of_overrides_is_read_in_its_dialects(text: str, tmp_path: Path) -> None:
    (tmp_path / "mpp.csv").write_text(text, encoding="utf-8", newline="")

    table = read_mpp_table(tmp_path / "mpp.csv")

    assert table == {"a/one.svs": 0.25, "one.svs": 0.25, "two.svs": 0.5}


def test_a_name_that_two_folders_share_is_found_by_its_path_only(tmp_path: Path) -> None:
    (tmp_path / "mpp.csv").write_text("wsi,mpp\na/s.svs,0.25\nb/s.svs,0.5\nc\\t.svs,0.25\nd/t.svs,0.25\n")

    table = read_mpp_table(tmp_path / "mpp.csv")

    assert table == {"a/s.svs": 0.25, "b/s.svs": 0.5, "c\\t.svs": 0.25, "d/t.svs": 0.25, "t.svs": 0.25}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1.*none"),
        ("slide,um\na.svs,1\n", "line 1.*slide,um"),
        ("wsi,mpp\na.svs,0.25\nb.svs,\n", "line 3, column mpp"),
        ("wsi,mpp\n\na.svs,nan\n", "line 3, column mpp"),
        ("wsi,mpp\na.svs,0\n", "line 2, column mpp"),
        ("wsi,mpp\na.svs,'0,25'\n", "line 2, column mpp"),
        ("wsi,mpp\na.svs\n", "line 2, column mpp"),
        ("wsi,mpp\n,0.25\n", "line 2, column wsi"),
        ("wsi,mpp\na.svs,0.25\na.svs,0.5\n", "line 3: a.svs"),
        ('wsi,mpp\n"a.svs,0.25\n', "CSV"),
    ],
)
def test_a_bad_row_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mpp.csv").write_text(text)

    with pytest.raises(OptionError, match=said):
        read_mpp_table(tmp_path / "mpp.csv")


def test_a_table_that_is_not_there_or_is_no_text_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "mpp.csv").write_bytes(b"wsi,mpp\n\xff\xfe,1\n")

    for name in ("nothing.csv", "mpp.csv"):
        with pytest.raises(OptionError, match=name):
            read_mpp_table(tmp_path / name)
