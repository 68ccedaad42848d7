"""How RAM units lie in host memory: in the page cache, in memory of our own, and how the way is chosen."""

from __future__ import annotations

import errno
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from airllm_nb import AutoModel
from airllm_nb.errors import CheckpointError, OptionError
from airllm_nb.stream import trial
from airllm_nb.stream.mapped import MappedFiles
from airllm_nb.stream.memory import PageableUnits
from airllm_nb.stream.page_cache import CachedPieces
from airllm_nb.stream.reader import Reader
from airllm_nb.stream.ring import LOCKED, PAGE_CACHE, PAGEABLE
from airllm_nb.stream.unit import Piece
from airllm_nb.tensors import libc
from airllm_nb.tensors.index import Extent

SIZE = 200_000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


def pieces(file: Path) -> tuple[Piece, ...]:
    """Three runs that begin and end inside of pages, two of them on the same page."""
    return (
        Piece(Extent(file, 5000, 30_001), 0),
        Piece(Extent(file, 35_001, 10), 30_208),
        Piece(Extent(file, 60_000, 140_000), 30_464),
    )


def submit(reader: Reader | PageableUnits, unit: tuple[Piece, ...], into: object) -> BaseException | None:
    outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    reader.submit(unit, into, outcome.put)
    return outcome.get(timeout=120)


# ---- the page cache --------------------------------------------------------------------------------------------------


def test_pieces_are_seen_where_they_lie(file: Path) -> None:
    cached, data, reader = CachedPieces(pieces(file)), file.read_bytes(), Reader(chunk=8192)
    assert submit(reader, pieces(file), cached) is None
    reader.close()
    for piece, view in zip(pieces(file), cached.views, strict=True):
        assert bytes(view.numpy()) == data[piece.extent.offset : piece.extent.offset + piece.extent.nbytes]
    view = cached.views[0]
    cached.close()
    del cached
    assert bytes(view[:4].numpy()) == data[5000:5004], "a view that is held stays valid"


def test_fetching_brings_every_page_into_memory(file: Path) -> None:
    for job in CachedPieces(pieces(file)).jobs(4096):
        job()
    with file.open("rb") as opened:
        assert libc.is_resident(opened.fileno(), 60_000, 140_000)


def test_an_old_kernel_reads_instead(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libc, "populate", lambda *_: errno.EINVAL)
    test_pieces_are_seen_where_they_lie(file)


def test_a_file_that_became_shorter_is_named(file: Path) -> None:
    wanted = pieces(file)
    cached, reader = CachedPieces(wanted), Reader()
    with file.open("r+b") as opened:
        opened.truncate(65_536)
    error = submit(reader, wanted, cached)
    reader.close()
    assert isinstance(error, CheckpointError)
    assert str(file) in str(error)
    with pytest.raises(CheckpointError, match="become shorter"):
        CachedPieces(wanted)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors cannot be opened .*load the model again"):
        CachedPieces([Piece(Extent(tmp_path / "gone.safetensors", 0, 10), 0)])


def test_hundreds_of_mappings_keep_no_file_open(file: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    mapped = [CachedPieces(pieces(file)) for _ in range(100)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert len(mapped) == 100


def test_a_file_larger_than_ram_can_be_mapped(tmp_path: Path) -> None:
    """With views of our own too, which Linux would otherwise keep memory for."""
    size = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size - 3)
        file.write(b"end")
    end = Extent(path, size - 3, 3)
    assert bytes(MappedFiles().view(end).numpy()) == b"end"
    assert bytes(CachedPieces([Piece(end, 0)]).views[0].numpy()) == b"end"


# ---- memory that cannot be locked ------------------------------------------------------------------------------------


def test_a_pageable_unit_is_read_from_its_file_once(file: Path) -> None:
    unit, size, data = pieces(file), 200_000, file.read_bytes()
    other = (Piece(Extent(file, 0, 100), 0),)
    reader = Reader()
    units = PageableUnits(reader, {unit: torch.zeros(size, dtype=torch.uint8)})
    ring = bytearray(size)
    assert submit(units, unit, memoryview(ring)) is None
    expected, ring[:] = bytes(ring), bytes(size)
    assert expected[30_208:30_218] == data[35_001:35_011]
    file.write_bytes(bytes(SIZE))
    assert submit(units, unit, memoryview(ring)) is None
    assert ring == expected
    assert submit(units, other, memoryview(ring)) is None
    assert not any(ring[:100]), "other units come from the file as it is"
    reader.close()


def test_a_failed_read_is_not_kept(file: Path) -> None:
    unit, data = pieces(file), file.read_bytes()
    reader, ring = Reader(), bytearray(200_000)
    units = PageableUnits(reader, {unit: torch.zeros(200_000, dtype=torch.uint8)})
    file.write_bytes(data[:1000])
    assert isinstance(submit(units, unit, memoryview(ring)), CheckpointError)
    file.write_bytes(data)
    assert submit(units, unit, memoryview(ring)) is None
    assert bytes(ring[:30_001]) == data[5000:35_001]
    reader.close()


# ---- which way -------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A large file, and a GPU as far as the trial can tell: it asks for a name and starts a child."""
    monkeypatch.setenv("AIRLLM_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(trial, "LEAST_FILE", 1)
    file = tmp_path / "weights"
    file.write_bytes(b"x" * 8192)
    return file


def child(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> Path:
    """Put a program in the place of the child; it counts its runs."""
    log = folder / "runs"
    program = f"open({str(log)!r}, 'a').write('x')\nimport sys, time, os\n" + textwrap.dedent(body)
    (folder / "child.py").write_text(program)
    monkeypatch.setattr(trial, "CHILD", folder / "child.py")
    return log


@pytest.mark.parametrize(
    ("body", "kind", "tries"),
    [
        ("print('{\"page_cache\": 50e9}')", PAGE_CACHE, 1),
        ("print('{\"page_cache\": 2e9}')", LOCKED, 2),
        ('print(\'{"refused": "cuMemHostRegister 1", "locked": 1073741824}\')', LOCKED, 1),
        ('print(\'{"refused": "cuMemHostRegister 1", "locked": 67108864}\')', PAGEABLE, 1),
        ('print(\'{"failed": "cuInit 100"}\')', LOCKED, 2),
        ("os.abort()", LOCKED, 1),
        ("print('no JSON')", LOCKED, 1),
        ("time.sleep(3600)", LOCKED, 1),
    ],
)
def test_the_trial_decides_and_is_remembered(
    gpu: Path, monkeypatch: pytest.MonkeyPatch, body: str, kind: str, tries: int
) -> None:
    log = child(monkeypatch, gpu.parent, body)
    if "sleep" in body:  # the others are to be over by themselves, on a busy machine too
        monkeypatch.setattr(trial, "SECONDS", 1)
    for _ in range(2):
        assert trial.ram_kind(gpu, torch.device("cuda", 0), link=50e9) == kind
    assert len(log.read_text()) == tries


def test_a_damaged_memory_is_tried_again(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = child(monkeypatch, gpu.parent, "print('{\"page_cache\": 50e9}')")
    for content in ("", "[]", "{", json.dumps({trial.file_system(gpu): 3})):
        (gpu.parent / "cache").mkdir(exist_ok=True)
        (gpu.parent / "cache" / "machine.json").write_text(content)
        assert trial.ram_kind(gpu, torch.device("cuda", 0), link=50e9) == PAGE_CACHE
    assert len(log.read_text()) == 4


def test_without_a_driver_the_real_child_says_so(gpu: Path) -> None:
    answer = trial._try(gpu, 0)
    if torch.cuda.is_available():
        assert "failed" not in answer
    else:
        assert answer.keys() == {"failed"}


def test_the_file_system_of_a_file_has_a_name(tmp_path: Path) -> None:
    assert " at /" in trial.file_system(tmp_path)
    assert trial.file_system(Path("/proc/self")) != trial.file_system(tmp_path)


def test_a_cached_file_says_nothing_about_direct_reads(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {True: 2e9, False: 1e9}
    monkeypatch.setattr(trial, "LEAST_DIRECT", 1)
    monkeypatch.setattr(trial, "disk_bandwidth", lambda file, direct=False: rates[direct])
    gpu.read_bytes()
    assert not trial.direct_is_faster(gpu)
    monkeypatch.setattr(libc, "is_resident", lambda *_: False)
    assert trial.direct_is_faster(gpu)
    rates[True] = 0.5e9
    assert trial.direct_is_faster(gpu), "it is remembered"


def test_a_user_without_a_home_gets_an_answer_each_time(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise OptionError("this user has no home folder")

    log = child(monkeypatch, gpu.parent, "print('{\"page_cache\": 50e9}')")
    monkeypatch.setattr(trial, "cache_dir", homeless)
    for _ in range(2):
        assert trial.ram_kind(gpu, torch.device("cuda", 0), link=50e9) == PAGE_CACHE
    assert len(log.read_text()) == 2


def test_where_no_child_can_be_started_memory_is_locked(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial.sys, "executable", None)
    assert trial.ram_kind(gpu, torch.device("cuda", 0), link=50e9) == LOCKED


# ---- what a user may do meanwhile ------------------------------------------------------------------------------------

SMALL = {"vram_budget": "8MiB", "max_seq_len": 64}


@pytest.fixture
def folder(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    return Path(shutil.copytree(tiny_llama(**wide), tmp_path / "model"))


def test_a_file_system_that_cannot_map_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENODEV, "No such device")

    ids = torch.tensor([[1, 70, 90, 33]])
    with AutoModel.from_pretrained(folder, **SMALL) as model:
        assert "ram" in model.plan.tiers
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    monkeypatch.setattr(libc, "map_file", refuse)
    for direct in (False, True):
        with AutoModel.from_pretrained(folder, direct_io=direct, **SMALL) as model:
            assert model.generate(ids, max_new_tokens=4, do_sample=False).equal(expected)


def test_a_rewritten_checkpoint_is_noticed_and_a_deleted_one_is_not_missed(folder: Path) -> None:
    ids, file = torch.tensor([[1, 70, 90, 33]]), folder / "model.safetensors"
    with AutoModel.from_pretrained(folder, **SMALL) as model:
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)
        content = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="changed while the model was open"):
            model.generate(ids, max_new_tokens=4, do_sample=False)
    with AutoModel.from_pretrained(folder, **SMALL) as model:
        model.generate(ids, max_new_tokens=4, do_sample=False)
        file.unlink()
        assert model.generate(ids, max_new_tokens=4, do_sample=False).equal(expected)


def test_a_script_that_leaves_a_stream_ends_as_usual(folder: Path) -> None:
    script = f"""
from airllm_nb import AutoModel
model = AutoModel.from_pretrained({str(folder)!r}, device="cpu", **{SMALL!r})
generation = model.stream("t70 t90", max_new_tokens=50)
next(generation)
print("left")
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
        assert done.stdout.splitlines()[-1:] == ["left"], done.stderr
        assert done.returncode == 0, done.stderr
