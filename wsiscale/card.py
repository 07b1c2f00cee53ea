"""Model cards as files: what they say, and putting more into them. docs/model-cards.md has the fields."""

from __future__ import annotations

import base64
import difflib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsiscale.errors import ModelError

# Cards that come with wsiscale; the embedded network's is one of them.
CARDS = Path(__file__).parent / "cards"
DEFAULT_CARD = CARDS / "default.json"


def shipped_cards() -> dict[str, Path]:
    """The cards that come with wsiscale, by name."""
    return {path.stem: path for path in sorted(CARDS.glob("*.json"))}


def shipped_card(name: str) -> Path:
    """The file of `card:NAME`. Raises ModelError."""
    known = shipped_cards()
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, 3)) or ", ".join(known)
        raise ModelError(f"no card {name!r} comes with wsiscale; there are {near} (wsiscale cards lists all)")
    return known[name]


def read_card(card: str | Path) -> dict[str, Any]:
    """The fields in a card's file. Raises ModelError."""
    path = Path(card)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"the card {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the card {path} is not a model card, and not JSON: {error}") from error
    if not isinstance(known, dict):
        raise ModelError(f"the card {path} holds no object; a model card is a JSON object with the field factory")
    return known


def update_card(card: str | Path, changes: Mapping[str, Any], *, fields: Mapping[str, Any] | None = None) -> None:
    """Puts `changes` into a card's file, which is whole at any time; its other fields stay, or become `fields`."""
    path = Path(card)
    known = dict(fields) if fields is not None else read_card(path) if path.exists() else {}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(known | dict(changes), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def packed(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Arrays as text for JSON: npz in base64."""
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    return base64.b64encode(file.getvalue()).decode("ascii")


def unpacked(text: str, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """What `packed` wrote. Runs no code from it; LookupError or ValueError where it is damaged."""
    try:
        with np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
