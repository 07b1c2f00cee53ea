"""Slide files as pixels: one protocol (`types.Reader`), one module per library behind it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsiscale.errors import OptionError, SlideError
from wsiscale.readers.array import ArrayReader
from wsiscale.readers.files import FileReader, check_file, one_line, tiff_header
from wsiscale.types import Reader

__all__ = ["READERS", "ArrayReader", "open_slide"]

READERS = ("auto", "jpegtiff", "jpegtiff-fast", "openslide", "tiffslide", "dicom")

_SPECIFIC = ("UNSUPPORTED_COMPRESSION", "MISSING_EXTRA")


def open_slide(
    path: str | os.PathLike[str] | Reader | NDArray[np.uint8], *, mpp: float | None = None, reader: str = "auto"
) -> Reader:
    """A slide from a file, from an (H, W, 3) uint8 array in memory, or a Reader as it is.

    `mpp` is the µm/px of level 0, and overrides what the file says. "auto" tries OpenSlide, then TiffSlide, then DICOM;
    OME-TIFF goes to TiffSlide first, because OpenSlide sees neither its levels nor its scale. Where the file is a plain grid of
    TIFF tiles, "jpegtiff" then reads the pixels in its place, the same ones and faster. "jpegtiff-fast", only where it is asked
    for, also decodes JPEG tiles at a half, a quarter and an eighth, which is faster still and not quite the same.

    Raises SlideError (NOT_FOUND, IS_DIRECTORY, EMPTY, NOT_A_SLIDE, NOT_RGB8, TOO_LARGE, HOSTILE_XML,
    UNSUPPORTED_COMPRESSION, MISSING_EXTRA), OptionError.
    """
    if reader not in READERS:
        raise OptionError(f"there is no reader {reader!r}; choose one of {', '.join(READERS)}", code="BAD_OPTION")
    if isinstance(path, np.ndarray):
        return ArrayReader(path, mpp=mpp)
    if not isinstance(path, (str, os.PathLike)):
        if mpp is not None:
            raise OptionError("this slide is open already and has its µm/px; give mpp where it is opened")
        return path
    file = check_file(path)
    if file.is_dir() and not any(child.suffix.lower() == ".dcm" for child in file.iterdir()):
        raise SlideError(f"{file} is a folder without DICOM files; give a slide file", code="IS_DIRECTORY")
    if reader != "auto":
        return _open(reader, file, mpp)
    with suppress(SlideError):
        if not file.is_dir() and tiff_header(file) is not None:
            return _open("jpegtiff", file, mpp)
    return compatible(file, mpp=mpp)


def compatible(file: Path, *, mpp: float | None = None) -> FileReader[Any]:
    """The slide through the first compatibility reader that opens it. Raises SlideError."""
    refusals: list[SlideError] = []
    candidates = _candidates(file)
    for candidate in candidates:
        try:
            return _open(candidate, file, mpp)
        except SlideError as error:
            if error.code not in ("NOT_A_SLIDE", *_SPECIFIC):
                raise
            refusals.append(error)
    code = next((error.code for error in refusals if error.code in _SPECIFIC), "NOT_A_SLIDE")
    said = "; ".join(one_line(error).removeprefix(f"{file.name}: ") for error in refusals)
    raise SlideError(f"{file.name} cannot be opened as a slide; tried {', '.join(candidates)}: {said}", code=code)


def _candidates(file: Path) -> list[str]:
    """The readers that may open a file, the likeliest first."""
    if file.is_dir():
        return ["dicom"]
    header = tiff_header(file)
    if header is not None:
        return ["tiffslide", "openslide"] if header.is_ome else ["openslide", "tiffslide"]
    return ["openslide", "dicom"] if file.suffix.lower() == ".dcm" else ["openslide"]


def _open(reader: str, file: Path, mpp: float | None) -> FileReader[Any]:
    # Imported here: each brings a native library, and `import wsiscale` needs none of them.
    if file.is_dir() and reader != "dicom":
        raise SlideError(f"{file} is a folder, which {reader} does not open; give a slide file", code="IS_DIRECTORY")
    if reader == "jpegtiff":
        from wsiscale.readers.jpegtiff import JpegTiffReader

        return JpegTiffReader(file, mpp=mpp)
    if reader == "jpegtiff-fast":
        from wsiscale.readers.jpegtiff import JpegTiffFastReader

        return JpegTiffFastReader(file, mpp=mpp)
    if reader == "openslide":
        from wsiscale.readers.openslide import OpenSlideReader

        return OpenSlideReader(file, mpp=mpp)
    if reader == "tiffslide":
        from wsiscale.readers.tiffslide import TiffSlideReader

        return TiffSlideReader(file, mpp=mpp)
    from wsiscale.readers.dicom import DicomReader

    return DicomReader(file, mpp=mpp)
