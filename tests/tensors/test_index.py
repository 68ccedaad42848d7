"""Safetensors headers: what the reference writes is accepted, damage of any kind is a CheckpointError with a name."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from airllm_nb import AutoModel
from airllm_nb.disk import told
from airllm_nb.errors import CheckpointError, FileError
from airllm_nb.stream.mapped import MappedFiles
from airllm_nb.tensors.index import INDEX_FILE, CheckpointIndex, parse_header, read_header, read_index

VALID = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
         "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}  # fmt: skip


def write(path: Path, header: Any, data: bytes = bytes(32), length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def changed(**entry: Any) -> dict[str, Any]:
    return VALID | {"b": VALID["b"] | entry}


# ---- what is good ----------------------------------------------------------------------------------------------------

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float32).view(3, 4),
    "vector": torch.arange(5, dtype=torch.bfloat16),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.empty(0, dtype=torch.float16),
    "empty.rows": torch.empty(0, 7),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
    "long": torch.tensor([1 << 40]),
    "short": torch.tensor([-3], dtype=torch.int16),
    "float8": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
    "naïve.名前": torch.ones(2, 2, dtype=torch.int32),
}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"": "", "naïve": "名前\n"}])
def test_what_safetensors_writes_is_read(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata=metadata)
    index, files = read_index(tmp_path), MappedFiles()
    assert set(index) == set(TENSORS)
    assert index.files == (path,)
    assert index.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
    for name, expected in TENSORS.items():
        assert index[name].shape == tuple(expected.shape)
        assert index[name].nbytes == expected.nbytes
        got = files.tensor(index[name], expected.dtype)
        assert got.view(torch.uint8).equal(expected.view(torch.uint8)) if expected.dim() else got.equal(expected)


@pytest.mark.parametrize(
    "tensors", [{}, {"only": torch.empty(0)}, {"x" * 5000: torch.ones(1)}], ids=["none", "empty", "long"]
)
def test_small_files_that_safetensors_writes_are_read(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    assert set(read_header(tmp_path / "model.safetensors")) == set(tensors)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.lists(st.integers(0, 4), max_size=3),
            st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64]),
        ),
        max_size=6,
    )
)
def test_any_file_that_safetensors_writes_is_read(wanted: dict[str, tuple[list[int], torch.dtype]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        tensors = {name: torch.ones(shape).to(dtype) for name, (shape, dtype) in wanted.items()}
        try:
            save_file(tensors, path)
            load_file(path)
        except Exception:  # names that the reference itself refuses
            return
        assert {name: info.nbytes for name, info in read_header(path).items()} == {
            name: tensor.nbytes for name, tensor in tensors.items()
        }


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3), "extra": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    assert set(read_index(tmp_path)) == {"a", "b", "extra"}
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    index = read_index(tmp_path)
    assert set(index) == {"a", "b", "extra"}  # as transformers: the shards are asked what they hold
    assert index["b"].extents[0].path.name == names["b"]


def test_the_last_of_the_shards_of_an_index_gives_what_several_hold(tmp_path: Path) -> None:
    for at in (1, 2):
        save_file({"a": torch.full((2,), float(at))}, tmp_path / f"{at}.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    with pytest.raises(CheckpointError, match="'b' is missing"):
        read_index(tmp_path)
    save_file({"a": torch.full((2,), 2.0), "b": torch.ones(1)}, tmp_path / "2.safetensors")
    assert read_index(tmp_path)["a"].extents[0].path.name == "2.safetensors"


def test_an_index_may_name_files_below_the_folder(tmp_path: Path) -> None:
    for name in ("part/1.safetensors", "part/2.safetensors"):
        (tmp_path / "part").mkdir(exist_ok=True)
        save_file({name[5]: torch.ones(2)}, tmp_path / name)
    names = {"1": "part/1.safetensors", "2": "part/2.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    assert set(read_index(tmp_path)) == {"1", "2"}


def test_a_single_file_goes_before_a_left_over_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    for text in (json.dumps({"weight_map": {"a": "gone.safetensors"}}), "{"):
        (tmp_path / INDEX_FILE).write_text(text)
        assert read_index(tmp_path).files == (tmp_path / "model.safetensors",)


def test_padding_of_a_store_is_no_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "__pad.x.0": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    assert list(read_index(tmp_path)) == ["a"]


def test_symbolic_links_into_a_blob_folder_are_followed(tmp_path: Path) -> None:
    """The Hub's cache is made of them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "0123")
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/0123")
    (snapshot / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert list(read_index(snapshot)) == ["a"]


def test_the_example_of_this_file_is_valid(tmp_path: Path) -> None:
    assert set(read_header(write(tmp_path / "ok.safetensors", VALID))) == {"a", "b"}


# ---- what is bad -----------------------------------------------------------------------------------------------------

DAMAGED: dict[str, Any] = {
    "not json": b"{'a': 1}",
    "not utf-8": b'{"\xff\xfe": 1}',
    "a list": b"[1, 2]",
    "a number": b"17",
    "null": b"null",
    "nested too deep": b"[" * 100_000,
    "nothing": b"",
    "not a number": b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}',
    "endless": b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}',
    "a huge number": b'{"a": {"dtype": "F32", "shape": [1' + b"0" * 5000 + b'], "data_offsets": [0, 4]}}',
    "an entry that is text": VALID | {"b": "BF16"},
    "an entry that is null": VALID | {"b": None},
    "an entry that is a list": VALID | {"b": [1, 2, 3]},
    "no dtype": VALID | {"b": {"shape": [4], "data_offsets": [24, 32]}},
    "no shape": VALID | {"b": {"dtype": "BF16", "data_offsets": [24, 32]}},
    "no offsets": VALID | {"b": {"dtype": "BF16", "shape": [4]}},
    "unknown dtype": changed(dtype="F31"),
    "dtype is a list": changed(dtype=["BF16"]),
    "dtype is null": changed(dtype=None),
    "dtype is an object": changed(dtype={}),
    "shape is text": changed(shape="4"),
    "shape is a number": changed(shape=4),
    "shape has text": changed(shape=["4"]),
    "shape has a fraction": changed(shape=[4.0]),
    "shape has a truth": changed(shape=[True, 4]),
    "shape is negative": changed(shape=[-2, -2]),
    "shape of another size": changed(shape=[5]),
    "shape whose product overflows": changed(shape=[1 << 63, 1 << 63]),
    "shape is an object": changed(shape={"0": 4}),
    "one offset": changed(data_offsets=[24]),
    "three offsets": changed(data_offsets=[24, 32, 40]),
    "offsets are text": changed(data_offsets=["24", "32"]),
    "offsets are the wrong way round": changed(data_offsets=[32, 24]),
    "offsets are negative": changed(data_offsets=[-8, 0]),
    "offsets beyond the end": changed(data_offsets=[32, 40]),
    "offsets far beyond the end": changed(data_offsets=[1 << 62, (1 << 62) + 8]),
    "offsets are an object": changed(data_offsets={"24": 0, "32": 0}),
    "overlap": changed(data_offsets=[20, 28]),
    "the same bytes twice": VALID | {"c": VALID["b"]},
    "a gap": changed(data_offsets=[25, 33]),
    "two tensors of no bytes, one beyond": VALID | {"c": {"dtype": "U8", "shape": [0], "data_offsets": [40, 40]}},
    "a tensor of no bytes inside another": VALID | {"c": {"dtype": "U8", "shape": [0], "data_offsets": [3, 3]}},
    "less than a byte left over": changed(dtype="F4", shape=[15]),
    "a field that is there twice": json.dumps(VALID).replace('"BF16"', '"F16", "dtype": "BF16"').encode(),
    "two sets of metadata": b'{"__metadata__": {}, "__metadata__": {}, ' + json.dumps(VALID).encode()[1:],
    "metadata that is a number": VALID | {"__metadata__": {"format": 1}},
    "metadata that is a list": VALID | {"__metadata__": []},
    "a length that is negative zero": json.dumps(VALID).replace("[0, 24]", "[-0, 24]").encode(),
    "a mark of byte order": b"\xef\xbb\xbf" + json.dumps(VALID).encode(),
    "another encoding": json.dumps(VALID).encode("utf-16"),
    "half a character": json.dumps(VALID).replace('"a"', '"\\ud800"').encode(),
    "no number, where nobody looks": json.dumps(VALID).replace('"F32"', '"F32", "x": NaN').encode(),
    "a nest, where nobody looks": json.dumps(VALID).replace('"F32"', '"F32", "x": ' + "[" * 140 + "]" * 140).encode(),
    "zeros behind": json.dumps(VALID).encode() + bytes(4),
    "inside another": VALID | {"b": {"dtype": "BF16", "shape": [4], "data_offsets": [8, 16]}},
}


@pytest.mark.parametrize("header", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_header_is_refused_and_the_file_named(tmp_path: Path, header: Any) -> None:
    path = write(tmp_path / "model.safetensors", header)
    for attempt in (lambda: read_header(path), lambda: read_index(tmp_path)):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000 + len(str(path))


@pytest.mark.parametrize("code", [errno.ENODEV, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """As the reference says it, which maps what it looks at; all else that it says stands."""
    path = write(tmp_path / "model.safetensors", VALID)

    def refused(*_: object) -> None:
        raise OSError(f"{os.strerror(code)} (os error {code})")

    monkeypatch.setattr("safetensors.safe_open", refused)
    monkeypatch.setattr("airllm_nb.stream.mapped._map", lambda path: refuse(path, code))
    info = read_index(tmp_path)["b"]
    assert MappedFiles().tensor(info, torch.bfloat16).tolist() == [0.0] * 4
    code = errno.EMFILE
    with pytest.raises(FileError, match="close other models and files") as caught:
        read_header(path)
    assert caught.value.errno == errno.EMFILE


def refuse(path: Path, code: int) -> None:
    with told(path, "mapped"):
        raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("length", [0, 1, 10**6, 100_000_001, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_a_wrong_header_length_is_refused_before_anything_is_read(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "model.safetensors", VALID, length=length)
    with pytest.raises(CheckpointError, match="damaged"):
        read_header(path)


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", VALID)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated or damaged") as caught:
            read_header(path)
        assert str(path) in str(caught.value)


def test_a_byte_too_many_at_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="ends at byte"):
        read_header(write(tmp_path / "model.safetensors", VALID, bytes(33)))


@pytest.mark.parametrize("by", [-9, -8, -1, 1, 8])
def test_a_header_length_that_is_wrong_by_its_padding_is_refused(tmp_path: Path, by: int) -> None:
    """A valid header all the same, of tensors that lie a few bytes before or behind their own."""
    raw = json.dumps(VALID).encode() + b" " * 9
    path = write(tmp_path / "model.safetensors", raw, b" " * 8 + bytes(32), length=len(raw) + 8)
    assert set(read_header(path)) == {"a", "b"}
    path = write(tmp_path / "model.safetensors", raw, b" " * 8 + bytes(32), length=len(raw) + 8 + by)
    with pytest.raises(CheckpointError, match="damaged"):
        read_header(path)


def test_a_file_on_the_hub_is_measured_as_one_that_is_here() -> None:
    """Its header alone is asked for; how long the file is the Hub says."""
    raw, path = json.dumps(VALID).encode(), Path("model.safetensors")
    assert set(parse_header(path, raw, 8 + len(raw) + 32)) == {"a", "b"}
    for wrong in (31, 33, 4096):
        with pytest.raises(CheckpointError, match="ends at byte"):
            parse_header(path, raw, 8 + len(raw) + wrong)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 64))
def test_flipped_bytes_give_an_error_or_a_consistent_index(flips: list[tuple[int, int]], cut: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "model.safetensors", VALID)
        raw = bytearray(path.read_bytes())
        for at, value in flips:
            raw[at % len(raw)] = value
        path.write_bytes(bytes(raw[: len(raw) - cut]))
        check_or_refuse(path)


def test_random_files_are_refused(tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(300):
        path = tmp_path / "model.safetensors"
        path.write_bytes(chance.randbytes(chance.randrange(200)))
        check_or_refuse(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.fixed_dictionaries({}, optional={"dtype": JSON | st.just("F32"), "shape": JSON, "data_offsets": JSON}) | JSON)
def test_any_json_in_the_place_of_an_entry(entry: Any) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        check_or_refuse(write(Path(folder) / "model.safetensors", VALID | {"b": entry}))


def check_or_refuse(path: Path) -> None:
    try:
        index = read_index(path.parent)
    except CheckpointError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return
    check(index, path.stat().st_size)


def check(index: CheckpointIndex, size: int) -> None:
    for info in index.values():
        assert all(0 <= extent.offset <= extent.offset + extent.nbytes <= size for extent in info.extents)


# ---- the index file --------------------------------------------------------------------------------------------------

INDEXES: dict[str, tuple[str, str]] = {
    "not json": ("{", "is damaged"),
    "a list": ("[]", "is damaged"),
    "no map": ('{"metadata": {}}', "is damaged"),
    "the map is a list": ('{"weight_map": ["a"]}', "is damaged"),
    "the map is null": ('{"weight_map": null}', "is damaged"),
    "a shard is null": ('{"weight_map": {"a": null}}', "is damaged"),
    "a shard is a number": ('{"weight_map": {"a": 1}}', "is damaged"),
    "a shard is a list": ('{"weight_map": {"a": []}}', "is damaged"),
    "shards of several kinds": ('{"weight_map": {"a": "s.safetensors", "b": 1}}', "is damaged"),
    "a missing shard": ('{"weight_map": {"a": "s.safetensors", "b": "t.safetensors"}}', "t.safetensors"),
    "a missing tensor": ('{"weight_map": {"a": "s.safetensors", "b": "s.safetensors"}}', "'b'"),
    "a path upwards": ('{"weight_map": {"a": "../outside.safetensors"}}', "outside.safetensors"),
    "a path down to nothing": ('{"weight_map": {"a": "below/gone.safetensors"}}', "gone.safetensors"),
    "a path down and up": ('{"weight_map": {"a": "below/../../outside.safetensors"}}', "outside"),
    "an absolute path": ('{"weight_map": {"a": "/etc/passwd"}}', "passwd"),
    "an empty name": ('{"weight_map": {"a": ""}}', ""),
    "a dot": ('{"weight_map": {"a": "."}}', ""),
    "a null byte": ('{"weight_map": {"a": "s\\u0000.safetensors"}}', ""),
    "a very long name": ('{"weight_map": {"a": "' + "x" * 5000 + '"}}', ""),
}


@pytest.mark.parametrize(("text", "named"), INDEXES.values(), ids=INDEXES)
def test_a_damaged_index_file_is_refused(tmp_path: Path, text: str, named: str) -> None:
    folder = tmp_path / "model"
    (folder / "below").mkdir(parents=True)
    for file in (folder / "s.safetensors", tmp_path / "outside.safetensors", folder / "below" / "inside.safetensors"):
        save_file({"a": torch.ones(2)}, file)
    (folder / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_index(folder)
    assert named in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_index_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_index(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors file"):
        read_index(tmp_path)


def test_two_files_with_one_tensor_are_refused(tmp_path: Path) -> None:
    for name in ("x.safetensors", "y.safetensors"):
        save_file({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"'a' is in both x\.safetensors and y\.safetensors"):
        read_index(tmp_path)


def test_a_file_cut_short_after_it_was_indexed_is_refused_when_it_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    info = read_index(tmp_path)["a"]
    os.truncate(path, 500)
    with pytest.raises(CheckpointError, match="shorter"):
        MappedFiles().tensor(info, torch.float32)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        MappedFiles().tensor(info, torch.float32)


@pytest.mark.parametrize("by", [1, 4])
def test_files_may_begin_their_tensors_anywhere(tiny_llama: Any, tmp_path: Path, by: int) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama(), folder)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    file.write_bytes((length + by).to_bytes(8, "little") + data[8 : 8 + length] + b" " * by + data[8 + length :])
    right = tiny_models.resident(folder)
    with AutoModel.from_pretrained(folder, device="cpu", dtype="float32") as model:
        assert torch.equal(model(tiny_models.IDS).logits, right(tiny_models.IDS).logits)
