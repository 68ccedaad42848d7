"""Parallel positional reads of a real file: every byte in its place, every failure named."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airllm_nb.checkpoint.index import Extent
from airllm_nb.errors import CheckpointError, ClosedError
from airllm_nb.stream.reader import Reader
from airllm_nb.stream.unit import Piece

SIZE = 100_003


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "weights.safetensors"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader(threads=4, chunk=1000)
    yield reader
    reader.close()


def read(reader: Reader, pieces: list[Piece], size: int, before=None) -> tuple[bytearray, BaseException | None]:
    into, finished, outcome = bytearray(b"\xdb" * size), threading.Event(), []

    def done(error: BaseException | None) -> None:
        outcome.append(error)
        finished.set()

    reader.submit(pieces, memoryview(into), done, before)
    assert finished.wait(10)
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
        assert left.acquire(timeout=20)
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
    assert str(path) in str(error) and "2,500" in str(error) and "\n" not in str(error)
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
    assert finished.wait(10)
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
    threads = threading.active_count()
    reader, outcomes = Reader(threads=3, chunk=100), []
    buffers = [bytearray(SIZE) for _ in range(5)]
    for into in buffers:
        reader.submit([Piece(Extent(file, 0, SIZE), 0)], memoryview(into), outcomes.append)
    reader.close()
    assert threading.active_count() == threads
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
    closing.join(10)
    assert not closing.is_alive()
    assert len(outcomes) == 1 and isinstance(outcomes[0], ClosedError)
