"""What a result depends on, for the record of its making."""

from __future__ import annotations

import importlib.metadata
import platform


def versions(*distributions: str) -> dict[str, str]:
    """Of wsiscale, Python and the given distributions, those that are installed."""
    found = {"python": platform.python_version()}
    for name in ("wsiscale", *distributions):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
