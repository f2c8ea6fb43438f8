"""Files and folders that are whole or not there."""

import errno
import fcntl
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from mspt.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT}  # what says that a disk is
# What says that there can be no file of a name; a full disk is another matter.
NO_PLACE = {
    *(errno.EEXIST, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM),
    *(errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP),
}


def write(path, data):
    """Write bytes or text beside path, flush them to the disk, then rename: path never holds a part, and of several
    processes that write it at once one follows the other.

    Raises UserError where there can be no such file.
    """
    path = Path(path)
    aside = _aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(aside) as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(aside, path)
    except OSError as error:
        if error.errno not in NO_PLACE:
            raise
        with suppress(OSError):
            aside.unlink()
        raise _no_place(path, error) from error


@contextmanager
def new_folder(path):
    """Yield a folder beside path to write into; when that went well it is flushed to the disk and renamed.

    Raises UserError where path is there already, another process is writing it, or there can be no such folder.
    """
    path = Path(path)
    aside = _aside(path)
    lock = aside.with_name(f"{aside.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        if error.errno not in NO_PLACE:
            raise
        raise _no_place(path, error) from error
    try:
        with _alone(lock, wait=False):
            try:
                if path.exists():
                    raise UserError(f"{path}: is there already; remove it or choose another name")
                if aside.exists():  # left by a killed process
                    shutil.rmtree(aside)
                aside.mkdir()
                try:
                    yield aside
                    for file in filter(Path.is_file, aside.rglob("*")):
                        with file.open("rb") as opened:
                            os.fsync(opened.fileno())
                    os.replace(aside, path)
                except BaseException:
                    shutil.rmtree(aside)
                    raise
            finally:
                lock.unlink()
    except BlockingIOError:
        raise UserError(f"{path}: another process is writing it; wait for that or choose another name") from None


def _aside(path):
    """Where path is written until it is whole. Raises UserError where path has no name."""
    if not path.name:
        raise UserError(f"{path}: has no name to write to; give a name in that folder")
    return path.with_name(f".{path.name}.partial")


def _no_place(path, error):
    return UserError(f"{path}: cannot be written ({error.strerror}); give another name")


@contextmanager
def _alone(path, wait=True):
    """Yield the file at path, emptied and open for writing, as the only process that has it so.

    Whoever has it may rename or remove it; who waited for it then has a new one. Raises BlockingIOError where another
    has it and there is no waiting.
    """
    while True:
        with path.open("ab") as file, _locked(file, wait):
            if _is_at(file, path):
                file.truncate(0)
                yield file
                return


def _is_at(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _locked(file, wait):
    """Hold a file's lock; nothing on a file system that has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        yield
        return
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # closing would not do: what is forked meanwhile has the file open too
