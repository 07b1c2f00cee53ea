"""Whether a slide's pixels were interpolated: empty magnification, of which a tag knows nothing. Pure but for the reading.

A scanner's pixels have noise of their own, up to the finest frequency that they can hold. Interpolation is a low-pass filter:
of a slide that was made larger, the finest frequencies hold little but what leaks through it and the rounding to 8 bits, whose
power is known (Widrow & Kollár, Quantization Noise, 2008: 1/12 of a step squared, the same at all frequencies).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.signal import windows

from wsiscale.errors import SlideError
from wsiscale.places import sample_places
from wsiscale.stacks import scale_stack
from wsiscale.types import Reader, Tissue

FIELDS = 24
FIELD = 256  # px
FINE = (0.42, 0.5)  # cycles per px; interpolation to twice the size leaves them empty
COARSE = (0.05, 0.1)  # nuclei and fibres, which every slide has
LEAST_TEXTURE = 8.0  # grey levels, standard deviation: flat fields have no frequencies to lack
LEAST_FIELDS = 3
# Octaves of power between the two. Of 18 images of five sources and copies of half their size the steepest falls by 11.9; of
# copies of twice the size, bilinear, bicubic or Lanczos, the shallowest by 13.7 (benchmarks/mpp.py).
STEEPEST = -12.8
# A field whose coarse frequencies are less far above rounding could not fall that far.
LEAST_RANGE = 14.0
_LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Upsampling:
    """What the finest frequencies of a slide hold."""

    found: bool | None  # None where the slide has too little texture to tell
    fall: float | None  # octaves of power from the coarse to the finest frequencies, median over fields
    fields: int


def find_upsampling(slide: Reader, tissue: Tissue, *, seed: int = 0) -> Upsampling:
    """Whether level 0 was interpolated from half as many pixels a side or fewer. Raises NoTissueError.

    A slide that was interpolated and then compressed as JPEG again is not always seen: the blocks' noise fills the spectrum;
    nor is one of 1.4 times the size. One that was scanned far out of focus looks interpolated, and holds as little.
    """
    _, _, height, width = slide.pyramid.scanned
    if min(height, width) < FIELD:
        return Upsampling(None, None, 0)
    centers = sample_places(tissue, FIELDS, seed=seed, field=FIELD)
    # On whole pixels, or reading itself would interpolate.
    stack = scale_stack(slide, np.floor(centers), scales=[1.0], size=FIELD)
    falls = []
    for place in range(len(centers)):
        try:
            fall = spectral_fall(stack.images[place, 0].compute(scheduler="synchronous"))
        except SlideError as error:
            if error.code != "READ_FAILED":
                raise
            continue
        if fall is not None:
            falls.append(fall)
    if len(falls) < LEAST_FIELDS:
        return Upsampling(None, None, len(falls))
    typical = float(np.median(falls))
    return Upsampling(typical < STEEPEST, typical, len(falls))


def spectral_fall(image: NDArray[np.uint8]) -> float | None:
    """Octaves of an image's (n, n, 3) power from `COARSE` to `FINE`; None where it is too flat to tell."""
    grey = image @ _LUMA
    if grey.std() < LEAST_TEXTURE:
        return None
    window = np.outer(*[windows.hann(len(grey), sym=False)] * 2)
    power = np.abs(fft.fft2((grey - grey.mean()) * window)) ** 2
    frequency = np.hypot(*np.meshgrid(fft.fftfreq(len(grey)), fft.fftfreq(len(grey))))
    rounding = np.square(_LUMA).sum() / 12 * np.square(window).sum()
    coarse, fine = (np.log2(power[(frequency >= low) & (frequency < high)].mean() / rounding) for low, high in (COARSE, FINE))
    return float(fine - coarse) if coarse >= LEAST_RANGE else None
