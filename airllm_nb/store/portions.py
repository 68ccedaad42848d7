"""What of a store is written from which source files: all at once in one portion, or a portion for each weight file.

The latter is decided from headers, before a weight is downloaded. A portion reads no other file of the checkpoint. A
layer whose tensors lie in several files becomes several shards of the store. What a file holds of a *parameter* or an
expert that goes on in a later one is copied, as it is, into a shard of its own until then: a carried one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..disk import nearest, open_file, status
from ..tensors.index import Extent, TensorInfo
from .names import carried_name, expert_of, part_name
from .shard import Item, ShardJob, plain

COPY_BYTES = 4 << 20

Jobs = Callable[[Mapping[str, TensorInfo]], list[ShardJob]]


@dataclass(frozen=True)
class WeightFile:
    """One file of a checkpoint, which may come only when it is read, and go once it was.

    Attributes
    ----------
    named
        Where the tensors say that it is.
    path
        Where it is, or will be.
    nbytes
        Its size, also while it is not here.
    goes
        Whether it is deleted once it was read.
    """

    named: Path
    path: Path
    nbytes: int
    goes: bool


@dataclass(frozen=True)
class Portion:
    """What is written while ``file`` is here; without one, while all source files are.

    Attributes
    ----------
    jobs
        Shards of the store.
    carried
        Shards that hold what later portions need of the file.
    used
        Shards carried by earlier portions that nothing needs after this one.
    """

    jobs: tuple[ShardJob, ...]
    carried: tuple[ShardJob, ...] = ()
    used: tuple[ShardJob, ...] = ()
    file: WeightFile | None = None

    @property
    def writes(self) -> tuple[ShardJob, ...]:
        return self.jobs + self.carried


def plan_portions(
    tensors: Mapping[str, TensorInfo], files: Sequence[WeightFile], folder: Path, jobs_of: Jobs
) -> list[Portion]:
    """One portion a file.

    Parameters
    ----------
    tensors
        Parameter name → bytes, in any of the files.
    folder
        The store's, where carried shards lie.
    jobs_of
        Makes the shards of tensors: one a layer, or however they are to be grouped.
    """
    number = {file.named: at for at, file in enumerate(files)}
    spans = {name: sorted({number[extent.path] for extent in info.extents}) for name, info in tensors.items()}
    together = {name: expert_of(name) or name for name in tensors}  # of an expert all is written at once
    ends: dict[str, int] = {}
    for name, span in spans.items():
        ends[together[name]] = max(ends.get(together[name], 0), *span, 0)
    end = {name: ends[together[name]] for name in tensors}
    carried: dict[tuple[int, int], ShardJob] = {}
    moved: dict[tuple[str, int], Iterator[Extent]] = {}
    for first, last in sorted({(at, end[name]) for name, span in spans.items() for at in span if at < end[name]}):
        straddling = [name for name, span in spans.items() if first in span and end[name] == last]
        parts = {name: _within(tensors[name], files[first]) for name in straddling}
        items = tuple(_copied(name, extents) for name, extents in parts.items())
        job = carried[first, last] = ShardJob(carried_name(first, last), items, concurrent=True)
        moved |= {(name, first): iter(found) for name, found in _places(folder / job.file, job, parts)}

    def placed(name: str) -> TensorInfo:
        keys = [(extent, number[extent.path]) for extent in tensors[name].extents]
        return replace(tensors[name], extents=tuple(
            next(moved[name, at]) if (name, at) in moved else replace(extent, path=files[at].path)
            for extent, at in keys
        ))  # fmt: skip

    jobs: list[list[ShardJob]] = [[] for _ in files]
    for job in jobs_of({name: placed(name) for name in tensors}):
        by_portion: dict[int, list[Item]] = {}
        for item in job.items:
            by_portion.setdefault(end[item.name], []).append(item)
        for at, some in by_portion.items():
            name = job.name if len(by_portion) == 1 else part_name(job.name, at)
            jobs[at].append(replace(job, name=name, items=tuple(some)))
    return [
        Portion(
            tuple(jobs[at]),
            tuple(job for (first, _), job in carried.items() if first == at),
            tuple(job for (_, last), job in carried.items() if last == at),
            file,
        )
        for at, file in enumerate(files)
    ]


def bytes_needed(portions: Sequence[Portion], folder: Path, is_done: Callable[[ShardJob], bool]) -> int:
    """How much fuller than now the disk of ``folder`` becomes: the store, what is carried, one downloaded file.

    Parameters
    ----------
    is_done
        Whether a shard is written, or needed by nothing any more.
    """
    device, now, most = status(nearest(folder)).st_dev, 0, 0
    ahead: set[str] = set()

    def freed(path: Path) -> int:
        """What deleting a file gives back to this disk."""
        return status(path).st_size if path.is_file() and status(path).st_dev == device else 0

    for portion in portions:
        todo, file = [job for job in portion.writes if not is_done(job)], portion.file
        ahead |= {job.file for job in todo}
        now += sum(job.nbytes for job in todo)
        most = max(most, now + (file.nbytes if todo and file is not None and not file.path.is_file() else 0))
        now -= sum(job.nbytes if job.file in ahead else freed(folder / job.file) for job in portion.used)
        now -= freed(file.path) if file is not None and file.goes else 0
    return most


def _within(info: TensorInfo, file: WeightFile) -> list[Extent]:
    return [replace(extent, path=file.path) for extent in info.extents if extent.path == file.named]


def _copied(name: str, extents: list[Extent]) -> Item:
    def read() -> Iterator[bytes]:
        with open_file(extents[0].path) as file:
            for extent in extents:
                for done in range(0, extent.nbytes, COPY_BYTES):
                    file.seek(extent.offset + done)
                    yield file.read(min(COPY_BYTES, extent.nbytes - done))

    return plain(name, "U8", (sum(extent.nbytes for extent in extents),), read)


def _places(path: Path, job: ShardJob, parts: Mapping[str, list[Extent]]) -> Iterator[tuple[str, list[Extent]]]:
    """Where a carried shard has the extents of each parameter, in their order."""
    cursor = len(job.header())
    for entry in job.entries():
        if entry.name in parts:
            found, at = [], cursor
            for extent in parts[entry.name]:
                found.append(Extent(path, at, extent.nbytes))
                at += extent.nbytes
            yield entry.name, found
        cursor += entry.nbytes
