"""What cannot be a prompt is one line that says what it is, before anything runs."""

from __future__ import annotations

import copy
import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from airllm_nb import cli
from airllm_nb.decode import prompt as prompts
from airllm_nb.decode.prompt import encode
from airllm_nb.decode.tokenizer import load_tokenizer
from airllm_nb.errors import PromptError
from airllm_nb.notebook.prompt_variables import expand

CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"
NONE: dict[str, tuple[Any, str]] = {
    "nothing": (None, "empty"),
    "no text": ("", "empty"),
    "blanks": (" \n\t", "empty"),
    "no messages": ([], "empty"),
    "bytes": (b"Hello", "decode"),
    "bytes that can be written": (bytearray(b"Hello"), "decode"),
    "a number": (7, "int"),
    "ids": (torch.tensor([[1, 2]]), "generate"),
    "a byte of Latin-1": ("Gr\udcfc\udcdfe", "Latin-1"),
    "half a character": ("\ud83d", "half of a character"),
    "one message": ({"role": "user", "content": "Hi"}, "list"),
    "several texts": (["Hello", "there"], "message 1 is str"),
    "no role": ([{"content": "Hi"}], "message 1 has no role"),
    "a role that is none": ([{"role": 3, "content": "Hi"}], "message 1 has no role"),
    "no content": ([{"role": "user"}], "message 1 has no content"),
    "content of nothing": ([{"role": "user", "content": None}], "message 1 has no content"),
    "content of bytes": ([{"role": "user", "content": b"Hi"}], "message 1 is bytes"),
    "content of a number": ([{"role": "user", "content": 5}], "message 1 is int"),
    "Latin-1 in a message": ([{"role": "user", "content": "Gr\udcfc"}], "Latin-1"),
    "a picture": ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "image"),
    "an object": ([{"role": "user", "content": [{"type": "text", "text": object()}]}], "object"),
    "the second": ([{"role": "user", "content": "Hi"}, 5], "message 2 is int"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Callable[..., Path]) -> Any:
    made = AutoTokenizer.from_pretrained(tiny_llama())
    made.chat_template = CHAT
    return made


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_prompt(name: str, tokenizer: Any) -> None:
    given, words = NONE[name]
    with pytest.raises(PromptError, match=words) as error:
        encode(tokenizer, given)
    assert "\n" not in str(error.value)
    str(error.value).encode()  # it can be shown anywhere


def test_what_is_unusual_and_text(tokenizer: Any) -> None:
    for text in ("\x00", "\ufeffHi", "🌍", "a\r\nb"):
        assert tokenizer.decode(encode(tokenizer, text)[1]["input_ids"][0]).endswith(text)


def test_a_prompt_of_megabytes_is_measured_by_its_beginning(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_SAMPLE", 1 << 10)
    seen: list[int] = []

    def spy(text: str, **options: Any) -> Any:
        seen.append(len(text))
        return tokenizer(text, **options)

    with pytest.raises(PromptError, match="shorten"):
        encode(spy, "x" * 10_000_000, 500)
    assert seen == [1 << 10]
    assert encode(spy, "x" * 2000, 1500)[1]["input_ids"].shape[1] == 2000  # near the context all of it is counted


@pytest.mark.parametrize("way", ["argument", "system", "stop", "stdin", "stdin that decodes nothing"])
def test_bytes_of_another_encoding_in_a_shell(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = b"Gr\xfc\xdfe".decode("utf-8", "surrogateescape")  # as Python has it in sys.argv
    errors = "strict" if way == "stdin" else "surrogateescape"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Gr\xfc\xdfe"), "utf-8", errors))
    words = {"argument": [bad], "system": ["Hi", "--system", bad], "stop": ["Hi", "--stop", bad]}.get(way, ["-"])
    # It is said before the model is looked for.
    assert cli.main(["generate", str(tmp_path / "nowhere"), *words]) == 1
    said = capsys.readouterr().err
    assert said.startswith("airllm-nb: ") and said.count("\n") == 1 and "latin1" in said


DAMAGE = {
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data, "cut short": lambda data: data[: len(data) // 2],
    "nothing": lambda _: b"", "Latin-1": lambda data: data + b"\xfc", "a list": lambda _: b"[1]",
    "wrong types": lambda _: b'{"added_tokens_decoder": 7, "bos_token": 5, "chat_template": 5, "x": "y"}',
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                                  "chat_template.jinja", "preprocessor_config.json"])  # fmt: skip
def test_a_damaged_file_beside_the_vocabulary_is_named_and_left_out(
    name: str, damage: str, tiny_llama: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama(), folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    file = folder / name
    file.write_bytes(DAMAGE[damage](file.read_bytes() if file.exists() else b'{"x": "y"}'))
    try:
        AutoTokenizer.from_pretrained(folder)
        takes_it = True
    except Exception:
        takes_it = False
    made = load_tokenizer(folder)
    assert encode(made, "Grüße")[1]["input_ids"].tolist() == AutoTokenizer.from_pretrained(tiny_llama())(
        "Grüße", return_tensors="pt"
    )["input_ids"].tolist()  # fmt: skip
    assert takes_it or f"{name} cannot be read" in caplog.text
    assert made.name_or_path == str(folder)


def test_a_pattern_of_the_tokenizer_that_backtracks_is_one_line(tokenizer: Any) -> None:
    made = copy.deepcopy(tokenizer)
    made._tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(PromptError, match="tokenizer cannot read the prompt") as error:
        encode(made, "a" * 40 + "b")
    assert "\n" not in str(error.value)


def test_bytes_in_a_variable() -> None:
    for value in (b"Gr\xfc", bytearray(b"x"), "Gr\udcfc"):
        with pytest.raises(PromptError, match="the variable name"):
            expand("{name}", {"name": value})
    assert expand("{name}", {"name": "Grüße"}) == "Grüße"
