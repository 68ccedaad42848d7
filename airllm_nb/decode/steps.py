"""The decode steps of one model: as ever, or replayed where that gives the same.

The first two steps of a generation run as ever. Then the cache is lent to a fixed one (:mod:`~airllm_nb.decode.fixed`),
the native forward is recorded with it (:mod:`~airllm_nb.decode.graph`) at the position of the first, and replayed at
that of the second: if it gives the same logits, steps are replayed from then on, in this generation and the next ones,
until one outgrows the fixed cache, which then is made twice as large, or the model is no longer what was recorded
(:mod:`~airllm_nb.decode.made_of`). What cannot be recorded, or gives something else, runs as ever: only the log
says so.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from ..errors import GenerationStopped
from .graph import Forward, Graph, Ran, Step, read_step
from .made_of import has_foreign_hooks, is_watched
from .recording import Record, recorder

log = logging.getLogger(__name__)
# Recorded only where so many tokens may follow: recording takes as long as some steps.
FEWEST = 8
# Rows of the smallest fixed cache.
SMALLEST = 256
# Bytes that a record takes beside its cache, before that is known: a workspace of the matrix library, small tensors.
POOL = 96 << 20


class Steps:
    """Runs them.

    Parameters
    ----------
    model, record
        Whose steps, and what records them.
    """

    def __init__(self, model: Any, record: Record):
        self._model, self._record = model, record
        self._graph: Graph | None = None
        self._before: Step | None = None
        self._room, self._length, self._is_same, self._failed = 0, 0, False, set[Any]()

    @classmethod
    def on(cls, device: torch.device, model: Any) -> Steps | None:
        """Those of ``model`` on ``device``, where steps are recorded."""
        record = recorder(device)
        return None if record is None else cls(model, record)

    @contextlib.contextmanager
    def within(self, room: int, length: int) -> Iterator[None]:
        """A run, of sequences up to ``length`` tokens; a record may take ``room`` bytes.

        At its end, whoever has its cache has an ordinary one.
        """
        self._room, self._length, self._before, self._is_same = room, length, None, False
        if self._graph is not None and self._graph.nbytes > room:
            self.close()
        try:
            yield
        finally:
            self._before = None
            if self._graph is not None:
                self._graph.cache.close()

    def close(self) -> None:
        """Drop the record and its memory; safe to call twice."""
        self._before = None
        self._drop()

    def run(
        self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], as_ever: Callable[[], Any],
        replaying: Callable[[], AbstractContextManager[Any]],
    ) -> Any:  # fmt: skip
        """One forward of the model: replayed, within ``replaying()``, or ``as_ever()``."""
        step = read_step(args, kwargs)
        if step is None:
            self._before = None
            return as_ever()
        if self._graph is not None and not self._is_same:  # not before: generate switches experts for its steps
            self._is_same = self._graph.made_of.still_all()
            if not self._is_same:
                self.close()
        if self._graph is not None and self._graph.serves(step):
            with replaying():
                output = self._graph.step(step)
            if output is not None:
                return output
            log.debug("the model is no longer what was recorded")
            self.close()
        is_worth_it = step.key not in self._failed and self._length - step.length >= FEWEST and self._room >= POOL
        if not is_worth_it or not _fixed().fits(step.cache):
            self._before = None
            return as_ever()
        return self._look(step, as_ever, forward)

    def _look(self, step: Step, as_ever: Callable[[], Any], forward: Forward) -> Any:
        """A step as ever; record, if it is the second of two."""
        before, self._before = self._before, None
        # A copy: what a caller gave may change.
        kept = replace(step, tensors={name: each.clone() for name, each in step.tensors.items()})
        if before is None or not step.follows(before):
            self._before = kept
            return as_ever()
        edge, output = _fixed().edge(step.cache), as_ever()
        if (logits := getattr(output, "logits", None)) is None:
            return output
        try:
            self._drop()
            ran = Ran(kept, logits.detach().clone(), edge)
            self._graph, self._is_same = self._recorded(before, ran, output, forward), True
        except GenerationStopped:
            raise
        except Exception as error:  # whatever a forward runs into that was not made for this
            log.debug("steps are not recorded: %s: %s", type(error).__name__, error)
            self._failed.add(step.key)
        return output

    def _recorded(self, first: Step, ran: Ran, output: Any, forward: Forward) -> Graph | None:
        fixed, cache, length = _fixed(), ran.step.cache, ran.step.length + 1
        beside = [name for name, value in output.items() if value is not None]
        if beside != ["logits", "past_key_values"] or output["past_key_values"] is not cache or not fixed.fits(cache):
            raise ValueError(f"it gives {beside}, or the cache is of another kind")
        if self._model.training or has_foreign_hooks(self._model) or is_watched():
            return None  # not now
        # States are kept twice until the check is over.
        each, beside_rows = fixed.bytes_a_token(cache), 3 * fixed.bytes_of_states(cache) + POOL
        sizes = (max(SMALLEST, 1 << length.bit_length()), -(-self._length // 8) * 8)
        capacity = next((size for size in sizes if size > length and size * each + beside_rows <= self._room), None)
        if capacity is None:
            log.debug("no room for a record")
            return None
        lent = fixed.FixedCache(cache, capacity)
        try:
            graph = Graph(self._model, forward, lent, first, ran, type(output), self._record)
            if graph.nbytes > self._room:
                raise MemoryError(f"{graph.nbytes:,} bytes, and {self._room:,} are free")
        except BaseException:
            lent.close()
            raise
        return graph

    def _drop(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.cache.close()


def _fixed() -> Any:
    """Late: it imports transformers."""
    from . import fixed

    return fixed
