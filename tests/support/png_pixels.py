"""The pixels of a picture that a browser took: PNG of 8 bits per channel, as Chromium writes it."""

import struct
import zlib
from collections import Counter
from pathlib import Path

_CHANNELS = {2: 3, 6: 4}  # by colour type


def colours(picture: Path) -> Counter[tuple[int, int, int]]:
    """How many pixels there are of each colour (red, green, blue)."""
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n", picture
    packed, offset = b"", 8
    width = channels = 0
    while offset < len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        body = data[offset + 8 : offset + 8 + length]
        if kind == b"IHDR":
            width, _, depth, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", body)
            assert (depth, interlaced) == (8, 0), (depth, interlaced)
            channels = _CHANNELS[colour_type]
        elif kind == b"IDAT":
            packed += body
        offset += length + 12
    found: Counter[tuple[int, int, int]] = Counter()
    row = bytearray(width * channels)
    stream = memoryview(zlib.decompress(packed))
    for start in range(0, len(stream), width * channels + 1):
        row = _unfiltered(stream[start], bytes(stream[start + 1 : start + 1 + width * channels]), row, channels)
        found.update(zip(row[0::channels], row[1::channels], row[2::channels], strict=True))
    return found


def _unfiltered(kind: int, line: bytes, above: bytearray, step: int) -> bytearray:
    """A row of pixels from its differences to the pixel before and the row above."""
    row = bytearray(line)
    for at in range(len(row)):
        left = row[at - step] if at >= step else 0
        up = above[at]
        corner = above[at - step] if at >= step else 0
        if kind == 1:
            row[at] = (row[at] + left) & 255
        elif kind == 2:
            row[at] = (row[at] + up) & 255
        elif kind == 3:
            row[at] = (row[at] + (left + up) // 2) & 255
        elif kind == 4:
            row[at] = (row[at] + _paeth(left, up, corner)) & 255
    return row


def _paeth(left: int, up: int, corner: int) -> int:
    guess = left + up - corner
    return min((left, up, corner), key=lambda value: abs(guess - value))
