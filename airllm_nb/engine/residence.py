"""The plan in force and the executor that obeys it: planned again for more room, and for less where others take it."""

from __future__ import annotations

import gc
import logging
import threading
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from ..config import format_bytes
from ..decode.prefill import Work
from ..errors import BudgetError, GenerationStopped
from ..intake import planning
from ..model.device import VRAM_MARGIN, Budgets
from ..model.executor import Executor, Stage
from ..model.placing import drop_unpacked
from ..model.turn import Turn
from ..plan.residency import Machine, ResidencyPlan
from ..tensors import libc
from ..trace import Trace

log = logging.getLogger(__name__)
T = TypeVar("T")
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
        self._admitted = prepared.planned
        self.executor: Executor | None = None
        self.trace, self.shrunk_from = Trace(), None  # type: Trace, int | None
        self.plan: ResidencyPlan = planning.plan(prepared, machine, budgets, prepared.planned)[0]
        self._wished = self.plan.needs
        self._surviving(prepared.planned, lambda: self.make_room(prepared.planned))

    def run(self, work: Work, call: Callable[[int], T], cancel: threading.Event, repeatable: bool) -> T:
        """``call`` with room for ``work``, recorded; once more, under a smaller budget, if device memory runs out.

        Parameters
        ----------
        call
            Takes how many tokens of the prompt go through the model at a time.
        cancel
            Ends it before the next unit.
        repeatable
            Whether ``call`` can be made again after it has failed half-way.

        Raises
        ------
        BudgetError
            If there is no room, or device memory ran out and it cannot be repeated, or ran out again.
        """
        began = False

        def attempt() -> T:
            nonlocal began
            tokens = self.make_room(work)
            executor, self.trace, began, self._admitted = self.executor, Trace(), True, work
            assert executor is not None, "there is room"
            executor.start(self.trace, cancel)
            try:
                with executor.on_device():
                    answer = call(tokens)
            except GenerationStopped:
                executor.sources.check()  # what there is so far is kept
                raise
            finally:
                executor.finish()
            executor.sources.check()
            return answer

        return self._surviving(work, attempt, lambda: repeatable or not began)

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
        """Plan and build again where ``work`` does not fit; how many tokens of the prompt go through at a time."""
        tokens = self._fitting(work)
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
        if self.executor is not None:
            self.executor.close(hooks)
            self.executor = None
        self._prepared.scratch.close()
        drop_unpacked(self._prepared.skeleton)
        libc.trim_heap()

    def _fitting(self, work: Work) -> int | None:
        """Tokens at a time with which ``work`` fits the plan in force.

        What the plan was made for fits in chunks: to plan again costs more than the sweeps that it would save.
        """
        if not self._machine.has_device:
            planning.check_ram(self._prepared, work)
            return work.sizes[0]
        tokens = planning.tokens_at_once(self._prepared, work, self.plan.needs.total)
        if tokens in (None, work.sizes[0]):
            return tokens
        return tokens if planning.needs(self._prepared, work, tokens).kv_cache <= self.plan.needs.kv_cache else None

    def _build(self) -> None:
        self._refuse_to_lose()
        self.close()
        prepared = self._prepared
        stage = Stage(prepared.device, prepared.units, prepared.small, self.plan)
        options = prepared.options
        self.executor = Executor(prepared.skeleton, stage, options.depth, self._turn, profile=options.profiling_mode)

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

    def _surviving(self, work: Work, attempt: Callable[[], T], repeatable: Callable[[], bool] = lambda: True) -> T:
        """``attempt``; once more under a smaller budget where device memory runs out."""
        for again in (False, True):
            try:
                return attempt()
            except Exception as error:
                if not (self._machine.has_device and _is_out_of_memory(error)):
                    raise
                _drop_frames(error)
            # Out of the except clause: until then the failed frames hold their tensors.
            if self._keeps_a_graph():
                _let_go(self._prepared.device)
                raise BudgetError("device memory ran out in a forward that keeps its activations for gradients, which "
                                  "vram_budget does not count; give it less at a time, or compute under "
                                  "torch.no_grad()")  # fmt: skip
            if again:
                break
            self._shrink(work)
            if not repeatable():
                raise BudgetError(
                    "device memory ran out half-way, and what was given (a cache, processors, criteria) is changed by "
                    f"now; {_REMEDY}; then generate again with new ones"
                )
        budget = format_bytes(self.budgets.vram)
        raise BudgetError(f"device memory ran out again under vram_budget={budget}; {_REMEDY}")

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
            vram = min(vram, available(prepared.device))
        self.budgets = before._replace(vram=vram)
        try:
            self.plan = self._planned(work)
        except BudgetError as error:
            self.budgets = before
            raise BudgetError(
                f"device memory ran out, and there is no room in what is left; {_REMEDY} ({error})"
            ) from None
        self._wished, self.shrunk_from = self.plan.needs, self.shrunk_from or before.vram
        log.warning("device memory ran out: vram_budget is %s instead of %s from now on",
                    format_bytes(vram), format_bytes(before.vram))  # fmt: skip

    def _planned(self, work: Work) -> ResidencyPlan:
        try:
            return planning.plan(self._prepared, self._machine, self.budgets, self._prepared.planned)[0]
        except BudgetError:
            return planning.plan(self._prepared, self._machine, self.budgets, work)[0]


def available(device: torch.device) -> int:
    """Bytes that this process can still take on a GPU, less a margin; what its allocator holds unused is counted."""
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((free + unused) * (1 - VRAM_MARGIN))


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


def _drop_frames(error: BaseException | None) -> None:
    """Let go of the tensors in the frames that an exception holds, and those before it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
