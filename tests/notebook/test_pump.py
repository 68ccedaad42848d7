"""Widget events reach a cell that pumps, in real kernels of every stack, and nothing else is lost or comes early."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from jupyter_client.session import Session
from kernel_stacks import STACKS, Kernel, running

from airllm_nb.notebook import pump

PRELUDE = """
import signal, sys, threading, time
import ipywidgets
from airllm_nb.notebook import pump
from airllm_nb.notebook.pump import pump_widget_events

kernel, order = get_ipython().kernel, []

def pump_until(condition, seconds=120):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "what the cell waits for did not come"
        time.sleep(0.02)
        pump_widget_events()

def button(handler):
    made = ipywidgets.Button(description="Stop")
    made.on_click(handler)
    print(made.model_id, flush=True)
    return made

def interrupt_while_a_message_is_held():
    session, normal = kernel.session, type(kernel.session).feed_identities

    def feed_identities(*arguments, **options):
        if threading.current_thread() is threading.main_thread():
            del session.feed_identities
            signal.raise_signal(signal.SIGINT)
        return normal(session, *arguments, **options)

    session.feed_identities = feed_identities
"""
WAIT_FOR_A_CLICK = "clicks = []; it = button(lambda _: clicks.append(1)); pump_until(lambda: clicks)"


@pytest.fixture(scope="module", params=STACKS)
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """One kernel a stack, for all tests."""
    with running(request.param) as made:
        made.run(PRELUDE)
        yield made


@pytest.fixture(autouse=True)
def stays_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did, the pump is still on in the kernel, which still answers."""
    yield
    if "kernel" in request.fixturenames:
        assert request.getfixturevalue("kernel").run("print(pump._broken, order, end=''); order.clear()") == "False []"


def shown_id(kernel: Kernel, cell: str) -> str:
    """The widget that a cell has made and printed the id of."""
    kernel.wait_for_text(cell, "\n")
    return kernel.text(cell).split()[0]


def test_the_stack_is_the_one_that_is_meant(kernel: Kernel, request: pytest.FixtureRequest) -> None:
    stack = STACKS[request.node.callspec.params["kernel"]]
    found = kernel.run(
        "import IPython, ipykernel; print(ipykernel.__version__, ipywidgets.__version__, IPython.__version__)"
    )
    for wanted, version in zip(stack, found.split(), strict=True):
        assert not wanted or version == wanted


def test_a_click_ends_the_running_cell(kernel: Kernel) -> None:
    cell = kernel.execute(
        "clicks = []\n"
        "it = button(lambda _: (clicks.append(1), print('clicked')))\n"
        "print('before', end=' ')\n"
        "pump_until(lambda: clicks)\n"
        "print('after')"
    )
    click = kernel.click(shown_id(kernel, cell))
    assert kernel.reply(cell)["content"]["status"] == "ok"
    assert kernel.text(cell).split()[1:] == ["before", "clicked", "after"], "all is printed below the running cell"
    assert kernel.states(click) == ["busy", "idle"], "the browser waits for it before it sends more"
    order = [(m["parent_header"]["msg_id"], m["content"].get("execution_state")) for m in kernel.messages]
    assert order.index((click, "idle")) < order.index((cell, "idle")), "it came while the cell ran"


def test_a_moved_slider_arrives(kernel: Kernel) -> None:
    cell = kernel.execute(
        "slider, seen = ipywidgets.IntSlider(), []\n"
        "slider.observe(lambda change: seen.append(change.new), 'value')\n"
        "print(slider.model_id, flush=True)\n"
        "pump_until(lambda: slider.value == 9)\n"
        "print(seen)"
    )
    slider = shown_id(kernel, cell)
    moves = [kernel.update(slider, value=value) for value in (3, 7, 9)]
    assert kernel.reply(cell)["content"]["status"] == "ok"
    assert kernel.text(cell).endswith("[3, 7, 9]\n")
    for move in moves:
        kernel.idle(move)


def test_what_is_queued_runs_afterwards_in_order_and_once(kernel: Kernel) -> None:
    kernel.run("started = []")
    cell = kernel.execute(WAIT_FOR_A_CLICK + "; print('order', order)")
    widget = shown_id(kernel, cell)
    queued = [kernel.execute("order.append(0); some_name = 1")]
    completion = kernel.kc.complete("some_na")
    queued += [kernel.execute(f"order.append({n})") for n in (1, 2)]
    time.sleep(0.1)  # they are taken and given back before the click
    click = kernel.click(widget)
    queued += [kernel.execute("order.append(3)"), kernel.execute("print(order, end=''); order.clear()")]
    assert kernel.reply(cell)["content"]["status"] == "ok"
    assert kernel.text(cell).endswith("order []\n"), "none ran inside the cell"
    assert kernel.reply(completion)["content"]["matches"] == ["some_name"]
    counts = [kernel.reply(request)["content"]["execution_count"] for request in queued]
    assert counts == sorted(counts)
    assert kernel.text(queued[-1]) == "[0, 1, 2, 3]"
    assert kernel.states(click) == ["busy", "idle"]
    answered = [reply["parent_header"]["msg_id"] for reply in kernel.replies]
    asked = [cell, queued[0], completion, *queued[1:]]
    assert [request for request in answered if request in asked] == asked


def test_an_error_still_aborts_the_queue(kernel: Kernel) -> None:
    cell = kernel.execute(WAIT_FOR_A_CLICK + "; 1 / 0")
    widget = shown_id(kernel, cell)
    queued = [kernel.execute("order.append(1)"), kernel.execute("order.append(2)")]
    time.sleep(0.1)
    kernel.click(widget)
    assert kernel.reply(cell)["content"]["ename"] == "ZeroDivisionError"
    assert [kernel.reply(request)["content"]["status"] for request in queued] == ["aborted"] * 2
    kernel.run("1 + 1")


def test_what_stays_behind_is_handled_after_the_cell(kernel: Kernel) -> None:
    """A socket that is read halfway announces nothing: neither the rest of the clicks nor a cell may be forgotten."""
    cell = kernel.execute(
        "clicks = []\nit = button(lambda _: clicks.append(1))\ntime.sleep(0.3)\nprint(pump_widget_events(limit=3) <= 3)"
    )
    widget = shown_id(kernel, cell)
    clicks = [kernel.click(widget) for _ in range(10)]
    last = kernel.execute("print(len(clicks))")
    assert kernel.reply(cell)["content"]["status"] == "ok"
    assert kernel.text(cell).endswith("\nTrue\n")
    for click in clicks:
        kernel.idle(click)
    kernel.reply(last)
    assert kernel.text(last) == "10\n"


def test_a_handler_that_fails_leaves_the_cell_alone(kernel: Kernel) -> None:
    cell = kernel.execute(
        "clicks = []\n"
        "def handler(_):\n"
        "    clicks.append(1)\n"
        "    if len(clicks) < 3: raise OSError('a bad handler')\n"
        "it = button(handler)\n"
        "normal = kernel.shell_handlers['comm_msg']\n"
        "def fails_once(*message):\n"
        "    kernel.shell_handlers['comm_msg'] = normal\n"
        "    raise OSError('a bad kernel')\n"
        "kernel.shell_handlers['comm_msg'] = fails_once\n"
        "pump_until(lambda: len(clicks) == 3)\n"
        "print('goes on')"
    )
    widget = shown_id(kernel, cell)
    clicks = []
    for _ in range(4):
        clicks.append(kernel.click(widget))
        kernel.idle(clicks[-1])
    assert kernel.reply(cell)["content"]["status"] == "ok"
    assert kernel.text(cell).endswith("goes on\n")


def test_a_handler_that_takes_the_parent_does_not_keep_it(kernel: Kernel) -> None:
    other = '{"header": {"msg_id": "other", "msg_type": "comm_msg"}}'
    cell = kernel.execute(
        "clicks = []\n"
        f"it = button(lambda _: (clicks.append(1), kernel.set_parent([b'other'], {other})))\n"
        "pump_until(lambda: clicks)\n"
        "print('mine', flush=True)"
    )
    kernel.click(shown_id(kernel, cell))
    kernel.reply(cell)
    assert kernel.text(cell).endswith("mine\n")


def test_an_interrupt_is_the_cells_and_loses_no_message(kernel: Kernel) -> None:
    cell = kernel.execute(
        WAIT_FOR_A_CLICK + "\ninterrupt_while_a_message_is_held(); print('ready', flush=True)\n"
        "try:\n    pump_until(lambda: len(clicks) == 3)\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "interrupt_while_a_message_is_held()\n"
        "try:\n    pump_until(lambda: len(clicks) == 3)\n"
        "except KeyboardInterrupt:\n    print('again')\n"
        "pump_until(lambda: len(clicks) == 3)\n"
    )
    widget = shown_id(kernel, cell)
    kernel.click(widget)
    kernel.wait_for_text(cell, "ready")
    queued = kernel.execute("print('queued')")
    kernel.wait_for_text(cell, "interrupted")
    kernel.click(widget)
    kernel.wait_for_text(cell, "again")
    kernel.click(widget)
    assert kernel.reply(cell)["content"]["status"] == "ok"
    kernel.reply(queued)
    assert kernel.text(queued) == "queued\n", "the message that was held when the interrupt came"


def test_an_interrupt_ends_a_handler_that_does_not(kernel: Kernel) -> None:
    cell = kernel.execute(
        "it = button(lambda _: (print('sleeps', flush=True), time.sleep(60)))\npump_until(lambda: False)"
    )
    click = kernel.click(shown_id(kernel, cell))
    kernel.wait_for_text(cell, "sleeps")
    kernel.interrupt()
    assert kernel.reply(cell)["content"]["ename"] == "KeyboardInterrupt"
    assert kernel.states(click) == ["busy", "idle"]


def test_the_interrupt_button_while_it_pumps(kernel: Kernel) -> None:
    cell = kernel.execute("print('pumps', flush=True)\nwhile True: pump_widget_events()")
    kernel.wait_for_text(cell, "pumps")
    kernel.interrupt()
    assert kernel.reply(cell)["content"]["ename"] == "KeyboardInterrupt"


def test_a_forged_message_is_the_kernels_to_refuse(kernel: Kernel) -> None:
    cell = kernel.execute(WAIT_FOR_A_CLICK)
    widget = shown_id(kernel, cell)
    forger = Session(key=b"another", username="someone")
    data = {"method": "custom", "content": {"event": "click"}}
    forger.send(kernel.kc.shell_channel.socket, "comm_msg", {"comm_id": widget, "data": data})
    time.sleep(0.1)
    kernel.click(widget)
    assert kernel.reply(cell)["content"]["status"] == "ok"
    assert kernel.run("print(len(clicks))") == "1\n"


def test_it_is_off_at_the_first_surprise_and_says_nothing(kernel: Kernel) -> None:
    cell = kernel.execute(
        "it = button(lambda _: order.append('click'))\n"
        "normal = kernel.shell_handlers.pop('comm_open')\n"
        "pump_until(lambda: pump._broken)\n"
        "print(pump_widget_events(), pump._broken)\n"
        "kernel.shell_handlers['comm_open'] = normal\n"
        "print(pump_widget_events(), order)"
    )
    kernel.click(shown_id(kernel, cell))
    queued = kernel.execute("print(order); order.clear(); pump._broken = False")
    kernel.reply(cell)
    assert kernel.text(cell).split("\n", 1)[1] == "0 True\n0 []\n"
    kernel.reply(queued)
    assert kernel.text(queued) == "['click']\n", "handled after the cell, as without a pump"


def test_another_thread_takes_nothing(kernel: Kernel) -> None:
    cell = kernel.execute(
        "it = button(lambda _: order.append('click')); time.sleep(0.3)\n"
        "def ask(): answers.append(pump_widget_events())\n"
        "answers = []; worker = threading.Thread(target=ask); worker.start(); worker.join()\n"
        "print(answers, len(order)); pump_until(lambda: order); order.clear()"
    )
    kernel.click(shown_id(kernel, cell))
    kernel.reply(cell)
    assert kernel.text(cell).split("\n", 1)[1] == "[0] 0\n"


def test_without_a_kernel_there_is_nothing_to_pump() -> None:
    assert pump.pump_widget_events() == 0
    answers: list[int] = []
    worker = threading.Thread(target=lambda: answers.append(pump.pump_widget_events()))
    worker.start()
    worker.join()
    assert answers == [0] and not pump._broken
