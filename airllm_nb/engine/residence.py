"""The plan in force and the executor that obeys it: planned again for more room, and for less where others take it."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from ..config import format_bytes
from ..decode.steps import Steps
from ..errors import BudgetError, GenerationStopped
from ..intake import planning
from ..model.device import Budgets, available_vram
from ..model.executor import Executor
from ..model.hooks import Turn
from ..model.placing import drop_unpacked
from ..model.stage import Stage
from ..plan.residency import Machine, ResidencyPlan
from ..plan.work import Work
from ..tensors import libc
from ..trace import Trace

log = logging.getLogger(__name__)
_REMEDY = "close the other programs that use the GPU, or load with a smaller vram_budget or max_seq_len"


class Residence:
    """Where one model lives.

    Parameters
    ----------
    prepared
        The model.
    machine
        What its plans are made from.
    budgets
        What it may take; that of VRAM shrinks where other programs take the memory.
    turn
        Whose turn it is to run it.

    Attributes
    ----------
    plan, executor
        What is in force; no executor where building one has failed, the next run builds it again.
    steps
        Replays decode steps, where it can.
    trace
        What the last run did.
    shrunk_from
        The first VRAM budget, where the one in force is smaller by need.

    Raises
    ------
    BudgetError
        If the model does not fit.
    """

    def __init__(self, prepared: planning.Prepared, machine: Machine, budgets: Budgets, turn: Turn):
        self._prepared, self._machine, self.budgets, self._turn = prepared, machine, budgets, turn
        self._admitted, self._began = prepared.planned, False
        self.executor: Executor | None = None
        self.steps: Steps | None = None
        self.trace, self.shrunk_from = Trace(), None  # type: Trace, int | None
        self.plan: ResidencyPlan = planning.plan(prepared, machine, budgets, prepared.planned)[0]
        self._wished = self.plan.needs
        for attempt in self.attempts(prepared.planned):
            with attempt:
                self.make_room(prepared.planned)

    def attempts(self, work: Work, repeatable: bool = True) -> Iterator[Attempt]:
        """Attempts at ``work``, each to be entered: once more, under a smaller budget, where device memory runs out.

        Whoever succeeds leaves the loop. A session that began in an attempt is repeated only if it is ``repeatable``.

        Raises
        ------
        BudgetError
            If device memory ran out and it cannot be repeated, or ran out again.
        """
        for is_last in (False, True):
            attempt, self._began = Attempt(self._machine.has_device), False
            yield attempt
            if not attempt.ran_out:
                return
            if self._keeps_a_graph():
                _let_go(self._prepared.device)
                raise BudgetError("device memory ran out in a forward that keeps its activations for gradients, which "
                                  "vram_budget does not count; give it less at a time, or compute under "
                                  "torch.no_grad()")  # fmt: skip
            if is_last:
                break
            self._shrink(work)
            if self._began and not repeatable:
                raise BudgetError(
                    "device memory ran out half-way, and what was given (a cache, processors, criteria) is changed by "
                    f"now; {_REMEDY}; then generate again with new ones"
                )
        raise BudgetError(f"device memory ran out again under vram_budget={format_bytes(self.budgets.vram)}; {_REMEDY}")

    @contextlib.contextmanager
    def session(self, work: Work, cancel: threading.Event) -> Iterator[tuple[Executor, int]]:
        """Room for ``work``, recorded; ``cancel`` ends it before the next unit.

        Gives the executor, and how many tokens of the prompt go through the model at a time.

        Raises
        ------
        BudgetError
            If there is no room.
        """
        tokens = self.make_room(work)
        executor, self.trace, self._began, self._admitted = self.executor, Trace(), True, work
        assert executor is not None, "there is room"
        executor.start(self.trace, cancel)
        try:
            with executor.on_device(), self._replaying(work, tokens):
                yield executor, tokens
        except GenerationStopped:
            executor.sources.check()  # what there is so far is kept
            raise
        finally:
            executor.finish()
        executor.sources.check()

    def _replaying(self, work: Work, tokens: int) -> contextlib.AbstractContextManager[None]:
        """Steps may be replayed within, in what the budget has left beside weights and what ``work`` needs."""
        if self.steps is None:
            return contextlib.nullcontext()
        taken = self.plan.device_bytes - self.plan.needs.total + planning.needs(self._prepared, work, tokens).total
        return self.steps.within(self.budgets.vram - taken, work.length)

    def admit(self, work: Work, has_cache: bool) -> None:
        """Refuse a forward within a run that needs more room than the run has.

        ``has_cache`` says that it needs none of its own.

        Raises
        ------
        BudgetError
        """
        run = self._admitted
        if not self._machine.has_device:
            return
        # Some classes give the whole sequence again, at each step or once; a device that has no room for that says so.
        if work.batch <= run.batch and work.prompt <= run.length and not work.loss:
            return
        held, wanted = (planning.needs(self._prepared, each, each.prompt) for each in (run, work))
        total = wanted.total + (0 if has_cache else held.kv_cache)
        if total > self.plan.needs.total:
            planned = format_bytes(self.plan.needs.total)
            raise BudgetError(f"a forward of {work.batch} x {work.prompt} tokens within a generation needs "
                              f"{format_bytes(total)} beside streamed weights, and {planned} are planned; load with a "
                              "larger max_seq_len, or give it use_cache=False and logits_to_keep=1")  # fmt: skip

    def make_room(self, work: Work) -> int:
        """Plan and build again where ``work`` does not fit; how many tokens of the prompt go through at a time.

        What the plan in force was made for fits in chunks: to plan again costs more than the sweeps that it would save.
        """
        tokens: int | None = work.sizes[0]
        if self._machine.has_device:
            tokens = planning.tokens_at_once(self._prepared, work, self.plan.needs.total)
            if tokens not in (None, work.sizes[0]):
                cache = planning.needs(self._prepared, work, tokens).kv_cache
                tokens = tokens if cache <= self.plan.needs.kv_cache else None
        else:
            planning.check_ram(self._prepared, work)
        if tokens is None:
            log.info("planning again for %d tokens x %d sequences", work.length, work.batch)
            before = self.plan
            self.plan, tokens = planning.plan(self._prepared, self._machine, self.budgets, work, self._wished)
            if self.executor is not None and self.plan.tiers == before.tiers and not self.plan.streamed_bytes:
                self.executor.plan = self.plan  # all stays where it is
                return tokens
            try:
                self._build()
            except BaseException:  # whatever a device runs into, or Ctrl-C: the next run starts as before
                self.plan = before
                raise
        elif self.executor is None:
            self._build()
        return tokens

    def close(self, hooks: bool = True) -> None:
        """Free the executor's memory, threads and files, and remove its ``hooks``. Safe to call twice."""
        if self.steps is not None:
            self.steps.close()
            self.steps = None
        if self.executor is not None:
            self.executor.close(hooks)
            self.executor = None
        self._prepared.scratch.close()
        drop_unpacked(self._prepared.skeleton)
        libc.trim_heap()

    def _build(self) -> None:
        self._refuse_to_lose()
        self.close()
        prepared = self._prepared
        options = prepared.options
        stage = Stage(prepared.device, prepared.units, prepared.small, self.plan, options.exact)
        self.executor = Executor(prepared.skeleton, stage, options.depth, self._turn, profile=options.profiling_mode)
        if self.executor.can_be_recorded and not (options.exact or options.profiling_mode):
            self.steps = Steps.on(prepared.device, prepared.skeleton)

    def _refuse_to_lose(self) -> None:
        """A new plan reads all weights anew, and may let them stream."""
        if self.executor is None:
            return
        lost = ""
        if name := self.executor.changed:
            lost = f"what was changed in {name}"
        elif self.executor.holds_all and (self._prepared.skeleton.training or self._has_gradients()):
            lost = "the weights that are being trained"
        if lost:
            raise BudgetError(f"there is no room for this, and a new plan would lose {lost}; load "
                              "with a larger max_seq_len, batch_size or vram_budget before you change or train it, or "
                              "save_pretrained and load that")  # fmt: skip

    def _has_gradients(self) -> bool:
        return any(each.grad is not None for each in self._prepared.skeleton.parameters())

    def _keeps_a_graph(self) -> bool:
        """Whether a forward keeps activations for gradients now, which no budget counts."""
        holds_all = self.executor is not None and self.executor.holds_all
        return (
            holds_all and torch.is_grad_enabled()
            and any(each.requires_grad for each in self._prepared.skeleton.parameters())
        )  # fmt: skip

    # --- when others take the memory

    def _shrink(self, work: Work) -> None:
        """Free everything, and plan for what is there, an eighth less than before at least."""
        prepared, before = self._prepared, self.budgets
        _let_go(prepared.device)  # to look at weights takes some memory
        try:
            self._refuse_to_lose()
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            raise BudgetError(f"device memory ran out, and there is none to see what was changed; {_REMEDY}") from None
        self.close()
        _let_go(prepared.device)
        vram = before.vram - before.vram // 8
        if prepared.device.type == "cuda":
            vram = min(vram, available_vram(prepared.device))
        self.budgets = before._replace(vram=vram)
        try:
            try:
                self.plan = planning.plan(prepared, self._machine, self.budgets, prepared.planned)[0]
            except BudgetError:  # then for this alone
                self.plan = planning.plan(prepared, self._machine, self.budgets, work)[0]
        except BudgetError as error:
            self.budgets = before
            raise BudgetError(
                f"device memory ran out, and there is no room in what is left; {_REMEDY} ({error})"
            ) from None
        self._wished, self.shrunk_from = self.plan.needs, self.shrunk_from or before.vram
        log.warning("device memory ran out: vram_budget is %s instead of %s from now on",
                    format_bytes(vram), format_bytes(before.vram))  # fmt: skip


class Attempt:
    """Entered, it ends an error that says that device memory ran out; ``ran_out`` says so afterwards."""

    def __init__(self, has_device: bool):
        self._has_device, self.ran_out = has_device, False

    def __enter__(self) -> None:
        """Nothing is needed."""

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> bool:
        self.ran_out = self._has_device and isinstance(error, Exception) and _is_out_of_memory(error)
        while self.ran_out and error is not None:  # let go of the tensors in failed frames, and those before them
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        return self.ran_out


def _let_go(device: torch.device) -> None:
    """Of memory that nothing uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    """Also where a library's own allocation fails, which torch reports as any error of the device."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("CUDA error: out of memory", "ALLOC_FAILED")
    )
