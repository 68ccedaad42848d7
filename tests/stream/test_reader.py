"""Parallel positional reads of a real file: every byte in its place, every failure named."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airllm_nb.errors import CheckpointError, ClosedError
from airllm_nb.stream.reader import Reader, chunks
from airllm_nb.stream.unit import Piece
from airllm_nb.tensors import libc
from airllm_nb.tensors.files import Files
from airllm_nb.tensors.index import Extent

SIZE = 100_003


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "weights.safetensors"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


@pytest.fixture(scope="module", params=["page cache", "direct"])
def reader(request: pytest.FixtureRequest, file: Path) -> Iterator[Reader]:
    is_direct = request.param == "direct"
    # Chunks that are no whole pages cut reads at odd places; direct ones are of whole pages in real life.
    reader = Reader(threads=4, chunk=8192 if is_direct else 1000, direct=is_direct)
    yield reader
    reader.close()


def forget(file: Path) -> None:
    """Put a file out of the page cache, as far as the system can."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(reader: Reader, pieces: list[Piece], size: int, before=None) -> tuple[bytearray, BaseException | None]:
    for path in {piece.extent.path for piece in pieces if piece.extent.path.is_file()}:
        forget(path)
    into, finished, outcome = bytearray(b"\xdb" * size), threading.Event(), []

    def done(error: BaseException | None) -> None:
        outcome.append(error)
        finished.set()

    reader.submit(pieces, memoryview(into), done, before)
    assert finished.wait(120)
    assert len(outcome) == 1
    return into, outcome[0]


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [
        (0, 1),
        (1, 1),
        (0, SIZE),
        (SIZE - 1, 1),
        (999, 2),
        (1000, 1000),
        (1001, 2999),
        (4095, 4097),
        (7, 54_321),
        (SIZE, 0),
    ],
)
def test_odd_offsets_and_sizes(reader: Reader, file: Path, offset: int, nbytes: int) -> None:
    into, error = read(reader, [Piece(Extent(file, offset, nbytes), 3)], nbytes + 5)
    assert error is None
    assert into == b"\xdb" * 3 + file.read_bytes()[offset : offset + nbytes] + b"\xdb" * 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, 5000), st.integers(0, 9)), max_size=12))
def test_many_pieces_land_where_they_belong(reader: Reader, file: Path, wanted: list[tuple[int, int, int]]) -> None:
    data, pieces, expected = file.read_bytes(), [], b""
    for offset, nbytes, gap in wanted:
        expected += b"\xdb" * gap
        nbytes = min(nbytes, SIZE - offset)
        pieces.append(Piece(Extent(file, offset, nbytes), len(expected)))
        expected += data[offset : offset + nbytes]
    into, error = read(reader, pieces, len(expected))
    assert error is None
    assert into == expected


def test_many_reads_at_once(reader: Reader, file: Path) -> None:
    data, chance, left, wrong = file.read_bytes(), random.Random(1), threading.Semaphore(0), []
    for _ in range(200):
        offset = chance.randrange(SIZE)
        nbytes = chance.randrange(SIZE - offset + 1)
        into = bytearray(nbytes)

        def done(error, into=into, offset=offset) -> None:
            if error is not None or into != data[offset : offset + len(into)]:
                wrong.append((offset, len(into), error))
            left.release()

        reader.submit([Piece(Extent(file, offset, nbytes), 0)], memoryview(into), done)
    for _ in range(200):
        assert left.acquire(timeout=120)
    assert wrong == []


def test_nothing_to_read_is_done(reader: Reader, file: Path) -> None:
    assert read(reader, [], 0) == (b"", None)
    assert read(reader, [Piece(Extent(file, 5, 0), 0)], 0) == (b"", None)


def test_a_file_truncated_while_open_is_named_with_the_offset(tmp_path: Path) -> None:
    path, reader = tmp_path / "shard.safetensors", Reader(threads=2, chunk=1000)
    path.write_bytes(bytes(5000))
    piece = [Piece(Extent(path, 1000, 3000), 0)]
    assert read(reader, piece, 3000)[1] is None
    os.truncate(path, 2500)
    _, error = read(reader, piece, 3000)
    assert isinstance(error, CheckpointError)
    # Two reads fail, beside each other; the first to do so is reported.
    assert str(path) in str(error) and ("2,500" in str(error) or "3,000" in str(error)) and "\n" not in str(error)
    path.write_bytes(bytes(5000))
    assert read(reader, piece, 3000)[1] is None, "usable afterwards"
    reader.close()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    reader = Reader(threads=2)
    _, error = read(reader, [Piece(Extent(tmp_path / "gone.safetensors", 0, 10), 0)], 10)
    reader.close()
    assert isinstance(error, CheckpointError)
    assert "gone.safetensors" in str(error) and "moved or deleted" in str(error)


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    reader = Reader(threads=2)
    _, error = read(reader, [Piece(Extent(tmp_path, 0, 10), 0)], 10)
    reader.close()
    assert isinstance(error, CheckpointError)
    assert str(tmp_path) in str(error)


def test_what_has_to_come_before_comes_before_the_first_byte(reader: Reader, file: Path) -> None:
    go, into, finished = threading.Event(), bytearray(b"\xdb" * 4000), threading.Event()
    reader.submit([Piece(Extent(file, 0, 4000), 0)], memoryview(into), lambda error: finished.set(), go.wait)
    assert not finished.wait(0.1)
    assert into == b"\xdb" * 4000
    go.set()
    assert finished.wait(120)
    assert into == file.read_bytes()[:4000]


def test_an_error_before_is_reported(reader: Reader, file: Path) -> None:
    def fails() -> None:
        raise RuntimeError("device lost")

    _, error = read(reader, [Piece(Extent(file, 0, 4000), 0)], 4000, fails)
    assert isinstance(error, RuntimeError)


def test_a_closed_reader_refuses(file: Path) -> None:
    reader = Reader()
    reader.close()
    reader.close()
    with pytest.raises(ClosedError):
        reader.submit([Piece(Extent(file, 0, 1), 0)], memoryview(bytearray(1)), lambda error: None)


def test_closing_while_reading_ends_threads_and_files(file: Path) -> None:
    files = len(list(Path("/proc/self/fd").iterdir()))
    threads = set(threading.enumerate())
    reader, outcomes = Reader(threads=3, chunk=100), []
    buffers = [bytearray(SIZE) for _ in range(5)]
    for into in buffers:
        reader.submit([Piece(Extent(file, 0, SIZE), 0)], memoryview(into), outcomes.append)
    reader.close()
    assert set(threading.enumerate()) <= threads
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    for into in buffers:
        into.append(0)  # no view is left that would still be written to


def test_closing_before_the_first_byte_never_reports_a_read_as_done(file: Path) -> None:
    reader, go, outcomes = Reader(threads=1), threading.Event(), []
    reader.submit([Piece(Extent(file, 0, 10), 0)], memoryview(bytearray(10)), outcomes.append, go.wait)
    closing = threading.Thread(target=reader.close)
    closing.start()
    closing.join(0.2)
    go.set()
    closing.join(120)
    assert not closing.is_alive()
    assert len(outcomes) == 1 and isinstance(outcomes[0], ClosedError)


# ---- past the page cache ---------------------------------------------------------------------------------------------


def resident(file: Path) -> bool:
    with file.open("rb") as opened:
        return libc.is_resident(opened.fileno(), 0, file.stat().st_size)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    path.write_bytes(random.Random(1).randbytes(300_000))
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system cannot read past the page cache")
    forget(path)
    if resident(path):
        pytest.skip("this file system keeps its files in memory")
    return path


def test_a_direct_read_leaves_nothing_in_the_page_cache(big: Path) -> None:
    reader, piece = Reader(direct=True), [Piece(Extent(big, 0, 300_000), 0)]
    try:
        assert read(reader, piece, 300_000)[0] == big.read_bytes()
        forget(big)
        read(reader, piece, 300_000)
        assert not resident(big)
    finally:
        reader.close()


def test_what_the_page_cache_holds_is_taken_from_it(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, files, into = big.read_bytes(), Files(direct=True), bytearray(300_000)
    assert resident(big)
    monkeypatch.setattr(Files, "_read_direct", lambda *_: pytest.fail("read past the cache"))
    files.read(big, 0, memoryview(into))
    files.close()
    assert into == expected


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_a_file_system_that_refuses_direct_reads_is_read_the_usual_way(
    big: Path, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, into, calls, read_blocks = Files(direct=True), bytearray(290_001), [], Files._read_blocks

    def refuse(self: Files, descriptor: int, offset: int, view: memoryview) -> int:
        calls.append(offset)
        if len(calls) > fails_at:
            raise OSError(errno.EINVAL, "Invalid argument")
        return read_blocks(self, descriptor, offset, view[:5000])

    monkeypatch.setattr(Files, "_read_blocks", refuse)
    files.read(big, 9_999, memoryview(into))
    assert len(calls) == fails_at + 1
    files.read(big, 9_999, memoryview(into))
    assert len(calls) == fails_at + 1, "it is not tried again"
    files.close()
    assert into == big.read_bytes()[9_999:]


@settings(max_examples=60, deadline=None)
@given(offset=st.integers(0, SIZE), nbytes=st.integers(1, 30_000), shift=st.integers(0, 5000), alike=st.booleans())
def test_direct_reads_of_odd_runs_into_odd_places(
    file: Path, offset: int, nbytes: int, shift: int, alike: bool
) -> None:
    nbytes = min(nbytes, SIZE - offset)
    memory = mmap.mmap(-1, 65_536)
    start = (offset % 4096) if alike else shift
    files = Files(direct=True)
    forget(file)
    files.read(file, offset, memoryview(memory)[start : start + nbytes])
    files.close()
    assert memory[start : start + nbytes] == file.read_bytes()[offset : offset + nbytes]
    assert not any(memory[:start])
    assert not any(memory[start + nbytes :])


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 3000))
def test_chunks_cover_a_run_and_are_cut_where_the_file_is(offset: int, nbytes: int, chunk: int) -> None:
    cut = chunks(offset, nbytes, chunk)
    assert [start for start, _ in cut] == [0, *(start + size for start, size in cut)][: len(cut)]
    assert sum(size for _, size in cut) == nbytes
    assert all(0 < size <= chunk for _, size in cut)
    assert all((offset + start) % chunk == 0 for start, _ in cut[1:])
