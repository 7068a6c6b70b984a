"""What a compressed message may become: no more than a message that was not compressed.

kombu unpacks a message as it arrives, whatever comes out of it; a thousandth of the size, or a millionth, would do to
fill a worker's memory, and the next one's that takes the lane. Here unpacking ends at the limit, and the message
goes to quarantine as it came.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from kombu import compression

from creditlane.contract import MAX_MESSAGE_BYTES

LZMA_BYTES = 32 << 20
"""Memory that unpacking of this kind may take: a message says how much it wants. Enough for usual presets."""

KNOWN: dict[str, tuple[Callable[[bytes], bytes], Callable[[], Any], list[str]]] = {
    "application/x-gzip": (zlib.compress, zlib.decompressobj, ["gzip", "zlib"]),
    "application/x-bz2": (bz2.compress, bz2.BZ2Decompressor, ["bzip2", "bzip"]),
    "application/x-lzma": (lzma.compress, lambda: lzma.LZMADecompressor(memlimit=LZMA_BYTES), ["lzma", "xz"]),
}
"""The compressions that are read; others that kombu knows are refused."""

REFUSED = ("application/x-brotli", "application/zstd")


def bounded(start: Callable[[], Any]) -> Callable[[bytes], bytes]:
    """Unpack up to the limit.

    :param start: makes what unpacks.
    """

    def unpack(data: bytes) -> bytes:
        unpacker = start()
        found: bytes = unpacker.decompress(data, MAX_MESSAGE_BYTES + 1)
        if len(found) > MAX_MESSAGE_BYTES:
            raise ValueError(f"unpacked, the body has more than {MAX_MESSAGE_BYTES} bytes; split it")
        if not unpacker.eof:
            raise ValueError("the compressed body is cut off")
        return found

    return unpack


def refuse(data: bytes) -> bytes:
    """Unpack nothing."""
    raise ValueError(f"only {', '.join(KNOWN)} are unpacked")


def install() -> None:
    """Have this process's kombu unpack that way."""
    for content_type, (pack, start, aliases) in KNOWN.items():
        compression.register(pack, bounded(start), content_type, aliases)
    for content_type in REFUSED:
        compression.register(refuse, refuse, content_type)
