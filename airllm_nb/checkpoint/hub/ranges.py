"""Ranges of the bytes of a file on the Hub, so that its header can be read without its weights."""

from __future__ import annotations

import logging
import time
from typing import Any

from .errors import unreachable

log = logging.getLogger(__name__)

# Seconds before another attempt.
WAITS = (0.5, 2.0)


class NoRanges(Exception):
    """The server sends something else than the bytes that were asked for."""


class Ranges:
    """One file on the Hub; ``size`` is known after the first read."""

    def __init__(self, repo_id: str, commit: str, token: str | None, name: str):
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        self.size, self._name = 0, name
        self._url = hf_hub_url(repo_id, name, revision=commit)
        # Packed, a range of the file would be a range of something else.
        self._headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}

    def read(self, first: int, count: int) -> bytes:
        """Exactly these bytes; of a server that knows no ranges nothing is read beyond its head."""
        for wait in WAITS:
            try:
                return self._read(first, count)
            except unreachable() as error:
                status = getattr(getattr(error, "response", None), "status_code", 500)
                if status < 500 and status != 429:
                    raise
                log.debug("%s once more: %s", self._name, error)
            time.sleep(wait)
        return self._read(first, count)

    def _read(self, first: int, count: int) -> bytes:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session, hf_raise_for_status

        data, timeout = bytearray(), constants.HF_HUB_DOWNLOAD_TIMEOUT
        asked = self._headers | {"Range": f"bytes={first}-{first + count - 1}"}
        with get_session().stream("GET", self._url, headers=asked, timeout=timeout) as response:
            hf_raise_for_status(response)
            self.size = _size(response, first)
            for block in response.iter_bytes():
                data += block
                if len(data) > count:
                    break
        if len(data) != min(count, self.size - first):
            raise NoRanges("the server does not send the ranges that it is asked for")
        return bytes(data)


def _size(response: Any, first: int) -> int:
    """The size of the whole file, from the head of a partial answer."""
    served, _, size = str(response.headers.get("Content-Range", "")).partition("/")
    if response.status_code != 206 or not served.startswith(f"bytes {first}-") or not size.isdecimal():
        raise NoRanges("the server sends whole files only")
    return int(size)
