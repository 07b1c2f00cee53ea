"""Which µm/px is believed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wsiscale.calibration import calibrate, read_mpp_table
from wsiscale.errors import OptionError
from wsiscale.types import Calibration, ScaleTags

anything = st.none() | st.floats(allow_nan=True, allow_infinity=True)


@given(x=anything, y=anything, power=anything, dpi=anything, override=anything)
@example(x=0.25, y=0.25, power=40.0, dpi=0.0, override=None)
@example(x=None, y=None, power=None, dpi=0.0, override=None)
@example(x=1e300, y=1e300, power=None, dpi=None, override=5e-324)
@example(x=-0.25, y=-0.25, power=None, dpi=None, override=0.25)
@settings(max_examples=2000, deadline=None)
def test_any_numbers_give_a_calibration_or_a_usage_error(
    x: float | None, y: float | None, power: float | None, dpi: float | None, override: float | None
) -> None:
    tags = ScaleTags(mpp_x=x, mpp_y=y, tag="tag", objective_power=power, resolution_dpi=dpi)

    try:
        result = calibrate(tags, override=override)
    except OptionError:
        assert override is not None
        assert not (math.isfinite(override) and override > 0)
        return

    assert result == result  # a NaN inside would make it unequal to itself
    assert (result.mpp is None) == (result.verdict in ("refused", "missing")) == (result.source == "none")
    assert result.detail
    if result.mpp is not None:
        assert math.isfinite(result.mpp)
        assert result.mpp > 0
    if result.source == "metadata":
        assert 0.02 * 0.99 < result.mpp < 20 * 1.01
    if result.verdict == "refused":
        assert result.reasons


@pytest.mark.parametrize(
    ("mpp", "power", "verdict", "reasons"),
    [
        (0.499, 20, "trusted", ()),
        (0.2498, 40, "trusted", ()),
        (0.1, None, "trusted", ()),
        (0.0999, None, "suspicious", ("unusual",)),
        (4.0, None, "trusted", ()),
        (4.001, None, "suspicious", ("unusual",)),
        (0.02, None, "suspicious", ("unusual",)),
        (0.0199, None, "refused", ("out_of_range",)),
        (20, None, "suspicious", ("unusual",)),
        (20.01, None, "refused", ("out_of_range",)),
        (0.0, None, "refused", ("out_of_range",)),
        (-0.25, None, "refused", ("out_of_range",)),
        (0.00499, None, "refused", ("out_of_range",)),  # cm taken for mm, twice seen
        (20_000.0, None, "refused", ("out_of_range",)),
        (math.nan, None, "refused", ("not_finite",)),
        (math.inf, None, "refused", ("not_finite",)),
        (0.075, 40, "suspicious", ("unusual",)),  # 3.0
        (0.0749, 40, "refused", ("power_conflict",)),
        (0.625, 40, "trusted", ()),  # 25
        (0.626, 40, "refused", ("power_conflict",)),
        (0.499, 0, "trusted", ()),  # a power of 0 or NaN says nothing
        (0.499, math.nan, "trusted", ()),
        (0.0001, 40, "refused", ("out_of_range", "power_conflict")),
    ],
)
def test_both_sides_of_every_bound(mpp: float, power: float | None, verdict: str, reasons: tuple[str, ...]) -> None:
    result = calibrate(ScaleTags(mpp_x=mpp, mpp_y=mpp, tag="aperio.MPP", objective_power=power))

    assert result.verdict == verdict
    assert result.reasons == reasons
    assert result.mpp == (None if verdict == "refused" else mpp)
    assert result.tag == "aperio.MPP"


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
