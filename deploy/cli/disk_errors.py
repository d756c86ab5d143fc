"""Faults of disks in one line: what, where, and what would be right."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from slimdiff.storage.atomic import is_leftover

_ELSEWHERE = "give another place"
NO_ROOM = {
    errno.ENOSPC: "no space left on the device: free some there (large scratch files go to TMPDIR), or give another",
    errno.EDQUOT: "the disk quota is used up: free some, or give a place without one",
    errno.EFBIG: "a file grows larger than it may here: raise the limit (ulimit -f), or give a place that takes it",
    errno.EROFS: f"the file system is read-only: {_ELSEWHERE}",
}
_NOT_HERE = {
    errno.EACCES: f"permission denied: {_ELSEWHERE}",
    errno.EPERM: f"operation not permitted: {_ELSEWHERE}",
    errno.EISDIR: "is a folder: name a file",
    errno.ENOTDIR: "leads through a file: name a place in a folder",
    errno.ENAMETOOLONG: "the name is too long here: give a shorter one",
    errno.EBUSY: "is in use by the system, such as a mount point: name a folder in it",
}


def describe(error: BaseException, out: str | None) -> str | None:
    """The line for an error, or for what caused it; None if no disk had to do with it.

    Args:
        error: any; libraries raise errors of their own for those of the system.
        out: where the command writes, which is named if the error names none.
    """
    cause: BaseException | None = error
    while cause is not None:
        code = _code(cause)
        if code is not None:
            where = _place(cause) or out
            advice = f"{NO_ROOM[code]}; what was finished is kept" if code in NO_ROOM else _NOT_HERE[code]
            return f"{where}: {advice}" if where else advice
        cause = cause.__cause__ or cause.__context__
    return None


def _code(error: BaseException) -> int | None:
    if isinstance(error, OSError) and (error.errno in NO_ROOM or error.filename and error.errno in _NOT_HERE):
        return error.errno
    text = str(error).lower()
    return next((code for code in NO_ROOM if os.strerror(code).lower() in text), None)


def _place(error: BaseException) -> str | None:
    """The path as the user knows it, without the folder that things are written in until they are whole."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str | bytes) or not name:
        return None
    return str(Path(*(part for part in Path(os.fsdecode(name)).parts if not is_leftover(part))))
