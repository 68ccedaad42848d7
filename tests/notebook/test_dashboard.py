"""The dashboard in real kernels: what is shown while a cell runs, the Stop button, and what stays in the notebook."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kernel_stacks import Kernel, running

from airllm_nb.notebook.dashboard import Throttle
from airllm_nb.notebook.markdown import safe_markdown

VIEW = "application/vnd.jupyter.widget-view+json"
MOST_BYTES = 300_000
LONG = "%%airllm_generate -n 100000 -o answer\nhello"


@pytest.fixture(scope="module")
def endless(tiny_llama: Callable[..., Path]) -> Path:
    """A model that never ends by itself."""
    return tiny_llama(eos_token_id=None, max_position_embeddings=120_000)


@pytest.fixture(scope="module", params=["colab", "kaggle", "newest"])
def kernel(request: pytest.FixtureRequest, endless: Path) -> Iterator[Kernel]:
    """A model in the kernels of Colab, of Kaggle, and in the newest; test_pump.py knows those between."""
    with running(request.param) as started:
        load(started, endless)
        yield started


@pytest.fixture(scope="module")
def newest(endless: Path) -> Iterator[Kernel]:
    with running("newest") as started:
        load(started, endless)
        yield started


def load(kernel: Kernel, model: Path) -> None:
    kernel.run("%load_ext airllm_nb")
    kernel.run(f'%airllm_load "{model}" -o model')


def shown(kernel: Kernel, request: str) -> list[dict[str, Any]]:
    """The displays of a cell as a notebook file would hold them: updates in place, cleared ones left out."""
    outputs: list[dict[str, Any]] = []
    places: dict[str, dict[str, Any]] = {}
    for message in kernel.messages:
        content, kind = message["content"], message["msg_type"]
        if kind not in ("display_data", "update_display_data") or message["parent_header"].get("msg_id") != request:
            continue
        place = content.get("transient", {}).get("display_id")
        if kind == "update_display_data":
            places[place]["data"], places[place]["metadata"] = content["data"], content["metadata"]
            continue
        outputs.append({"data": content["data"], "metadata": content["metadata"]})
        if place:
            places[place] = outputs[-1]
    return outputs


def models(kernel: Kernel) -> dict[str, dict[str, Any]]:
    """The state of all widgets that were opened, by id."""
    states: dict[str, dict[str, Any]] = {}
    for message in kernel.messages:
        content = message["content"]
        if message["msg_type"] == "comm_open":
            states[content["comm_id"]] = dict(content["data"]["state"])
        elif message["msg_type"] == "comm_msg" and content["data"].get("method") == "update":
            states.setdefault(content["comm_id"], {}).update(content["data"]["state"])
        elif message["msg_type"] == "comm_close":
            states.pop(content["comm_id"], None)
    return states


def wait_for(kernel: Kernel, found: Callable[[], Any]) -> Any:
    return kernel._wait(found)


def button(kernel: Kernel) -> str | None:
    return next((key for key, state in models(kernel).items() if state.get("description") == "Stop"), None)


def started(kernel: Kernel, code: str = LONG) -> tuple[str, str]:
    """A generation whose text is coming; returns its request and its Stop button."""
    request = kernel.execute(code)
    wait_for(kernel, lambda: any("airllm-text" in output["data"].get("text/html", "")
                                 for output in shown(kernel, request)))  # fmt: skip
    return request, wait_for(kernel, lambda: button(kernel))


def check_static(kernel: Kernel, request: str, alone: bool = True) -> None:
    """A line, the answer, one picture, the numbers; nothing that needs a kernel. ``alone``: no other cell runs yet."""
    line, answer, picture, card = shown(kernel, request)
    assert answer["data"]["text/markdown"] == safe_markdown(answer["data"]["text/plain"]) != ""
    assert base64.b64decode(picture["data"]["image/png"]).startswith(b"\x89PNG") and picture["data"]["text/plain"]
    assert "tok/s" in line["data"]["text/plain"]
    assert "compute" in card["data"]["text/plain"] and "<table" in card["data"]["text/html"]
    assert picture["data"]["text/plain"] in html.unescape(card["data"]["text/html"]), "for screen readers"
    assert not [output for output in (line, answer, picture, card) if VIEW in output["data"]]
    assert len(json.dumps([line, answer, picture, card])) < MOST_BYTES
    assert not alone or models(kernel) == {}, "widgets that nobody shows any more"
    assert not [m for m in kernel.output(request) if m["msg_type"] == "stream" and m["content"]["name"] == "stderr"]


def test_stop_ends_the_running_cell_and_keeps_the_text(kernel: Kernel) -> None:
    request, stop = started(kernel)
    kernel.click(stop)
    assert kernel.reply(request)["content"]["status"] == "ok"
    check_static(kernel, request)
    assert kernel.run("print(answer.stopped_by, len(answer.token_ids) > 0)") == "user True\n"
    request = kernel.execute("%%airllm_generate -n 5\nagain")
    assert kernel.reply(request)["content"]["status"] == "ok"
    check_static(kernel, request)


def test_the_interrupt_button_does_the_same(kernel: Kernel) -> None:
    request, _ = started(kernel)
    kernel.interrupt()
    assert kernel.reply(request)["content"]["status"] == "ok"
    check_static(kernel, request)
    assert kernel.run("print(answer.stopped_by, model.busy)") == "user False\n"


def test_two_clicks_are_as_good_as_one(newest: Kernel) -> None:
    request, stop = started(newest)
    newest.click(stop)
    newest.click(stop)
    assert newest.reply(request)["content"]["status"] == "ok"
    check_static(newest, request)
    assert newest.run("print(1 + 1)") == "2\n"


def test_text_and_pictures_are_live(newest: Kernel) -> None:
    request, stop = started(newest)

    def pictures() -> set[str]:
        values = [str(state.get("value", "")) for state in models(newest).values()]
        return {value for value in values if "<img" in value}

    first = wait_for(newest, pictures)
    assert all('alt="' in value and "data:image/png;base64," in value for value in first)
    wait_for(newest, lambda: pictures() - first)
    values = " ".join(str(s.get("value")) for s in models(newest).values())
    assert "<progress" in values and "tok/s" in values and "token " in values and "of 100000" in values
    root = next(s for s in models(newest).values() if "airllm-dashboard" in (s.get("_dom_classes") or ()))
    assert root["_model_name"] == "VBoxModel"
    newest.click(stop)
    newest.reply(request)
    texts = [m["content"]["data"]["text/plain"] for m in newest.output(request)
             if m["msg_type"] == "update_display_data" and "airllm-text" in str(m["content"]["data"])]  # fmt: skip
    assert len(texts) >= 2 and texts[-1].startswith(texts[0]) and len(texts[-1]) > len(texts[0])


def test_a_new_generation_does_not_begin_with_the_numbers_of_the_last(newest: Kernel) -> None:
    newest.run("""
from airllm_nb.notebook.dashboard import Dashboard
generation = model.stream("hello", max_new_tokens=5)
view = Dashboard(model, generation)
view.begin(); view._refresh()
print(view._progress.value, view._header.value, view._trace.sweeps)
view.end(None); generation.close()
""")
    said = newest.run("print(view._trace.sweeps, view._generation.limit)")
    assert said == "0 5\n"


def test_the_limit_is_what_the_context_has_room_for(newest: Kernel) -> None:
    assert newest.run("print(model.stream('hello', max_new_tokens=10**9).limit < 200_000)") == "True\n"


def test_a_failing_picture_costs_no_answer(newest: Kernel) -> None:
    newest.run("from airllm_nb.notebook import pictures\nkept = pictures.Still.of\n"
               "def broken(*_): raise ValueError('no picture')\npictures.Still.of = broken")  # fmt: skip
    request = newest.execute("%%airllm_generate -n 5 -o answer5\nhello")
    assert newest.reply(request)["content"]["status"] == "ok"
    assert newest.run("pictures.Still.of = kept; print(len(answer5.token_ids))") == "5\n"
    assert models(newest) == {}


def test_a_failing_generation_leaves_no_widget_and_one_error(newest: Kernel) -> None:
    newest.run("_forward = model.native.forward\ndef broken(*a, **k): raise ValueError('broken on purpose')\n"
               "model.native.forward = broken")  # fmt: skip
    request = newest.execute("%%airllm_generate -n 5\nhello")
    assert newest.reply(request)["content"]["evalue"] == "broken on purpose"
    assert not [output for output in shown(newest, request) if VIEW in output["data"]]
    assert models(newest) == {}
    newest.run("model.native.forward = _forward")
    request = newest.execute("%%airllm_generate -n 5\nhello")
    assert newest.reply(request)["content"]["status"] == "ok"


def test_queued_generations_run_one_after_the_other(newest: Kernel) -> None:
    requests = [newest.execute(f"%%airllm_generate -n 6 -o answer{number}\nhello") for number in range(3)]
    for request in requests:
        assert newest.reply(request)["content"]["status"] == "ok"
        check_static(newest, request, alone=False)
    assert models(newest) == {}
    assert newest.run("print(answer0.text == answer1.text == answer2.text)") == "True\n"


def test_an_extension_that_is_loaded_again_while_a_stop_is_pending(newest: Kernel, endless: Path) -> None:
    request, stop = started(newest)
    again = newest.execute("%reload_ext airllm_nb")
    newest.click(stop)
    newest.reply(request)
    assert newest.reply(again)["content"]["status"] == "ok"
    request = newest.execute("%%airllm_generate -n 5\nhello")
    newest.reply(request)
    assert "no model is loaded" in newest.text(request)
    newest.run(f'%airllm_load "{endless}" -o model')


@pytest.mark.slow
def test_nothing_grows_over_two_hundred_generations(newest: Kernel) -> None:
    newest.run("""
import ctypes, gc, ipywidgets
from pathlib import Path
def live():
    registry = ipywidgets.widgets.widget._instances
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free but kept is no leak
    return len(registry), int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
def generate(times):
    for _ in range(times):
        get_ipython().run_cell_magic("airllm_generate", "-n 1", "hello")
generate(60); seen = [live()]  # by then the allocator has taken what drawing needs
""")
    for _ in range(5):
        newest.run("generate(28); seen.append(live())")
        newest.messages.clear()
    found = newest.run("import itertools, matplotlib.pyplot as plt\n"
                       "print(seen[-1][0] - seen[0][0], min(b - a for (_, a), (_, b) in itertools.pairwise(seen)),"
                       " len(plt.get_fignums()))")  # fmt: skip
    widgets, megabytes, figures = (float(word) for word in found.split())
    assert (widgets, figures) == (0, 0)
    assert megabytes < 5, "what leaks grows with every 28 generations"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_drawing_takes_its_share_of_the_time_at_most() -> None:
    clock, drawn = Clock(), []

    def draw() -> None:
        clock.now += 0.3
        drawn.append(clock.now)

    throttle = Throttle(1.0, share=0.02, clock=clock, cost=clock)
    while clock.now < 300:
        throttle.run(draw)
        clock.now += 0.1
    assert 0.3 * len(drawn) <= 0.02 * clock.now + 0.3
    assert len(drawn) >= 300 * 0.02 / 0.3 - 2


def test_quick_drawing_is_bound_by_the_front_end() -> None:
    clock, drawn = Clock(), []
    throttle = Throttle(1.0, share=0.02, clock=clock, cost=clock)
    while clock.now < 10:
        throttle.run(lambda: drawn.append(clock.now))
        clock.now += 0.05
    assert 9 <= len(drawn) <= 11
