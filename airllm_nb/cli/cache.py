"""cache: the stores that conversions left, and removing them."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from ..config import format_bytes
from ..engine.kept import CachedStore, Kept, choose, is_only_copy, kept_stores, remove_store, source_is_here
from ..errors import AirLLMError, OptionError
from ..flags import in_flags
from .commands import write, write_json


def cache(given: argparse.Namespace) -> int:
    """List or remove."""
    return _remove(given) if given.removes else _list(given)


def _list(given: argparse.Namespace) -> int:
    kept = kept_stores(given.shards)
    if given.json:
        write_json({"folder": str(kept.folder), "stores": [_facts(store) for store in kept.stores],
                    "bytes": kept.nbytes, "free_bytes": kept.free})  # fmt: skip
        return 0
    if kept.stores:
        rows = [("NAME", "HOLDS", "DTYPE", "SIZE", "LAST USED", "STATE", "FROM"), *map(_row, kept.stores)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            cells = [cell.rjust(width) if column == 3 else cell.ljust(width)
                     for column, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
            write("  ".join(cells).rstrip() + "\n")
    free = "" if kept.free is None else f", {format_bytes(kept.free)} free there"
    write(f"{_counted(kept.stores)} in {kept.folder}{free}\n")
    return 0


def _remove(given: argparse.Namespace) -> int:
    ways = bool(given.names) + given.unfinished + given.all
    if ways != 1:
        what = "give only one of" if ways else "say what to remove:"
        raise OptionError(f"{what} NAME …, --unfinished or --all; airllm-nb cache lists what is there")
    kept = kept_stores(given.shards)
    chosen = choose(kept, given.names, unfinished=given.unfinished, everything=given.all)
    if chosen and not given.yes and not _agreed(chosen):
        sys.stderr.write("nothing was removed\n")
        return 1
    return _removed(given, kept, chosen, _spared(given, chosen))


def _spared(given: argparse.Namespace, chosen: list[CachedStore]) -> dict[str, str]:
    """Why stores stay that nobody named and nobody was asked about."""
    if not (given.all and given.yes):
        return {}
    return {store.name: f"{store.name} is the only copy of {store.made_from} on this machine; name it to remove it"
            for store in chosen if is_only_copy(store)}  # fmt: skip


def _agreed(chosen: list[CachedStore]) -> bool:
    """What somebody at a terminal answers."""
    if not sys.stdin.isatty():
        raise OptionError(f"this would remove {_counted(chosen)}, and nobody is there to be asked; add --yes")
    for store in chosen:
        only = f"  the only copy of {store.made_from} on this machine" if is_only_copy(store) else ""
        sys.stderr.write(f"{store.folder}  {format_bytes(store.nbytes)}  {_state(store)}{only}\n")
    sys.stderr.write(f"remove {_counted(chosen)}? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _removed(given: argparse.Namespace, kept: Kept, chosen: list[CachedStore], spared: dict[str, str]) -> int:
    removed: dict[str, int] = {}
    refused = dict(spared)
    # What somebody agreed to earlier, and a kill or a full stop cut short.
    half_removed = [store for store in kept.stores if store.state == "half removed" and store not in chosen]
    try:
        for store in [*chosen, *half_removed]:
            if store.name in spared:
                continue
            try:
                removed[store.name] = remove_store(store.folder)
            except AirLLMError as error:
                if store in chosen:
                    refused[store.name] = in_flags(str(error))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; airllm-nb cache remove --unfinished removes the rest") from None
    for reason in refused.values():
        sys.stderr.write(f"airllm-nb: {reason}\n")
    if given.json:
        write_json({"folder": str(kept.folder), "removed": removed, "bytes": sum(removed.values()),
                    "refused": refused})  # fmt: skip
    else:
        for name, nbytes in removed.items():
            write(f"removed {name}  {format_bytes(nbytes)}\n")
        if not removed and not refused:
            write("there is nothing to remove\n")
    return 1 if refused else 0


def _facts(store: CachedStore) -> dict[str, Any]:
    return {"name": store.name, "folder": str(store.folder), "model": store.model, "codec": store.codec,
            "holds": store.what, "dtype": store.dtype, "bytes": store.nbytes, "state": store.state,
            "in_use": _in_use(store), "last_used": _when(store.used, "%Y-%m-%dT%H:%M:%S"),
            "origin": store.made_from or None, "origin_is_here": source_is_here(store),
            "only_copy": is_only_copy(store)}  # fmt: skip


def _row(store: CachedStore) -> tuple[str, ...]:
    only = " (not here any more: the only copy)" if is_only_copy(store) else ""
    origin = only or {True: "", False: " (not here any more)", None: ""}[source_is_here(store)]
    return (store.name, store.what or "-", store.dtype or "-", format_bytes(store.nbytes),
            _when(store.used, "%Y-%m-%d %H:%M"), _state(store), f"{store.made_from or '-'}{origin}")  # fmt: skip


def _state(store: CachedStore) -> str:
    return f"{store.state}, in use" if store.is_open else store.state


def _in_use(store: CachedStore) -> bool:
    return store.is_open or store.state == "converting"


def _when(seconds: float, form: str) -> str:
    return time.strftime(form, time.localtime(seconds))


def _counted(stores: Any) -> str:
    count, nbytes = len(stores), sum(store.nbytes for store in stores)
    return f"{count} store{'s' * (count != 1)} ({format_bytes(nbytes)})" if count else "no stores"
