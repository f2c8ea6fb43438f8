"""Entries of SDF files: where they lie, their text, and RDKit's molecule of each.

A file is plain, packed (.gz), or an archive (.tar, .tar.gz, .tgz) whose .sdf members are read one after another.
"""

import contextlib
import gzip
import re
import tarfile
import zlib

from mspt.data.schema import RejectedRecord
from mspt.errors import UserError

BLOCK = 1 << 23
# No entry is as long; a file that has none by then is of another kind, and is not gathered in memory.
LONGEST = 1 << 26
END = b"\n$$$$"


def stem(path):
    """The name of a file without what says that it is an SDF or packed."""
    return re.sub(r"(\.(sdf|sd|gz|tar|tgz))+$", "", path.name, flags=re.IGNORECASE)


def chunks(path, size):
    """Yield (number of the first entry, place) of chunks of size entries: no more than a chunk and BLOCK in memory.

    The place is (offset, length) in a plain file and the bytes of a packed one. Raises UserError where the file cannot
    be unpacked or its entries do not end.
    """
    packed, first, offset = path.name.lower().endswith((".gz", ".tar", ".tgz")), 0, 0
    try:
        for view in _scan(_blocks(path), size):
            yield first, bytes(view) if packed else (offset, len(view))
            first, offset = first + size, offset + len(view)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{path}: cannot be read to its end ({error}); fetch or unpack it again") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; is it an SDF?") from error


def texts(path, chunk):
    """Yield (number, text) of the entries of a chunk."""
    first, data = chunk
    if not isinstance(data, bytes):
        offset, length = data
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
    for number, view in enumerate(_scan([data], 1), first):
        yield number, str(view, "utf-8", "replace")


def molecule(text, key):
    """RDKit's molecule of an entry, with its explicit hydrogens and SD properties.

    Where RDKit cannot sanitise it, it keeps the bonds as they are written. Raises RejectedRecord where RDKit cannot
    read it at all.
    """
    from rdkit import Chem, rdBase

    supplier = Chem.SDMolSupplier()
    with rdBase.BlockLogs():
        for sanitize in (True, False):
            supplier.SetData(text, sanitize=sanitize, removeHs=False)
            with contextlib.suppress(IndexError):  # it finds no entry at all
                if (found := supplier[0]) is not None:
                    found.UpdatePropertyCache(strict=False)
                    return found
    raise RejectedRecord(key, "entry", "RDKit cannot read it")


def _scan(blocks, size):
    """Views of size entries each (the last may have fewer) of the bytes that blocks give, end to end."""
    buffer, chunk, entry, search, count = b"", 0, 0, 0, 0
    for block in blocks:
        buffer, entry, search, chunk = buffer[chunk:] + block, entry - chunk, search - chunk, 0
        view = memoryview(buffer)
        while (at := buffer.find(END, search)) >= 0 and (line := buffer.find(b"\n", at + len(END))) >= 0:
            entry = search = line + 1
            count += 1
            if count == size:
                yield view[chunk:entry]
                chunk, count = entry, 0
        search = at if at >= 0 else max(entry, len(buffer) - len(END) + 1)
        if len(buffer) - entry > LONGEST:
            raise ValueError(f"an entry is longer than {LONGEST >> 20} MiB")
    if buffer[chunk:].strip():
        yield memoryview(buffer)[chunk:]


def _blocks(path):
    name = path.name.lower()
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        yield from _members(path)
    else:
        with gzip.open(path) if name.endswith(".gz") else path.open("rb") as file:
            yield from iter(lambda: file.read(BLOCK), b"")


def _members(path):
    found = False
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            if not (member.isfile() and member.name.lower().endswith(".sdf")):
                continue
            found = True
            yield from _ended(archive.extractfile(member))
    if not found:
        raise UserError(f"{path}: has no .sdf in it; give an SDF or an archive of one")


def _ended(file):
    """Yield the bytes of a member so that the next one begins a new entry.

    Its last entry is ended where it is not; blank lines after the last are left out, they would be the next one's.
    """
    last, space = b"", b""
    for block in iter(lambda: file.read(BLOCK), b""):
        block = space + block
        text = block.rstrip()
        last, space = (last + text[-len(END) :])[-len(END) :], block[len(text) :]
        yield text
    if last == END:
        yield b"\n"
    elif last:
        yield space + END + b"\n"
