"""The one door to the disk: what the system refuses is one line that names the file and the remedy."""

from __future__ import annotations

import errno
import io
import logging
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from airllm_nb import disk
from airllm_nb.config import cache_dir
from airllm_nb.errors import AirLLMError, CheckpointError, FileError, MissingFileError, OptionError

REFUSALS = {
    errno.EIO: "check it",
    errno.ESTALE: "load the model again",
    errno.EMFILE: "ulimit -n, now ",
    errno.ENFILE: "ulimit -n",
    errno.EACCES: "chmod",
    errno.EPERM: "chmod",
    errno.ENOENT: "moved or deleted",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "name the file in it",
    errno.ELOOP: "links",
    errno.ENAMETOOLONG: "too long",
    errno.ENOSPC: "free some",
    errno.EDQUOT: "free some",
    errno.EROFS: "read-only",
    errno.EINVAL: "regular file",
    errno.ENOMEM: "other programs",
    errno.ENXIO: "check the disk",
}
READS = {
    "open_file": lambda path: disk.open_file(path).close(),
    "open_descriptor": disk.open_descriptor,
    "read_bytes": disk.read_bytes,
    "read_text": disk.read_text,
    "read_json": disk.read_json,
    "status": disk.status,
    "entries": disk.entries,
}


@pytest.mark.parametrize("code", REFUSALS, ids=errno.errorcode.get)
@pytest.mark.parametrize("read", READS)
def test_every_refusal_is_one_line_with_file_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str, code: int
) -> None:
    (tmp_path / "f.json").write_text("{}")
    path = tmp_path if read == "entries" else tmp_path / "f.json"

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    for name in ("open", "stat", "listdir", "scandir"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(FileError) as caught:
        READS[read](path)
    monkeypatch.undo()
    said = str(caught.value)
    assert said.startswith(f"{path} cannot be ")
    assert REFUSALS[code] in said
    assert "\n" not in said
    assert caught.value.errno == code
    assert isinstance(caught.value, CheckpointError)
    assert isinstance(caught.value, FileNotFoundError) is (code == errno.ENOENT)


def test_a_read_that_fails_in_the_middle_is_one_line_too(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 100)
    with disk.open_file(path) as file, path.open("wb") as other:
        os.dup2(other.fileno(), file.fileno())  # a descriptor that cannot be read stands for a disk that fails
        for read in (file.read, lambda: file.read(10)):
            with pytest.raises(FileError, match=r"f cannot be read \(Bad file descriptor\)"):
                read()


@pytest.mark.parametrize("read", ["open_file", "open_descriptor", "read_json"])
def test_what_is_no_regular_file_is_refused_and_nothing_waits(tmp_path: Path, read: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, why in ((tmp_path / "pipe", "regular file"), (Path("/dev/zero"), "regular file"), (tmp_path, "folder")):
        with pytest.raises(FileError, match=why):
            READS[read](path)


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("a\0b", "x" * 300, "\ud800"):
        for read in READS.values():
            with pytest.raises(FileError) as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value)


BROKEN = {
    "nothing": (b"", "not JSON"),
    "cut short": (b'{"a": ', "not JSON"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "Latin-1": (b'{"a": "\xe9"}', "not UTF-8"),
    "UTF-16": ("{}".encode("utf-16"), "not UTF-8"),
    "a list": (b"[]", "not a JSON object"),
    "a number": (b"1", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "a number of many digits": (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
    "nested deeply": (b'{"a":' * 100_000, "not JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_json_that_is_damaged(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    path, (data, why) = tmp_path / "f.json", BROKEN[case]
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=why) as caught:
        disk.read_json(path)
    assert type(caught.value) is CheckpointError
    assert str(path) in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert disk.read_json(path, optional=True) is None
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]


def test_json_that_is_not_there_may_be_optional(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(MissingFileError):
        disk.read_json(tmp_path / "f.json")
    assert disk.read_json(tmp_path / "f.json", optional=True) is None
    assert not caplog.records
    (tmp_path / "f.json").write_text('{"a": "é"}', encoding="utf-8")
    assert disk.read_json(tmp_path / "f.json", optional=True) == {"a": "é"}


def test_small_files_are_small(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 10)
    assert disk.read_bytes(tmp_path / "f", most=10) == b"x" * 10
    with pytest.raises(CheckpointError, match="more than 9 bytes"):
        disk.read_bytes(tmp_path / "f", most=9)
    with (tmp_path / "f").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="more than"):
        disk.read_json(tmp_path / "f")


def test_without_a_path_only_errors_of_files_are_told() -> None:
    class OfALibrary(OSError):
        pass

    for error in (BrokenPipeError(errno.EPIPE, "x"), ConnectionResetError(errno.ECONNRESET, "x"), OfALibrary("x"),
                  TimeoutError(errno.ETIMEDOUT, "x"), io.UnsupportedOperation("x")):  # fmt: skip
        with pytest.raises(type(error)) as caught, disk.told():
            raise error
        assert caught.value is error
    with pytest.raises(FileError, match=r"^/a/b cannot be read"), disk.told():
        raise PermissionError(errno.EACCES, "Permission denied", "/a/b")
    own = OptionError("ours")
    with pytest.raises(OptionError) as ours, disk.told("x"):
        raise own
    assert ours.value is own


def test_a_user_without_a_home_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    for name in ("HOME", "AIRLLM_NB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(OptionError, match="AIRLLM_NB_CACHE"):
        cache_dir()
    with pytest.raises(OptionError, match="no home"):
        disk.expanded("~/models")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "airllm_nb"


def test_the_door_needs_neither_torch_nor_more() -> None:
    code = "import sys; import airllm_nb.disk; print('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert issubclass(FileError, AirLLMError)
