"""A folder, or a file, that has its name once it is whole: one writer, a temporary name beside the final one, one rename.

Whoever finds the final name finds it complete; what killed writers leave is collected by the next one of that name.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from wsiscale.errors import StoreError

MANIFEST = "manifest.json"


@contextmanager
def published(path: Path, *, overwrite: bool, durable: bool = False) -> Iterator[Path]:
    """A temporary name beside `path` for a folder that becomes `path` in one rename at the end, or is removed."""
    with reserved(path, overwrite=overwrite):
        temporary = _sibling(path, "partial")
        try:
            yield temporary
            if durable:
                _to_disk(*temporary.rglob("*"), temporary)
            if overwrite and path.exists():
                _exchange(temporary, path)
            else:
                os.rename(temporary, path)
            if durable:
                _to_disk(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # after an exchange that is the older store


@contextmanager
def published_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """The same for a file."""
    try:
        with _locked(path):
            _collect_leftovers(path)
            if path.is_dir() or path.is_symlink():
                raise StoreError(
                    f"{path} is a folder or a link, and a file is to be written; choose another name", code="EXISTS"
                )
            if path.exists() and not overwrite:
                raise StoreError(f"{path} exists; choose another name, or replace it with --overwrite", code="EXISTS")
            temporary = _sibling(path, "partial")
            try:
                yield temporary
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _os_error(path, error) from error


def _to_disk(*paths: Path) -> None:
    """Files and folders out of the system's memory."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A text file that becomes `path` once it is whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def reserved(path: Path, *, overwrite: bool) -> Iterator[None]:
    """`path` for one writer. Of several processes one gets in; the others are told at once. Every OSError is a StoreError."""
    try:
        with _locked(path):
            _collect_leftovers(path)
            if os.path.lexists(path):
                _check_replaceable(path, overwrite=overwrite)
            yield
    except OSError as error:
        raise _os_error(path, error) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The right to write `path`, for one process or thread at a time; the system takes it back when a process dies."""
    lock = path.with_name(f".{path.name}.lock")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file may be one that its last holder has just removed, and that a third process makes anew.
            if lock.exists() and os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                break
        except BlockingIOError:
            os.close(descriptor)
            raise StoreError(f"{path} is being written by another process", code="LOCKED") from None
        except FileNotFoundError:
            pass
        os.close(descriptor)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.{kind}")


def _collect_leftovers(path: Path) -> None:
    """Removes what killed processes left beside `path`, and gives back a store that one had set aside."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.\d+-[0-9a-f]{{8}}\.(partial|aside)")
    for sibling in sorted(path.parent.iterdir()):
        if not (match := ours.fullmatch(sibling.name)):
            continue
        if match[1] == "aside" and not path.exists():
            os.rename(sibling, path)
        elif sibling.is_file():
            sibling.unlink()
        else:
            shutil.rmtree(sibling, ignore_errors=True)


def _check_replaceable(path: Path, *, overwrite: bool) -> None:
    if path.is_symlink() or not path.is_dir():
        raise StoreError(f"{path} is a file or a link; a store is a folder, choose another name", code="EXISTS")
    if not overwrite:
        raise StoreError(f"{path} exists; choose another name, or replace it with --overwrite", code="EXISTS")
    if not any((path / name).exists() for name in (MANIFEST, "zarr.json", ".zgroup")):
        raise StoreError(f"{path} is not a store, and so is not overwritten; choose another name", code="EXISTS")


def _exchange(new: Path, old: Path) -> None:
    """Swaps two folders: in one step where the system can, else by renames with the older one set aside in between."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2 is not None and renameat2(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0:
        return
    aside = _sibling(old, "aside")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise
    os.rename(aside, new)


def _os_error(path: Path, error: OSError) -> StoreError:
    why = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = in_bytes(shutil.disk_usage(path.parent).free)
        return StoreError(f"{path} was not finished, nothing is left of it: {why} ({free} free); make room", code="NO_SPACE")
    if not path.parent.is_dir():
        return StoreError(f"there is no folder {path.parent}; make it first", code="NOT_FOUND")
    return StoreError(f"{path} cannot be written: {why}", code="NOT_WRITABLE")


def in_bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
