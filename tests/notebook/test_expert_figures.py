"""The picture of a mixture's experts: what is dark, what is marked, what is written."""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from PIL import Image
from test_figures import assert_nothing_overlaps, boxes, texts

from airllm_nb.notebook.canvas import WIDTH, Picture
from airllm_nb.notebook.expert_figures import SHADES, _bins, _names, expert_map
from airllm_nb.routed import ExpertUse


def use_of(layers: int, experts: int, most: int = 40, cached: int | None = 3) -> ExpertUse:
    counts = np.random.default_rng(0).geometric(2 / (most + 2), (layers, experts)).clip(1, most + 1) - 1
    counts[1, 2] = most
    there = None if cached is None else frozenset(range(cached))
    asked = tuple(tuple(int(count) for count in row) for row in counts)
    hits = tuple(sum(row) // 2 for row in asked)
    return ExpertUse(tuple(f"model.layers.{n + 3}.mlp.experts" for n in range(layers)), asked, hits,
                     (there,) * layers, most)  # fmt: skip


def shades(picture: Picture) -> Any:
    (mesh,) = picture.figure.findobj(QuadMesh)
    return np.asarray(mesh.get_array())


@pytest.mark.parametrize(("layers", "experts"), [(2, 8), (32, 8), (48, 128), (61, 256)])
def test_each_expert_has_a_cell(layers: int, experts: int) -> None:
    use = use_of(layers, experts)
    picture = expert_map(use, "a model · 40 tokens")
    found, bins = shades(picture), _bins(40)
    assert found.shape == (layers, experts)
    for row, asked in zip(found, use.asked, strict=True):
        assert row.tolist() == [sum(count >= least for least in bins) for count in asked]
    assert found[1, 2] == found.max() == len(bins)
    (axes,) = picture.figure.axes
    marked = boxes(axes, "cached")
    assert len(marked) == 3 * layers
    assert sorted({round((left + right) / 2) for left, right in marked}) == [0, 1, 2]
    image = Image.open(io.BytesIO(picture.png()))
    assert image.width == 2 * WIDTH and image.height < 1400
    assert_nothing_overlaps(picture)


def test_layers_have_the_numbers_of_their_names_and_their_hits() -> None:
    written = texts(expert_map(use_of(4, 16)).figure)
    assert {"3", "4", "5", "6", "hits", "50%", "layer", "expert", "Experts"} <= set(written)
    assert "below it: cached now" in written and "never" in written


def test_layers_of_different_sizes() -> None:
    small = ExpertUse(("a", "b"), ((1, 2), (0, 3, 1, 1)), (1, 2), (None, None), 3)
    picture = expert_map(small)
    found = np.ma.masked_array(*[getattr(picture.figure.findobj(QuadMesh)[0].get_array(), name) for name in
                                 ("data", "mask")])  # fmt: skip
    assert found.mask.tolist() == [[False, False, True, True], [False] * 4]
    assert "cached now" not in picture.alt and "below it: cached now" not in texts(picture.figure)


def test_the_alt_text_has_the_numbers() -> None:
    use = ExpertUse(("layers.0.experts", "layers.1.experts"), ((5, 0, 1, 0), (0, 2, 7, 1)), (3, 5),
                    (frozenset({0, 2}), frozenset({2})), 9)  # fmt: skip
    assert expert_map(use, "model").alt == (
        "model: 2 layers of experts, up to 4 each, asked for 16 times, 50% were cached. Most often: expert 2 of "
        "layers.1.experts, in 7 of 9 sweeps. 3 of 8 were never asked for. 3 are cached now."
    )


@pytest.mark.parametrize("most", [1, 2, 5, 40, 10_000])
def test_shades_begin_where_they_say(most: int) -> None:
    bins, names = _bins(most), _names(_bins(most))
    assert bins[0] == 1 and bins == sorted(set(bins)) and bins[-1] <= most and len(names) == len(bins) + 1
    assert len(bins) < len(SHADES) and names[0] == "never" and names[-1] == f"{bins[-1]:,} times or more"


def test_a_large_one_is_drawn_in_no_time_and_again() -> None:
    use = use_of(61, 256)
    first = expert_map(use)
    start = time.perf_counter()
    again = expert_map(use, figure=first.figure)
    again.png()
    assert again.figure is first.figure and len(again.figure.axes) == 1
    assert time.perf_counter() - start < 10
