"""Members of a zip of millions, in bounded memory: zipfile keeps an object for each, gigabytes in all."""

import os
import struct
import zlib
from dataclasses import dataclass

# The records of the format (PKWARE APPNOTE, 4.3), each with its signature first.
END, END_MARK = struct.Struct("<4s4H2LH"), b"PK\x05\x06"
END_64_PLACE, END_64_PLACE_MARK = struct.Struct("<4sLQL"), b"PK\x06\x07"
END_64, END_64_MARK = struct.Struct("<4sQ2H2L4Q"), b"PK\x06\x06"
MEMBER, MEMBER_MARK = struct.Struct("<4s6H3L5H2L"), b"PK\x01\x02"
LOCAL, LOCAL_MARK = struct.Struct("<4s5H3L2H"), b"PK\x03\x04"
LONGEST_COMMENT = 65535
# A number that does not fit is this, and stands in the member's extra field.
ELSEWHERE = 0xFFFFFFFF
STORED, DEFLATED = 0, 8


@dataclass(frozen=True)
class Member:
    """offset of its local header, size of its data as they are packed, crc: CRC-32 of what they unpack to."""

    name: str
    offset: int
    size: int
    packing: int
    crc: int


def members(file):
    """Yield every Member of an open zip in the order of its directory. Raises ValueError where it is none."""
    count, start = _directory(file)
    file.seek(start)
    for _ in range(count):
        fields = _record(file, MEMBER, MEMBER_MARK)
        packing, crc, size, length, offset = fields[4], fields[7], fields[8], fields[9], fields[16]
        name, extra, _ = (file.read(n) for n in fields[10:13])
        if ELSEWHERE in (size, length, offset):
            wide = _wide(extra)
            length, size, offset = (next(wide) if x == ELSEWHERE else x for x in (length, size, offset))
        yield Member(name.decode("utf-8", "replace"), offset, size, packing, crc)


def read(file, member):
    """The bytes of a Member. Raises ValueError where they cannot be unpacked or are not those that were packed."""
    file.seek(member.offset)
    fields = _record(file, LOCAL, LOCAL_MARK)
    file.seek(fields[9] + fields[10], os.SEEK_CUR)
    data = _unpacked(member, file.read(member.size))
    if zlib.crc32(data) != member.crc:
        raise ValueError(f"{member.name}: its bytes do not have the CRC-32 that the zip says")
    return data


def _unpacked(member, data):
    if member.packing == STORED:
        return data
    if member.packing != DEFLATED:
        raise ValueError(f"{member.name} is packed by method {member.packing}; only deflate is read")
    try:
        return zlib.decompress(data, -zlib.MAX_WBITS)
    except zlib.error as error:
        raise ValueError(f"{member.name}: {error}") from error


def _directory(file):
    """Number of members, offset of the directory."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - END.size - LONGEST_COMMENT))
    tail = file.read()
    at = _end(tail)
    end = file.tell() - len(tail) + at
    fields = END.unpack_from(tail, at)
    count, start = fields[4], fields[6]
    place = end - END_64_PLACE.size
    if place >= 0 and tail[at - END_64_PLACE.size : at][:4] == END_64_PLACE_MARK:
        file.seek(place)
        file.seek(_record(file, END_64_PLACE, END_64_PLACE_MARK)[2])
        fields = _record(file, END_64, END_64_MARK)
        count, start = fields[7], fields[9]
    return count, start


def _end(tail):
    """Where the last record begins: the mark from which on a comment as long as it says reaches to the end of the file.

    A comment may hold the mark too.
    """
    at = tail.rfind(END_MARK)
    while at >= 0:
        if at + END.size <= len(tail) and at + END.size + END.unpack_from(tail, at)[-1] == len(tail):
            return at
        at = tail.rfind(END_MARK, 0, at + len(END_MARK) - 1)
    raise ValueError("the end of a zip is missing")


def _record(file, layout, mark):
    data = file.read(layout.size)
    if len(data) < layout.size or data[:4] != mark:
        raise ValueError(f"damaged at byte {file.tell()}")
    return layout.unpack(data)


def _wide(extra):
    """The 64-bit numbers of an extra field."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            return iter(struct.unpack_from(f"<{length // 8}Q", extra, 4))
        extra = extra[4 + length :]
    raise ValueError("a member without its 64-bit sizes")
