"""Which µm/px a slide claims, where it says so, and whether to believe it. Pure."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator

from wsiscale.errors import OptionError
from wsiscale.tables import read_table
from wsiscale.types import Calibration, ScaleTags

# No scanner and no overview image lies outside of these, in µm/px: 0.02 is finer than light resolves, 20 is a flatbed scan.
POSSIBLE = (0.02, 20.0)
# Slide scanners work at 0.1 (100x oil) to 4 (2.5x).
USUAL = (0.1, 4.0)
# A camera behind an objective of power p sees about 10 / p µm/px; adapters and binning spread the product this far.
MPP_TIMES_POWER = (3.0, 25.0)
# What image editors and libraries write where nobody told them, in dots per inch.
DEFAULT_DPI = (72, 96, 150, 300)
# 28 dots per centimetre, rounded from 28.35, still means 72 dpi. Every default is far below the 1270 dpi of POSSIBLE.
_DPI_SLACK = 0.02
MAX_ANISOTROPY = 0.05
# Two statements of one µm/px that differ by more than this contradict each other.
_DISAGREEMENT = 0.05
_SLACK = 1e-9


def calibrate(tags: ScaleTags, *, override: float | None = None) -> Calibration:
    """The µm/px of level 0 to work with. `override` is the user's word and wins over the file's.

    A claim that cannot be true is refused by name, never repaired: the answer then has no mpp. Where x and y differ by
    5 % or less their geometric mean is taken. Raises OptionError for an `override` that is no length.
    """
    claim = _judge(tags)
    if override is None:
        return claim
    if not (math.isfinite(override) and override > 0):
        raise OptionError(f"{override:g} is not a µm/px; give a number above 0")
    detail = f"{override:g} µm/px is given"
    reasons = []
    if claim.claimed is not None and not _agree(override, claim.claimed):
        reasons.append("contradicts_file")
        detail += f", where the file says {claim.claimed:g} ({claim.tag})"
    usual = _within(override, USUAL)
    if not usual:
        reasons.append("unusual")
        detail += f", outside of the usual {USUAL[0]:g} to {USUAL[1]:g}"
    return Calibration(
        mpp=float(override),
        source="override",
        claimed=claim.claimed,
        tag=claim.tag,
        verdict="trusted" if usual else "suspicious",
        reasons=tuple(reasons),
        detail=detail,
    )


def read_mpp_table(path: str | os.PathLike[str]) -> dict[str, float]:
    """Slide file name -> µm/px, from a CSV with a header of `wsi,mpp`, `path,mpp` or `image_path,spacing_at_level_0`.

    Other columns are passed over. A slide is found by its name as the table gives it and by the name without folders,
    unless slides in two folders share that name and differ. Raises OptionError that names the line and the column.
    """
    table: dict[str, float] = {}
    for row in read_table(path, needs_mpp=True):
        assert row.mpp is not None
        known = table.setdefault(row.path, row.mpp)
        if known != row.mpp:
            raise OptionError(
                f"{os.fspath(path)}, line {row.line}: {row.path} was {known:g} µm/px above and is {row.mpp:g} here; keep one"
            )
    by_name: dict[str, set[float]] = {}
    for name, mpp in table.items():
        by_name.setdefault(re.split(r"[/\\]", name)[-1], set()).add(mpp)
    return {name: mpp for name, (mpp, *others) in by_name.items() if not others} | table


def _judge(tags: ScaleTags) -> Calibration:
    x, y, tag = tags.mpp_x, tags.mpp_y, tags.tag
    if x is None and y is None and tags.resolution_dpi is not None:
        x = 25400 / tags.resolution_dpi if tags.resolution_dpi else math.inf
        tag = tag or "tiff.XResolution"
    if x is None:
        x = y
    if y is None:
        y = x
    if x is None or y is None:
        return Calibration(mpp=None, source="none", verdict="missing", detail="the file does not say its µm/px")
    tag = tag or "metadata"
    refusals = dict(_refusals(x, y, tag, tags))
    if refusals:
        return Calibration(
            mpp=None,
            source="none",
            claimed=x if math.isfinite(x) else None,
            tag=tag,
            verdict="refused",
            reasons=tuple(refusals),
            detail="; ".join(refusals.values()),
        )
    mpp = x if x == y else math.sqrt(x * y)
    if not _within(mpp, USUAL):
        return Calibration(
            mpp=mpp,
            source="metadata",
            claimed=mpp,
            tag=tag,
            verdict="suspicious",
            reasons=("unusual",),
            detail=f"{mpp:g} µm/px ({tag}) is outside of the usual {USUAL[0]:g} to {USUAL[1]:g}, and taken all the same",
        )
    return Calibration(mpp=mpp, source="metadata", claimed=mpp, tag=tag, verdict="trusted", detail=f"{mpp:g} µm/px ({tag})")


def _refusals(x: float, y: float, tag: str, tags: ScaleTags) -> Iterator[tuple[str, str]]:
    """(reason, sentence) of every rule that the claim breaks."""
    claim = f"{x:g} µm/px ({tag})" if x == y else f"{x:g} x {y:g} µm/px ({tag})"
    if not (math.isfinite(x) and math.isfinite(y)):
        yield "not_finite", f"{claim} is not a finite number"
        return
    dpi = tags.resolution_dpi
    default = next((d for d in DEFAULT_DPI if dpi is not None and abs(dpi / d - 1) <= _DPI_SLACK), None)
    if default is not None:
        yield "dpi_default", f"{claim} is {default} dpi, what software writes where nobody told it the resolution"
    elif not (_within(x, POSSIBLE) and _within(y, POSSIBLE)):
        yield "out_of_range", f"{claim} is outside of the possible {POSSIBLE[0]:g} to {POSSIBLE[1]:g}"
    if min(x, y) > 0 and max(x, y) > min(x, y) * (1 + MAX_ANISOTROPY + _SLACK):
        yield "anisotropic", f"{claim} differs between x and y by over {MAX_ANISOTROPY:.0%}"
    power = tags.objective_power
    if power is not None and math.isfinite(power) and power > 0 and not _within(x * power, MPP_TIMES_POWER):
        low, high = MPP_TIMES_POWER
        yield (
            "power_conflict",
            f"{claim} does not go with an objective of {power:g}x: their product is outside {low:g} to {high:g}",
        )


def _agree(ours: float, theirs: float) -> bool:
    return theirs > 0 and abs(math.log(ours) - math.log(theirs)) <= _DISAGREEMENT


def _within(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] * (1 - _SLACK) <= value <= bounds[1] * (1 + _SLACK)
