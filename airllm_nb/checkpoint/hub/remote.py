"""A file on the Hub, read as if it were here: what is asked for is fetched, a block at a time."""

from __future__ import annotations

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from .ranges import Ranges

BLOCK = 256 << 10
AT_ONCE = 8
MOST = 20_000


class RemoteFile(io.RawIOBase):
    """Good for the few reads that headers take; every block that was fetched is kept.

    Attributes
    ----------
    failure
        The error of the last request, if it failed: a library that reads may say something else.
    """

    def __init__(self, ranges: Ranges):
        self._ranges, self._at = ranges, 0
        self._blocks: dict[int, bytes] = {}
        self.failure: Exception | None = None
        self._fetch(0, BLOCK)
        self.size = ranges.size
        if self.size > BLOCK:
            self._fetch(max(BLOCK, self.size - BLOCK), min(BLOCK, self.size - BLOCK))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence])
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self.size - self._at))
        data = self._bytes(self._at, count)
        buffer[:count] = data
        self._at += count
        return count

    def fetch(self, offsets: Iterable[int], count: int) -> None:
        """Have ``count`` bytes at each of ``offsets``, fetched several at a time.

        Raises
        ------
        ValueError
            If they are more than any header has.
        """
        missing = [offset for offset in offsets if self._found(offset, count) is None]
        if len(missing) > MOST:
            raise ValueError(f"{len(missing):,} parts of a header")
        with ThreadPoolExecutor(AT_ONCE, "ranges") as pool:
            list(pool.map(lambda offset: self._fetch(offset, count), missing))

    def _bytes(self, first: int, count: int) -> bytes:
        if not count:
            return b""
        found = self._found(first, count)
        if found is None:
            self._fetch(first, max(count, min(BLOCK, self.size - first)))
            found = self._found(first, count)
        assert found is not None
        return found

    def _found(self, first: int, count: int) -> bytes | None:
        for start, block in self._blocks.items():
            if start <= first and first + count <= start + len(block):
                return block[first - start : first - start + count]
        return None

    def _fetch(self, first: int, count: int) -> None:
        try:
            self._blocks[first] = self._ranges.read(first, count)
        except Exception as error:
            self.failure = error
            raise
