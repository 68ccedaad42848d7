"""Run as a script, in a process of its own: may a GPU copy from a file's pages, and from locked memory? One JSON line.

    python trial_child.py FILE DEVICE_INDEX

Speaks to the CUDA driver only and imports nothing of ours or of torch, so that it takes a second. A driver may refuse,
copy wrong bytes, crash or hang; whoever started this process waits for a while and believes only a good answer.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time
from pathlib import Path

READ_ONLY = 8
PAGE = 4096
MOST_BYTES = 64 << 20
# Free notebooks and WSL2 lock a gigabyte or less; the RAM tier is worth locking from there on.
LOCKED_BYTES = 1 << 30


class Refused(Exception):
    """A call to the driver failed; the text is its name and code."""


class Driver:
    """The few calls of the CUDA driver that are needed."""

    def __init__(self, index: int):
        self._library = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), index)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: object) -> None:
        """Call the driver; raises :class:`Refused`."""
        code = getattr(self._library, name)(*arguments)
        if code:
            raise Refused(f"{name} {code}")

    def register(self, address: int, nbytes: int, flags: int) -> None:
        self.call("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(nbytes), flags)

    def round_trip(self, address: int, nbytes: int) -> tuple[bytes, float]:
        """Copy to the device and back; the bytes, and bytes a second of the way there."""
        there, back = ctypes.c_uint64(), ctypes.create_string_buffer(nbytes)
        self.call("cuMemAlloc_v2", ctypes.byref(there), ctypes.c_size_t(nbytes))
        for _ in range(2):
            start = time.perf_counter()
            self.call("cuMemcpyHtoD_v2", there, ctypes.c_void_p(address), ctypes.c_size_t(nbytes))
            seconds = time.perf_counter() - start
        self.call("cuMemcpyDtoH_v2", back, there, ctypes.c_size_t(nbytes))
        self.call("cuMemFree_v2", there)
        return back.raw, nbytes / seconds


def try_file(driver: Driver, path: str) -> float:
    """Bytes a second from the page cache of ``path`` to the device."""
    with Path(path).open("rb") as file:
        size = min(os.fstat(file.fileno()).st_size // PAGE * PAGE, MOST_BYTES)
        expected = file.read(size)
        address = _map(size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno())
    driver.register(address, size, READ_ONLY)
    copied, rate = driver.round_trip(address, size)
    if copied != expected:
        raise Refused("the copy has other bytes than the file")
    return rate


def try_locked(driver: Driver) -> int:
    """How many bytes of ordinary memory could be locked, up to :data:`LOCKED_BYTES`."""
    locked = 0
    while locked < LOCKED_BYTES:
        address = _map(MOST_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        try:
            driver.register(address, MOST_BYTES, 0)
        except Refused:
            break
        locked += MOST_BYTES
    return locked


def _map(nbytes: int, protection: int, flags: int, descriptor: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    address = libc.mmap(None, nbytes, protection, flags, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        raise Refused(f"mmap {os.strerror(ctypes.get_errno())}")
    return int(address)


def main() -> None:
    """Try, and say what came of it."""
    path, index = sys.argv[1], int(sys.argv[2])
    answer: dict[str, object] = {}
    try:
        driver = Driver(index)
        try:
            answer["page_cache"] = try_file(driver, path)
        except Refused as refused:
            answer["refused"] = str(refused)
        # Only asked for where the better way is closed: it takes time and memory.
        if "page_cache" not in answer:
            answer["locked"] = try_locked(driver)
    except (Refused, OSError) as error:
        answer["failed"] = str(error)
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
