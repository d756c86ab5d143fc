"""Files and folders that appear whole or not at all, whatever happens meanwhile.

What is written lies in a folder of its own beside its place, `.NAME.xxxxxxxx.partial`, and is moved once it is on the
disk. The writer holds a lock on that folder. The operating system takes the lock back when the process ends, however it
ends, so whoever writes there next can tell what a killed process left from what another one is writing just now.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import lock_descriptor

_WORKPLACE = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.partial")
_WORKING_DIRECTORY, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def replacing(path: Path, *, is_file: bool = False) -> Iterator[Path]:
    """Write to a temporary place whose content takes that of `path` when the block ends well, and is removed if not.

    Somebody who looks at `path` meanwhile finds what was there before, or all that is new. What killed processes left
    of earlier attempts at the same path is cleared away.

    Args:
        path: the file or folder to appear; where it is a link, what the link leads to.
        is_file: whether the block writes a file; else a new, empty folder is made for it.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent, path.name)
    with _workplace(path) as workplace:
        temporary = workplace / path.name
        if not is_file:
            temporary.mkdir()
        yield temporary
        _flush(temporary)
        if is_file:
            os.replace(temporary, path)
        else:
            _replace_folder(temporary, path)
        _flush_entry(path.parent)


def try_place(folder: Path) -> None:
    """Begin to write in a folder as `replacing` does, and leave off: permissions do not say all, as of `/proc`.

    Raises:
        OSError: that writing there would end with.
    """
    with _workplace(folder.resolve() / "place"):
        pass


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes were writing in a folder; what a living one is writing stays.

    Args:
        name: of the file or folder that was to appear; None: any.
    """
    with os.scandir(folder) as entries:
        found = [Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False)]
    for workplace in found:
        left = _WORKPLACE.fullmatch(workplace.name)
        if left is not None and name in (None, left["name"]):
            _clear(workplace, folder / left["name"])


def is_leftover(name: str) -> bool:
    """Whether a file's or folder's name is one that `replacing` gives while it writes."""
    return _WORKPLACE.fullmatch(name) is not None


@contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """A folder on the same file system, marked as in use."""
    with contextlib.ExitStack() as stack:
        while True:
            folder = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
            folder.mkdir()
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            _hold(folder, stack)
            if folder.is_dir():  # or it was taken for a leftover before it was held
                break
        yield folder


def _hold(folder: Path, stack: contextlib.ExitStack) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):  # Windows opens no folders: what a killed process left stays there
        return
    stack.callback(os.close, descriptor)
    with contextlib.suppress(OSError):  # a file system without locks: nobody clears what they cannot lock, either
        lock_descriptor(descriptor)


def _clear(workplace: Path, path: Path) -> None:
    try:
        descriptor = os.open(workplace, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return
    try:
        if not lock_descriptor(descriptor, blocking=False):  # somebody is writing there
            return
        if not path.exists() and (aside := _aside(workplace, path)).exists():
            aside.rename(path)
        shutil.rmtree(workplace, ignore_errors=True)
    except OSError:  # somebody may be writing there
        return
    finally:
        os.close(descriptor)


def _replace_folder(temporary: Path, path: Path) -> None:
    try:
        temporary.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(temporary, path):
            _move_aside(temporary, path)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None:
        return False
    if swap(_WORKING_DIRECTORY, os.fsencode(one), _WORKING_DIRECTORY, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _move_aside(temporary: Path, path: Path) -> None:
    """Two renames. Killed between them, the old folder lies in the workplace, and `_clear` puts it back."""
    aside = _aside(temporary.parent, path)
    path.rename(aside)
    try:
        temporary.rename(path)
    except OSError:
        aside.rename(path)
        raise


def _aside(workplace: Path, path: Path) -> Path:
    return workplace / f".{path.name}.old"


def _flush(path: Path) -> None:
    """Wait until a file, or a folder with all in it, is on the disk: else a power cut may leave names without content.

    Raises:
        OSError: if it could not all be written; some file systems find that out only now.
    """
    if path.is_dir():
        for place, _, names in os.walk(path, topdown=False):
            for name in names:
                _flush(Path(place) / name)
            _flush_entry(Path(place))
    elif os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _flush_entry(folder: Path) -> None:
    """The same for the names in a folder, where the file system knows how."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
