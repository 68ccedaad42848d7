"""Names that come with a model lead to files below its folder, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airllm_nb.checkpoint.inside import inside, is_inside
from airllm_nb.errors import CheckpointError

OUTSIDE = ["..", "../x", "a/../../x", "a/..", "/etc/passwd", "//host/x", "C:x", "C:/x", "c:\\x", "..\\x", "a\\x",
           "\\\\h", "", ".", "./", "/", "a\0b", "\ud800/x"]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: ascii(name)[:20])
def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "x").write_text("private")
    with pytest.raises(CheckpointError, match="points outside") as caught:
        inside(folder, name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", [None, 1, b"x", ["x"], Path("x")])
def test_what_is_no_name_is_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(TypeError):
        inside(tmp_path, name)  # type: ignore[arg-type]


def test_names_below_are_files_there(tmp_path: Path) -> None:
    assert inside(tmp_path, "model.safetensors") == tmp_path / "model.safetensors"
    assert inside(tmp_path, "./sub//x..y.bin") == tmp_path / "sub" / "x..y.bin"
    assert inside(Path("model"), "x") == Path("model/x")


def test_links(tmp_path: Path) -> None:
    """The folder may be one, and the file; a folder on the way only if it stays below."""
    folder, private = tmp_path / "model", tmp_path / "private"
    (folder / "sub").mkdir(parents=True)
    private.mkdir()
    (folder / "out").symlink_to(private)
    (folder / "up").symlink_to("..")
    (folder / "same").symlink_to("sub")
    (folder / "circle").symlink_to("circle")
    (folder / "weights").symlink_to(private / "weights")
    (tmp_path / "mine").symlink_to(folder)
    for root in (folder, tmp_path / "mine"):
        for name in ("weights", "same/x", "sub/x"):
            assert inside(root, name) == root / name
        for name in ("out/x", "up/x", "circle/x", "same/../up/x"):
            with pytest.raises(CheckpointError, match="points outside"):
                inside(root, name)


@given(st.text(st.sampled_from("a./\\:\0 C~\n"), max_size=12) | st.text(max_size=12))
def test_what_passes_stays_below(name: str) -> None:
    if is_inside(name):
        below = Path("/models/m")
        assert below in (below / name).parents and ".." not in Path(name).parts
