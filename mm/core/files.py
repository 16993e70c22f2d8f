"""Files: written whole or not at all, and opened for reading only where they are regular files.

Design choices
- A result is written under a temporary name, flushed, then renamed. A stopped job leaves at most a hidden
  `.NAME.PID.part` behind.
- A named pipe, a device or a folder given as an input is refused before anything is read: reading a pipe waits for
  ever, and `/dev/zero` has no end.
- Whether a folder can be written is tried with a temporary file, since permissions alone do not say it (a full or
  read-only file system).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path

from mm.core.errors import UserError
from mm.core.nouns import with_article


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file, whole or not at all. One that is there is replaced; its folder is made where it is missing.

    Raises:
        UserError: where the path is a folder or a device, or lies in something that is no folder.
        OSError: for a file system that refuses it, with the file's own name.
    """
    write_files({Path(path): data})


def write_files(files: Mapping[str, bytes] | Mapping[Path, bytes]) -> None:
    """Writes files that belong together: each whole, and all of them or none. Those that are there are replaced.

    All are written under temporary names before the first gets its own, so that a full disk leaves what was there.

    Args:
        files: bytes by path. Folders are made where they are missing.

    Raises:
        UserError: where a path is a folder or a device, or lies in something that is no folder.
        OSError: for a file system that refuses one, with the file's own name.
    """
    targets = {Path(path): data for path, data in files.items()}
    parts = {target: target.with_name(f".{target.name}.{os.getpid()}.part") for target in targets}
    for target in targets:
        check_place(target)
    try:
        for target, data in targets.items():
            with _naming(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                _write_through(parts[target], data)
        for target, part in parts.items():
            with _naming(target):
                part.replace(target)
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):  # of a name that the system refuses
                part.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Gives errors the name of a file: a user did not name the hidden one."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(target), None
        raise


def _write_through(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def check_place(path: str | os.PathLike[str]) -> None:
    """Raises UserError where a path cannot be a file: it is a folder or a device, or lies in something that is none."""
    target = Path(path)
    if target.is_dir():
        raise UserError(f"{target} is a folder; give a file name")
    if target.exists() and not target.is_file():  # the rename would put a file in the place of a device or a pipe
        raise UserError(f"{target} is no regular file; give the name of one, or of a new one")
    found = next((above for above in target.parents if os.path.lexists(above)), None)
    if found is not None and not found.is_dir():
        raise UserError(f"{found} is no folder, so {target} cannot be written; give another place")


def check_new(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Checks, before the work for it is done, that a file can be written.

    Args:
        path: of the file.
        force: whether a file that exists may be replaced.

    Raises:
        UserError: where the path exists and may not be replaced, is a folder or a device, or lies where nothing can be
            written.
    """
    target = Path(path)
    check_place(target)
    if os.path.lexists(target) and not force:
        raise UserError(f"{target} exists; choose another name, or give --force to replace it")
    check_folder(target.parent)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raises UserError unless files can be written into a folder, or into the one that it will be made in."""
    folder = Path(path)
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{there} is a file, so nothing can be written into {folder}; give a folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{there} cannot be written to ({error.strerror or error}); give another folder") from error


def write_new_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that must not be there yet. Raises FileExistsError, also where another process was quicker."""
    target = Path(path)
    whole = target.with_name(f".{target.name}.{os.getpid()}.new")
    write_bytes(whole, data)
    try:
        os.link(whole, target)  # unlike a rename, fails where the name is taken
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        whole.replace(target)
    finally:
        whole.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text as `write_bytes` does: a file that is there is replaced."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Writes indented JSON as `write_bytes` does: a file that is there is replaced.

    A NaN raises: it is no JSON, and a result with one is none.
    """
    write_bytes(path, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """Indented JSON in UTF-8, as `write_json` writes it. A NaN raises ValueError."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def open_regular(path: str | os.PathLike[str], what: str = "file", *, most: int | None = None) -> BufferedReader:
    """Opens a regular file for reading in binary; links to one are followed.

    Args:
        path: the file.
        what: what the file is, for the error message, for example "picture".
        most: the largest size allowed, in bytes; None for any.

    Returns:
        The open file. Close it, or use it in a `with` statement.

    Raises:
        UserError: where there is no such file, it is no regular file, it is larger than `most`, or cannot be opened.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe waits until somebody writes to it.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise UserError(f"no {what} at {path}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder; give {with_article(what)}") from error
        raise UserError(f"{path} cannot be opened ({getattr(error, 'strerror', None) or error})") from error
    found = os.fstat(number)
    why = _unfit(found, what, most)
    if why:
        os.close(number)
        raise UserError(f"{path} {why}")
    return os.fdopen(number, "rb")


def read_regular(path: str | os.PathLike[str], what: str = "file", *, most: int) -> bytes:
    """All bytes of a regular file of at most `most` bytes. Raises UserError as `open_regular` does."""
    try:
        with open_regular(path, what, most=most) as file:
            data = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    if len(data) > most:
        raise UserError(f"{path} is larger than {most} bytes, the most that {with_article(what)} may have")
    return data


def read_text_lines(path: str | os.PathLike[str], what: str = "text file", *, most: int = 64 << 20) -> list[str]:
    """The lines of a UTF-8 text file of at most `most` bytes. Raises UserError as `open_regular` does."""
    try:
        return read_regular(path, what, most=most).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text (byte {error.start}); save the {what} as UTF-8") from error


def _unfit(found: os.stat_result, what: str, most: int | None) -> str:
    """Why an opened file is not read; empty when it can be."""
    if stat.S_ISDIR(found.st_mode):
        return f"is a folder; give {with_article(what)}"
    if not stat.S_ISREG(found.st_mode):
        return f"is no regular file; give {with_article(what)}"
    if most is not None and found.st_size > most:
        return f"has {found.st_size} bytes; {with_article(what)} may have at most {most}"
    return ""
