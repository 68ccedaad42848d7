"""A chat template is a program that came with the model: it renders as transformers has it, and comes to an end."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from airllm_nb.decode import template
from airllm_nb.decode.prompt import encode
from airllm_nb.decode.template import render
from airllm_nb.decode.tokenizer import load_tokenizer
from airllm_nb.errors import FileError, PromptError

USER = {"role": "user", "content": "Hi"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "several": [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Ah."}, USER],
    "other alphabets": [{"role": "user", "content": "Grüße, 世界 🌍\x00\n{{ 7 * 7 }}"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    "tools": [USER, {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1.5, "y": [True, None]}}}]}],
}  # fmt: skip
BENIGN = {
    "plain": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}",
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}",
    "json": "{% for m in messages %}{{ m | tojson(indent=2) }}{% endfor %}",
    "loops": "{% for m in messages %}{% if loop.last %}{{ loop.index }}{% break %}{% endif %}{% endfor %}",
    "a namespace and a macro": "{% set ns = namespace(n=0) %}{% macro f(d) %}{{ d }}{% if d %}{{ f(d - 1) }}{% endif %}"
    "{% endmacro %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ f(5) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
    "the year": "{{ strftime_now('%Y') }}{{ messages | length }}",
    "blanks": "{% for m in messages %}\n    {{ m.role }}   \n{% endfor %}\nend",
}  # fmt: skip
# What never ends, or ends with gigabytes, each by another way.
HOSTILE = {
    "a loop in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
                       "{% endfor %}{% endfor %}",
    "a product": "{{ 'a' * 10000000000 }}",
    "a power": "{{ (10 ** (10 ** 9)) % 7 }}",
    "doubling": "{% set ns = namespace(x='abcdefgh') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
                "{{ ns.x }}",
    "a width": "{{ '%*d' % (2000000000, 1) }}{{ 'x'.center(2000000000) }}",
    "a format": "{{ '{:>2000000000}'.format('x') }}",
    "a replacement": "{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}{% for i in range(30) %}"
                     "{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}{{ ns.x }}",
    "lists in lists": "{% set ns = namespace(x=[0], y=[0]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
                      "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "json of lists in lists": "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
                              "{% endfor %}{{ ns.x | tojson }}",
    "a macro without end": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "much text": "{% for a in range(90000) %}{{ 'x' * 9000 }}{% endfor %}",
    "a deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}  # fmt: skip
BROKEN = {
    "syntax": ("{% for m in messages %}{{ m.content }", ["does not work", "TemplateSyntaxError"]),
    "an undefined name": ("{{ nope.deeper }}", ["does not work", "nope"]),
    "no such filter": ("{{ messages | nope }}", ["does not work", "nope"]),
    "a wrong type": ("{{ messages + 1 }}", ["does not work", "TypeError"]),
    "a refusal": ("{{ raise_exception('System role not supported') }}", ["System role not supported", "--chat"]),
    "nothing": ("{# nothing #} \n", ["makes nothing"]),
    "what the sandbox forbids": ("{{ ''.__class__.__mro__ }}", ["does not work", "SecurityError"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Callable[..., Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama())


@pytest.fixture
def with_template(tokenizer: Any) -> Callable[[Any], Any]:
    def make(text: Any) -> Any:
        made = copy.copy(tokenizer)
        made.chat_template = text
        return made

    return make


@pytest.mark.parametrize("chat", CHATS)
def test_it_renders_as_transformers_does(chat: str, with_template: Callable[[Any], Any]) -> None:
    for name, text in BENIGN.items():
        made = with_template(text)
        expected = made.apply_chat_template(CHATS[chat], tokenize=False, add_generation_prompt=True)
        assert render(made, CHATS[chat]) == expected, name


def test_one_of_several_templates(with_template: Callable[[Any], Any]) -> None:
    assert render(with_template({"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}), [USER]) == "1"
    with pytest.raises(PromptError, match="does not work"):
        render(with_template({"rag": "{{ 1 }}", "tool_use": "{{ 2 }}"}), [USER])


@pytest.mark.parametrize("name", HOSTILE)
def test_what_does_not_end_is_one_line(
    name: str, with_template: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "SECONDS", 1.0)
    with pytest.raises(PromptError, match="chat template") as error:
        encode(with_template(HOSTILE[name]), [USER])
    assert "\n" not in str(error.value) and "--chat" in str(error.value)
    # What follows is not spoilt by it.
    assert render(with_template("{{ messages[0].content }}"), [USER]) == "Hi"


@pytest.mark.parametrize("name", BROKEN)
def test_what_refuses_or_is_broken_is_one_line(name: str, with_template: Callable[[Any], Any]) -> None:
    text, words = BROKEN[name]
    with pytest.raises(PromptError) as error:
        encode(with_template(text), [{"role": "system", "content": "Be brief."}, USER])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_refused_system_message_says_what_to_leave_out(with_template: Callable[[Any], Any]) -> None:
    made = with_template("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}ok")
    with pytest.raises(PromptError, match="--system"):
        render(made, [{"role": "system", "content": "x"}, USER])
    assert render(made, [USER]) == "ok"


def test_an_interrupt_ends_it_within_a_second(with_template: Callable[[Any], Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(template, "SECONDS", 60.0)
    render(with_template("x"), [USER])  # it has started
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        pressed: list[float] = []
        threading.Timer(0.5, lambda: (pressed.append(time.monotonic()), os.kill(os.getpid(), signal.SIGINT))).start()
        with pytest.raises(KeyboardInterrupt):
            render(with_template(HOSTILE["lists in lists"]), [USER])
        assert time.monotonic() - pressed[0] < 5  # a second on an idle machine
    finally:
        signal.signal(signal.SIGINT, old)
    assert render(with_template("y"), [USER]) == "y"


def test_many_threads_ask_in_turn(with_template: Callable[[Any], Any]) -> None:
    made, got = with_template("{{ messages[0].content }}"), []
    threads = [threading.Thread(target=lambda n=n: got.append(render(made, [{"role": "user", "content": str(n)}])))
               for n in range(8)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [str(n) for n in range(8)]


def test_a_child_that_is_killed_is_replaced(with_template: Callable[[Any], Any]) -> None:
    made = with_template("{{ messages[0].content }}")
    assert render(made, [USER]) == "Hi"
    child = template._renderer._child
    assert child is not None
    child.kill()
    child.wait()
    assert render(made, [USER]) == "Hi"


def test_the_process_ends_with_ours() -> None:
    code = (
        "from types import SimpleNamespace\nfrom airllm_nb.decode import template\n"
        "from transformers import PreTrainedTokenizerFast\nfrom tokenizers import Tokenizer, models\n"
        "t = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))\nt.chat_template = 'x'\n"
        "template.render(t, [{'role': 'user', 'content': 'x'}])\nprint(template._renderer._child.pid, flush=True)\n"
        "import os; os._exit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    end = time.monotonic() + 60
    while _runs(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_large_message_has_its_room(with_template: Callable[[Any], Any]) -> None:
    text = "Grüße 🌍 " * 200_000
    assert render(with_template("{{ messages[0].content }}"), [{"role": "user", "content": text}]) == text


def test_a_system_without_such_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no SIGKILL: what our clock ends, and what ends by itself, is said all the same."""
    question = {"messages": [USER], "template": HOSTILE["a loop in loops"], "special_tokens": {}}
    monkeypatch.setattr(template, "signal", object())
    monkeypatch.setattr(template, "PATIENCE", 0.1)
    with pytest.raises(PromptError, match="does not come to an end"):
        template._Renderer().ask(question)
    monkeypatch.setattr(template, "PATIENCE", 120.0)
    renderer = template._Renderer()
    child = renderer._started()
    child.kill()
    monkeypatch.setattr(renderer, "_started", lambda: child)
    with pytest.raises(PromptError, match="ends the process that renders it"):
        renderer.ask(question)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("when", ["at first", "later"])
@pytest.mark.parametrize("way", ["itself", "of Rust", "behind another"])
def test_what_the_system_refuses_costs_no_template(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, when: str, way: str
) -> None:
    """That of a damaged file does; too many open files are no damage."""
    folder = Path(shutil.copytree(tiny_llama(), tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(BENIGN["plain"])
    load, calls = AutoTokenizer.from_pretrained, [0]

    def refused(*given: Any, **how: Any) -> Any:
        calls[0] += 1
        if when == "later" and calls[0] == 1:
            raise ValueError("a file is damaged")
        if calls[0] > 2:
            return load(*given, **how)
        error = OSError(code, os.strerror(code), "chat_template.jinja")
        if way == "of Rust":
            error = Exception(f"{os.strerror(code)} (os error {code})")
        if way == "behind another":
            raise OSError("Can't load tokenizer") from error
        raise error

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refused)
    with pytest.raises(FileError, match=os.strerror(code)) as caught:
        load_tokenizer(folder)
    assert caught.value.errno == code
    monkeypatch.undo()
    assert load_tokenizer(folder).chat_template == BENIGN["plain"]
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert load_tokenizer(folder).chat_template is None
