"""Files and folders that are whole or not there."""

import fcntl
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from mspt.errors import UserError


def write(path, data):
    """Write bytes or text beside path, flush them to the disk, then rename: path never holds a part, and of several
    processes that write it at once one follows the other.

    Raises UserError where there can be no such file.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(aside) as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(aside, path)
    except (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        with suppress(OSError):
            aside.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another name") from error


@contextmanager
def new_folder(path):
    """Yield a folder beside path to write into; when that went well it is flushed to the disk and renamed.

    Raises UserError where path is there already, or another process is writing it.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    lock = aside.with_name(f"{aside.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
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
