"""Names on the command line that stand for Python objects: `file.py:name`, `package.module:name`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from wsiscale.errors import OptionError


def load_object(spec: str) -> Any:
    """The object that `file.py:name` or `package.module:name` names. Runs that file or module: it is the user's own code."""
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise OptionError(f"{spec!r} names nothing; write file.py:name or package.module:name")
    module = _from_file(Path(where)) if where.endswith(".py") else _from_package(where)
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise OptionError(f"{where} has no {name!r}") from error


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise OptionError(f"{path} is not a file; write file.py:name with the path from here")
    # A name of its own, so that two files called nets.py do not shadow each other, nor an installed package.
    name = f"wsiscale_plugin_{abs(hash(path.resolve()))}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    module_spec.loader.exec_module(module)
    return module


def _from_package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise OptionError(f"there is no module {name!r} to import ({error})") from error
