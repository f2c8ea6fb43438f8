"""Where the files of a shard set lie: in a local folder, behind a URL, or behind a command that writes them out."""

import contextlib
import errno
import functools
import hashlib
import logging
import mmap
import os
import random
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import fsspec
import numpy as np
from pydantic import Field

from mspt.errors import UserError
from mspt.files import FULL
from mspt.settings import Settings

log = logging.getLogger("mspt")

FILES = 128  # of one set that a process keeps mapped
ATTEMPTS, FIRST_WAIT = 8, 0.5  # a wait doubles each time: about a minute in all
CONNECT, SILENCE = 30.0, 60.0  # seconds that an HTTP server may take to answer at all, and between two of its bytes
PIECE = 1 << 24  # bytes of a file that is read from one end to the other
WORTH_TRYING = {408, 425, 429}  # of the answers 4xx; all others say that this request is wrong


class StoreSettings(Settings):
    """cache: folder on a disk of the machine that keeps blocks read from URLs, for all its processes; none: they are
    read from afar each time. cache_bytes: what it may take. allow_pipe: whether a set may be given as "pipe:COMMAND",
    which runs a shell command.
    """

    cache: str | None = None
    cache_bytes: int = Field(1 << 36, ge=1)
    allow_pipe: bool = False


def open_store(url, settings):
    """The store of a folder, a URL (s3://, gs://, https://, memory://, …: what fsspec knows) or pipe:COMMAND.

    Raises UserError where a pipe is not allowed or has no cache or no {file}, or where nothing can read the URL.
    """
    url = str(url)
    if url.startswith("pipe:"):
        return _pipe(url, settings)
    protocol, path = fsspec.core.split_protocol(url)
    if protocol in (None, "file", "local"):
        return Folder(path)
    return Remote(url.rstrip("/"))


def _pipe(url, settings):
    if not settings.allow_pipe:
        raise UserError(f"{url}: runs a command, which is not allowed; set data.store.allow_pipe=true if you trust it")
    if "{file}" not in url:
        raise UserError(f"{url}: does not say which file it writes out; put {{file}} where the file's name belongs")
    if settings.cache is None:
        raise UserError(f"{url}: writes out whole shards, which a cache has to keep; set data.store.cache to a folder")
    return Pipe(url.removeprefix("pipe:"))


def sha256(path):
    """Of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mapped(path):
    """A file that is open and mapped until nobody holds a view of it, and its bytes. Raises OSError."""
    with open(path, "rb") as file:
        try:
            opened = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except ValueError as error:  # what is empty cannot be mapped
            raise OSError(errno.ENODATA, "is empty") from error
    return opened, np.frombuffer(opened, np.uint8)


class Folder:
    """A local folder, whose files are mapped: threads and forked processes can share them."""

    def __init__(self, path):
        self.root = str(Path(path))
        self._opened = functools.lru_cache(FILES)(_mapped)

    def __reduce__(self):
        return Folder, (self.root,)

    def path(self, file):
        return f"{self.root}/{file}"

    def fetch(self, file):
        """The bytes of a small file. Raises OSError."""
        return Path(self.path(file)).read_bytes()

    def sizes(self, files):
        """Name -> bytes of those files that are there. Raises UserError where that cannot be told."""
        result = {}
        for file in files:
            try:
                result[file] = os.stat(self.path(file)).st_size
            except FileNotFoundError:
                continue
            except OSError as error:
                raise _unreadable(self.path(file), error) from error
        return result

    def sha256(self, file, size):
        """Of a file of that size, in hexadecimal. Raises UserError where it cannot be read."""
        try:
            return sha256(self.path(file))
        except OSError as error:
            raise _unreadable(self.path(file), error) from error

    def view(self, file, offset, size):
        """Bytes of a file, uint8 [size], which stay where the system keeps files: processes share them.

        Fewer where the file ends. Raises UserError where it cannot be read. A disk that fails, or a file that is cut,
        in the instant in which the view is used ends the process (SIGBUS).
        """
        path = self.path(file)
        try:
            opened, data = self._opened(path)
            # What has been cut off since it was mapped must not be touched.
            end = min(offset + size, opened.size())
            if offset < end:
                # All of it at once: on its own, the system would read a little at every page that is not there.
                start = offset - offset % mmap.PAGESIZE
                opened.madvise(mmap.MADV_WILLNEED, start, end - start)
        except OSError as error:
            raise _unreadable(path, error) from error
        return data[offset:end]


def _unreadable(path, error):
    return UserError(f"{path}: cannot be read ({error.strerror}); restore it or build the set again")


class Remote:
    """A folder behind a URL that fsspec knows. Only the bytes that are asked for are fetched.

    What may pass is tried again, with waits that double and differ between processes. Raises UserError, which names
    the URL, where that does not help.
    """

    def __init__(self, url):
        self.root, self._pid = url, None

    def __reduce__(self):
        return Remote, (self.root,)

    def path(self, file):
        return f"{self.root}/{file}"

    def fetch(self, file):
        """The bytes of a small file. Raises FileNotFoundError."""
        return self._try(file, lambda system, path: system.cat_file(path))

    def save(self, file, to):
        """Write a file of any size to a local path. Raises OSError where the local disk is full."""
        self._try(file, lambda system, path: system.get_file(path, str(to)))

    def sizes(self, files):
        """Name -> bytes of those files that are there, from one listing; None where listings are not to be had."""
        if self._is_http():
            return None
        try:
            entries = self._try("", lambda system, path: system.ls(path, detail=True, refresh=True))
        except (UserError, FileNotFoundError):
            return None
        there = {Path(entry["name"]).name: entry["size"] for entry in entries}
        return {file: there[file] for file in files if file in there}

    def sha256(self, file, size):
        """Of a file of that size, in hexadecimal."""
        digest, buffer = hashlib.sha256(), np.empty(PIECE, np.uint8)
        for offset in range(0, size, PIECE):
            piece = buffer[: min(PIECE, size - offset)]
            digest.update(piece[: self.read(file, offset, piece)])
        return digest.hexdigest()

    def read(self, file, offset, into):
        """As Folder.read."""
        end = offset + len(into)
        try:
            data = self._try(file, lambda system, path: system.cat_file(path, start=offset, end=end))
        except FileNotFoundError as error:
            raise UserError(f"{self.path(file)}: is missing; restore it or build the set again") from error
        except UserError as error:
            if _status(error.__cause__) == 416:  # from past the end of a file that was cut
                return 0
            raise
        if len(data) > len(into):
            raise UserError(
                f"{self.path(file)}: the server ignores byte ranges and sends whole files; serve the set from one "
                "that answers them, or copy it to a local folder"
            )
        into[: len(data)] = np.frombuffer(data, np.uint8)
        return len(data)

    def _is_http(self):
        return self.root.startswith(("http:", "https:"))

    def _system(self):
        """The fsspec filesystem of this process, and the path of the folder in it."""
        # One that was made before a fork waits forever for a thread that only the parent has.
        if self._pid != os.getpid():
            options = {}
            try:
                if self._is_http():
                    import aiohttp

                    # Bytes as they are stored: a range of compressed ones is of no use.
                    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENCE)
                    options["client_kwargs"] = {"headers": {"Accept-Encoding": "identity"}, "timeout": timeout}
                self._opened = fsspec.core.url_to_fs(self.root, **options)
            except (ImportError, ValueError) as error:
                raise UserError(f"{self.root}: cannot be opened ({_said(error)})") from error
            self._pid = os.getpid()
        return self._opened

    def _try(self, file, call):
        """call(filesystem, path of the file in it) -> its result, at most ATTEMPTS times. Raises FileNotFoundError."""
        system, base = self._system()
        path, attempt = self.path(file), 1
        while True:
            try:
                return call(system, f"{base}/{file}" if file else base)
            except FileNotFoundError:
                raise
            except Exception as error:  # each filesystem has its own
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                remedy = _remedy(error)
                if remedy:
                    raise UserError(f"{path}: cannot be read ({_said(error)}); {remedy}") from error
                if attempt == ATTEMPTS:
                    raise UserError(
                        f"{path}: cannot be read after {ATTEMPTS} attempts ({_said(error)}); see that the server can "
                        "be reached, then start again"
                    ) from error
                # From the system: random numbers of the run are left alone, and forked processes differ.
                wait = FIRST_WAIT * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1.5)
                log.warning("%s: %s; trying again in %.1f s", path, _said(error), wait)
            time.sleep(wait)
            attempt += 1


def _status(error):
    """The HTTP status behind an error, where its filesystem says it."""
    return next((s for name in ("status", "code") if isinstance(s := getattr(error, name, None), int)), None)


def _remedy(error):
    """What the user can do about an error that would only come again; None where it may pass."""
    status = _status(error)
    if isinstance(error, PermissionError) or status in (401, 403):
        return "access is refused: check the credentials that fsspec finds"
    wrong = status is not None and 400 <= status < 500 and status not in WORTH_TRYING
    if wrong or isinstance(error, (ValueError, TypeError, NotImplementedError)):
        return "check the URL"
    return None


def _said(error):
    """An error in one line; some have no text."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


class Pipe:
    """A shell command that writes the file whose name stands for {file} to its standard output.

    Raises UserError where it ends with another exit status than 0. It is not tried again: that is the command's to do.
    """

    def __init__(self, command):
        self.command, self.root = command, f"pipe:{command}"

    def __reduce__(self):
        return Pipe, (self.command,)

    def path(self, file):
        return f"pipe:{self._line(file)}"

    def _line(self, file):
        return self.command.replace("{file}", shlex.quote(file))

    def fetch(self, file):
        """The bytes of a small file."""
        with self._output(file) as output:
            return output.read()

    def save(self, file, to):
        """Write a file of any size to a local path. Raises OSError where the local disk is full."""
        with self._output(file) as output, Path(to).open("wb") as target:
            shutil.copyfileobj(output, target)

    def sizes(self, files):
        """Not known before the command has run."""

    def sha256(self, file, size):
        """Of a file of that size, in hexadecimal."""
        with self._output(file) as output:
            return hashlib.file_digest(output, "sha256").hexdigest()

    def spans(self, file, spans):
        """Yield the bytes of each (offset, size), which rise, from one run of the command; fewer where it ends."""
        with self._output(file) as output:
            at = 0
            for offset, size in spans:
                output.read(offset - at)
                yield output.read(size)
                at = offset + size

    @contextlib.contextmanager
    def _output(self, file):
        with subprocess.Popen(self._line(file), shell=True, stdout=subprocess.PIPE) as process:
            try:
                yield process.stdout
                while process.stdout.read(PIECE):  # to its end, so that it can end well
                    pass
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise UserError(
                f"{self.path(file)}: exit status {process.returncode}; run this command by hand to see what it lacks"
            )
