"""What was read from afar, kept on a local disk: bounded, and shared by all processes of a machine.

An entry is a file that appears whole, by a rename. Reading needs no lock; adding takes one for the moment in which the
entry is counted and renamed. Entries are not trusted: who reads one checks it.
"""

import contextlib
import fcntl
import logging
import os
import time
import uuid
from pathlib import Path

from mspt.errors import UserError

log = logging.getLogger("mspt")

SUFFIX = ".cached"  # only such files are ever removed, whatever else lies in the folder
PARTIAL = ".cached-partial"
USED = ".used"  # locked while an entry is added; holds the bytes that the entries take in all
ROOM = 0.9  # of the bound is left after entries had to go, so that this is seldom
STALE = 3600.0  # seconds after which a part is that of a process that was killed


class Cache:
    """folder: made if it is not there. bound: bytes that the entries take at most.

    Raises UserError where the folder cannot be made or written to.
    """

    def __init__(self, folder, bound):
        self.folder, self.bound, self.off = Path(folder), bound, False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be used as a cache ({error.strerror}); "
                "set data.store.cache to a folder that can be written to"
            ) from error

    def path(self, name):
        """Where an entry lies, if it is there."""
        return self.folder / f"{name}{SUFFIX}"

    def read(self, name):
        """The bytes of an entry, which becomes the one used last; None where it is not there or cannot be read."""
        try:
            with self.path(name).open("rb", buffering=0) as file:
                with contextlib.suppress(OSError):  # another user's
                    os.utime(file.fileno())
                return file.readall()
        except OSError:
            return None

    def add(self, name, write):
        """Make write(path) an entry, in place of one of this name; the entries used longest ago go to make room.

        A disk that is full or broken turns the cache off in this process, with one warning.
        """
        if self.off:
            return
        aside = self.folder / f".{uuid.uuid4().hex}{PARTIAL}"
        try:
            write(aside)
            self._publish(aside, self.path(name))
        except OSError as error:
            self.off = True
            log.warning(
                "%s: what is read cannot be kept (%s), so it is read from afar each time; make room or set "
                "data.store.cache to another folder",
                self.folder,
                error.strerror or error,
            )
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self):
        """The descriptor of the locked file. The lock of a process that is killed goes with it."""
        lock = os.open(self.folder / USED, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            # Closing is not enough where another thread has forked meanwhile: the child holds the file too.
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)

    def _publish(self, aside, path):
        size = aside.stat().st_size
        if size > self.bound:
            return
        with self._locked() as lock:
            counted = os.pread(lock, 8, 0)
            used = int.from_bytes(counted, "little")
            if len(counted) < 8 or used + size > self.bound:
                used = self._make_room(size)
            # In this order: killed in between, it counts too much, which the next look at the folder corrects.
            os.pwrite(lock, (used + size).to_bytes(8, "little"), 0)
            os.replace(aside, path)

    def _make_room(self, size):
        """Remove what was used longest ago where size more would be too much -> bytes that the entries then take."""
        entries, used = [], 0
        with os.scandir(self.folder) as found:
            for entry in found:
                if not entry.name.endswith((SUFFIX, PARTIAL)):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if entry.name.endswith(SUFFIX):
                        entries.append((status.st_mtime_ns, status.st_size, entry.path))
                        used += status.st_size
                    elif time.time() - status.st_mtime > STALE:
                        os.unlink(entry.path)
        if used + size <= self.bound:
            return used
        for _, entry_size, path in sorted(entries):
            if used + size <= ROOM * self.bound:
                break
            Path(path).unlink(missing_ok=True)
            used -= entry_size
        return used
