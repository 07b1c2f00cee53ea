"""What can go wrong, by kind. Every message says what was asked, what there is, and what to do."""

from __future__ import annotations


class WsiscaleError(Exception):
    """Base of every expected error. `code` is stable and machine-readable; the message is one line."""

    code = "ERROR"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive pickling between dask workers by themselves.
        return _rebuild, (type(self), str(self), self.code)


def _rebuild(kind: type[WsiscaleError], message: str, code: str) -> WsiscaleError:
    return kind(message, code=code)


class SlideError(WsiscaleError):
    """The slide cannot be opened or read: NOT_FOUND, IS_DIRECTORY, EMPTY, NOT_A_SLIDE, NOT_RGB8, READ_FAILED, ..."""

    code = "NOT_A_SLIDE"


class MppError(WsiscaleError):
    """The slide's µm/px is missing or not to be believed, and what was asked needs it: MPP_MISSING, MPP_IMPLAUSIBLE."""

    code = "MPP_MISSING"


class ScaleError(WsiscaleError):
    """A magnification that the slide does not have, such as one finer than its finest level."""

    code = "TOO_FINE"


class NoTissueError(WsiscaleError):
    """Nothing on the slide looks like tissue."""

    code = "NO_TISSUE"


class ModelError(WsiscaleError):
    """The network cannot be loaded, or cannot take the tile it is given."""

    code = "MODEL"


class StoreError(WsiscaleError):
    """An output cannot be written, or a store is incomplete or damaged."""

    code = "STORE"


class OptionError(WsiscaleError):
    """An argument that makes no sense, whatever the slide; the command line exits with 2."""

    code = "USAGE"
