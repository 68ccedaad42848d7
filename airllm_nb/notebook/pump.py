"""Widget events reach a busy kernel: :func:`pump_widget_events`, for a cell that waits on its main thread.

A kernel handles one shell message at a time, so a click on a button waits until the running cell ends. Subshells help
in JupyterLab with ipykernel 7.0 to 7.3 alone. A cell whose work is done by another thread waits like this instead::

    while not done.wait(0.1):
        pump_widget_events()

It takes the messages that already wait for the main shell, handles those of widgets, and gives every other one (queued
cells, completions) to the kernel, in order, as the kernel's own loop would have done. There is no public way to do so:
tests/notebook/test_pump.py says for which kernels this one is known to work.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

_COMM = ("comm_open", "comm_msg", "comm_close")
_broken = False


def pump_widget_events(limit: int = 50) -> int:
    """Handle the widget events that wait; from a running cell only, elsewhere it does nothing.

    Nothing but an interrupt comes out of it. At the first surprise it switches itself off: widgets then wait until the
    cell ends, as they would without it.

    Parameters
    ----------
    limit
        Messages to take at most, so that a flood of them does not keep the cell from its own work.

    Returns
    -------
    int
        How many events were handled.
    """
    global _broken
    if _broken:
        return 0
    try:
        from IPython import get_ipython

        kernel = getattr(get_ipython(), "kernel", None)
        if kernel is None or not _in_loop_of(kernel):
            return 0
        return _Pump(kernel).run(limit)
    except Exception:
        _broken = True
        log.debug("widget events cannot be handled while a cell runs in this kernel", exc_info=True)
        return 0


def _in_loop_of(kernel: Any) -> bool:
    """Other threads may not use its sockets; what is given back becomes a task of its loop."""
    try:
        return asyncio.get_running_loop() is kernel.io_loop.asyncio_loop
    except RuntimeError:
        return False


class _Pump:
    """All that another kernel may lack is looked up here, before a message is taken: later it would be lost."""

    def __init__(self, kernel: Any):
        import zmq

        self._kernel, self._session, self._publish = kernel, kernel.session, kernel._publish_status
        self._comm_handlers = {name: kernel.shell_handlers[name] for name in _COMM}
        self._parent, self._ident = kernel.get_parent("shell"), kernel._parent_ident["shell"]
        stream = kernel.shell_stream
        if thread := getattr(kernel, "shell_channel_thread", None):
            # ipykernel 7: that thread reads the channel and passes on to this one through a pair of sockets.
            stream = thread.manager.get_shell_channel_to_subshell_pair(None).to_stream
        self._stream, self._receive = stream, stream.socket.recv_multipart
        self._dispatch, self._callback = stream._run_callback, stream._recv_callback
        if not callable(self._callback):
            raise LookupError("nothing receives the messages of this kernel's shell")
        self._later = kernel.io_loop.add_callback
        self._flags, self._nothing = zmq.NOBLOCK, zmq.Again

    def run(self, limit: int) -> int:
        """Take, handle or give back; an interrupt waits until no message is in our hands."""
        handled, drained = 0, False
        with _DeferredInterrupt() as interrupt:
            try:
                for _ in range(limit):
                    if interrupt.pending:
                        break
                    try:
                        frames = self._receive(self._flags, copy=False)
                    except self._nothing:
                        drained = True
                        break
                    handled += self._take(frames, interrupt)
            finally:
                if not drained:
                    # A socket announces its messages once: those that stay would wait for the next one to come.
                    self._later(self._stream.flush)
        return handled

    def _take(self, frames: list[Any], interrupt: _DeferredInterrupt) -> bool:
        handler = message = None
        try:
            idents, parts = self._session.feed_identities(frames, copy=False)
            # Only the header yet: the session refuses a message that it has deserialized before.
            handler = self._comm_handlers.get(self._session.unpack(parts[1].bytes)["msg_type"])
            if handler is not None:
                message = self._session.deserialize(parts, content=True, copy=False)
        except Exception:
            pass  # malformed or forged: the kernel says so
        if handler is None or message is None:
            # What the stream would have done with it.
            self._dispatch(self._callback, frames)
            return False
        # The parent stays the running cell, so that what a handler prints is seen below that cell.
        self._publish("busy", "shell", parent=message)
        try:
            with interrupt.allowed():
                handler(self._kernel.shell_stream, idents, message)
        except Exception:
            self._kernel.log.error("Exception in the handler of a widget's message:", exc_info=True)
        finally:
            if self._kernel.get_parent("shell") is not self._parent:
                self._kernel.set_parent(self._ident, self._parent)
            # The browser waits for this before it sends the next state.
            self._publish("idle", "shell", parent=message)
        return True


class _DeferredInterrupt:
    """Inside, an interrupt is noted and raised at the end, except where it is allowed."""

    def __enter__(self) -> _DeferredInterrupt:
        self.pending = self._allowed = False
        self._handler = signal.getsignal(signal.SIGINT)
        if callable(self._handler):
            signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        if callable(self._handler):
            signal.signal(signal.SIGINT, self._handler)
            if self.pending:
                self._handler(signal.SIGINT, None)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """In here one is raised at once; a second one is noted, so that the first can clean up."""
        self._allowed = True
        try:
            yield
        finally:
            self._allowed = False

    def _interrupted(self, number: int, frame: Any) -> None:
        if self._allowed and callable(self._handler):
            self._allowed = False
            self._handler(number, frame)
        else:
            self.pending = True
