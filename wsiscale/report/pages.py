"""Values -> one self-contained HTML file. jinja2 is at home here; everything that is put in is escaped.

The page's own policy (Content-Security-Policy) forbids every request, and every script but the one that the page brings, by its
digest: a name with markup in it that got past the escaping would still do nothing.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from wsiscale.errors import StoreError
from wsiscale.publishing import replacing

_LARGEST = 448  # px a side of a tile on a page, which has thirty of them and should stay below 3 MB
_QUALITY = 86


def write_page(path: Path, template: str, **values: Any) -> None:
    """`template` with `values` as `path`, whole or not at all. Raises StoreError where it cannot be written."""
    # Whole before it is written, so that a mistake in a template leaves nothing behind.
    page = _environment().get_template(template).render(**values)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(page)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}", code="NOT_WRITABLE") from error


def make_folder(folder: Path) -> None:
    """Before the work whose page it will hold. Raises StoreError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"no page can be written to {folder}: {error.strerror or error}", code="NOT_WRITABLE") from error


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, never with an exponent; nothing for nothing."""
    if value is None or not math.isfinite(value):
        return ""
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return np.format_float_positional(value, precision=digits, unique=False, fractional=False, trim="-")


def percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def picture(pixels: NDArray[np.uint8], largest: int = _LARGEST) -> Markup:
    """(H, W, 3) as a data: address, JPEG, without any metadata; made smaller where it has more than `largest` px a side."""
    image = Image.fromarray(pixels)
    image.thumbnail((largest, largest))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    return Markup("data:image/jpeg;base64,{}").format(base64.b64encode(file.getvalue()).decode())


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("wsiscale.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["picture"] = picture
    environment.filters["trusted_svg"] = Markup  # figures.py's own drawings, whose text is numbers and words of ours

    def own(name: str) -> Markup:
        assert environment.loader is not None
        return Markup(environment.loader.get_source(environment, name)[0].strip())  # noqa: S704  a file of this package

    script = own("table.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals.update(style=own("page.css"), script=script, script_digest=digest)
    return environment
