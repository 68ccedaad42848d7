"""Pictures by their data: what is drawn, how long it is, what is written, and what the alt text says."""

from __future__ import annotations

import ctypes
import gc
import io
import itertools
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from fakes import FakeClock
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.text import Text
from PIL import Image
from test_timeline import pipeline, view_of

from airllm_nb.errors import OptionError
from airllm_nb.notebook import canvas
from airllm_nb.notebook.canvas import DPI, STYLE, WIDTH, Picture, text_width
from airllm_nb.notebook.memory_figures import MOST_SAMPLES, budget_parts, memory_parts, plan_bar, vram_timeline
from airllm_nb.notebook.sweep_figures import MOST_BARS, compare, lanes, overlap, thin
from airllm_nb.plan.experts import Experts
from airllm_nb.plan.placement import make_plan
from airllm_nb.plan.residency import Machine, Needs, UnitSize
from airllm_nb.timeline import last_sweep, union
from airllm_nb.trace import MemorySample, Trace

MiB, GiB = 1 << 20, 1 << 30
PLAN: Mapping[str, Any] = {
    "tiers": {"gpu": {"bytes": GiB, "units": 1}, "disk": {"bytes": GiB, "units": 9}}, "small_bytes": GiB // 4,
    "arena_bytes": GiB // 2, "vram_budget": 4 * GiB,
}  # fmt: skip


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def boxes(axes: Any, label: str, look: canvas.Look | None = None) -> list[tuple[float, float]]:
    """Left and right of what is drawn under a label, from left to right."""
    found = []
    for patch in axes.findobj(PathPatch):
        if patch.get_label() == label and (look is None or to_hex(patch.get_facecolor()) == look.face.lower()):
            corners = patch.get_path().vertices.reshape(-1, 5, 2)
            found += [(float(box[:, 0].min()), float(box[:, 0].max())) for box in corners]
    return sorted(found)


def length(found: list[tuple[float, float]]) -> float:
    return sum(right - left for left, right in found)


def assert_nothing_overlaps(picture: Picture) -> None:
    """No two texts cover each other, and none leaves the sheet."""
    drawn: list[Text] = []
    with pytest.MonkeyPatch.context() as patch, matplotlib.rc_context(STYLE):
        draw = Text.draw
        patch.setattr(Text, "draw", lambda text, renderer: (drawn.append(text), draw(text, renderer)))
        FigureCanvasAgg(picture.figure).draw()
        placed = [(text.get_text(), text.get_window_extent()) for text in drawn if text.get_text()]
    width, height = picture.figure.get_size_inches() * DPI
    for at, (name, box) in enumerate(placed):
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, name
        for other, against in placed[:at]:
            across = min(box.x1, against.x1) - max(box.x0, against.x0)
            down = min(box.y1, against.y1) - max(box.y0, against.y0)
            assert across <= 1 or down <= 3, (name, other)


def residency(has_device: bool = True, vram: int = 6 * GiB, ram: int = 12 * GiB, count: int = 80) -> Any:
    units = [UnitSize("embed", 400 * MiB, "embedding"), *(UnitSize(f"layers.{at}", 250 * MiB) for at in range(count))]
    machine = Machine(has_device, disk=2e9, link=2e10, memory=1e12)
    needs = Needs(small=50 * MiB, kv_cache=700 * MiB, activations=300 * MiB, scratch=100 * MiB)
    return make_plan(units, needs, machine, vram, ram)


def device_trace(count: int = 50) -> Trace:
    clock = FakeClock()
    trace = Trace(clock)
    trace.plan = PLAN
    for at in range(count):
        clock.seconds = at * 0.1
        cache = at * 10 * MiB
        busy = 300 * MiB if at == count // 2 else 0
        allocated = int(1.75 * GiB) + cache + 50 * MiB + busy
        trace.add_memory(MemorySample(trace.now(), allocated, allocated + 100 * MiB, 400 * MiB, cache, 600 * MiB))
    return trace


# ---- the plan


def test_a_plan_has_a_block_for_each_unit() -> None:
    plan = residency()
    picture = plan_bar(plan)
    weights, budget = picture.figure.axes
    at = 0.0
    for tier in ("gpu", "ram", "disk"):
        found = boxes(weights, tier)
        assert len(found) == plan.tiers.count(tier)
        assert length(found) == pytest.approx(plan.tier_bytes(tier) / GiB)
        assert found[0][0] == pytest.approx(at)
        at = found[-1][1]
    assert weights.get_xlim() == pytest.approx((0, at))
    assert weights.get_xlabel() == "GiB"
    assert budget.get_xlim()[1] == pytest.approx(6.0)
    parts = budget_parts(plan)
    assert sum(parts.values()) == plan.vram_budget
    for name, nbytes in parts.items():
        assert length(boxes(budget, name)) == pytest.approx(nbytes / GiB)
    assert "KV cache 700.0 MiB" in texts(picture.figure) and "KV cache 700.0 MiB" in picture.alt
    assert f"RAM {plan.tier_bytes('ram') / GiB:.1f} GiB ({plan.tiers.count('ram')} units)" in picture.alt
    assert f"{plan.sweep_seconds:.3g} s a token (disk-bound)" in picture.alt
    assert_nothing_overlaps(picture)


def test_a_plan_without_a_device_says_what_tiers_mean() -> None:
    plan = residency(has_device=False)
    picture = plan_bar(plan)
    assert len(picture.figure.axes) == 1
    assert "VRAM" not in picture.alt and "computed where it lies" in picture.alt and "read in each sweep" in picture.alt
    assert_nothing_overlaps(picture)


def test_a_plan_of_a_mixture_shows_the_cache_of_experts() -> None:
    blocks = [
        unit for at in range(24)
        for unit in (UnitSize(f"layers.{at}", 40 * MiB),
                     UnitSize(f"layers.{at}.experts", 512 * MiB, "experts", Experts(128, 8, 4 * MiB)))
    ]  # fmt: skip
    machine, needs = Machine(True, disk=2e9, link=2e10, memory=1e12), Needs(50 * MiB, 700 * MiB, 300 * MiB, 100 * MiB)
    plan = make_plan(blocks, needs, machine, 6 * GiB, 32 * GiB)
    picture = plan_bar(plan)
    parts, (_, budget) = budget_parts(plan), picture.figure.axes
    assert parts["experts"] == plan.slots_bytes > GiB and parts["staging"] == plan.staging_bytes > 0
    assert sum(parts.values()) == plan.vram_budget
    for name in ("experts", "staging"):
        assert length(boxes(budget, name)) == pytest.approx(parts[name] / GiB)
        assert any(text.startswith(f"{name} ") for text in texts(picture.figure)) and f"{name} " in picture.alt
    assert_nothing_overlaps(picture)
    used = memory_parts(MemorySample(0, 5 * GiB, 6 * GiB), plan.as_dict())
    assert (used["experts"], used["staging"]) == (parts["experts"], parts["staging"])
    assert "experts" not in budget_parts(residency())


def test_a_plan_of_many_units() -> None:
    picture = plan_bar(residency(count=700, ram=60 * GiB))
    assert sum(len(boxes(picture.figure.axes[0], tier)) for tier in ("gpu", "ram", "disk")) == 701
    assert len(picture.png()) < 80_000


# ---- memory


def test_memory_adds_up_and_is_never_negative() -> None:
    odd = [
        MemorySample(0, 3 * GiB, 4 * GiB, 100, 200, 300),
        MemorySample(0, 10, 5, 2 * GiB, 7, -5),
        MemorySample(0, 2 * GiB, 2 * GiB, 4 * GiB, 4 * GiB, 0),
        MemorySample(0, 0, 0),
    ]
    for plan in (PLAN, {}):
        for sample in odd:
            parts = memory_parts(sample, plan)
            assert min(parts.values()) >= 0
            assert sum(parts.values()) - parts["others"] == sample.reserved
    parts = memory_parts(device_trace().memory[10], PLAN)
    assert parts["weights"] == GiB + GiB // 4
    assert parts["slots"] + parts["idle slots"] == GiB // 2
    assert (parts["kv cache"], parts["activations"], parts["unused"]) == (100 * MiB, 50 * MiB, 100 * MiB)


def test_memory_is_stacked_under_the_budget() -> None:
    trace = device_trace()
    picture = vram_timeline(trace)
    axes = picture.figure.axes[0]
    layers = {area.get_label(): area.get_paths()[0].vertices for area in axes.collections}
    assert list(layers) == ["weights", "slots", "idle slots", "kv cache", "activations", "unused", "others"]
    assert layers["weights"][:, 1].max() == pytest.approx(1.25)
    peak = max(trace.memory, key=lambda sample: sample.reserved)
    assert layers["unused"][:, 1].max() == pytest.approx(peak.reserved / GiB)
    assert layers["others"][:, 1].max() == pytest.approx((peak.reserved + peak.others) / GiB)
    (budget,), (marker,) = (
        [line for line in axes.lines if (line.get_marker() == "v") is mark] for mark in (False, True)
    )
    assert set(budget.get_ydata()) == {4.0}
    assert marker.get_xydata().tolist() == [[peak.seconds, pytest.approx(peak.reserved / GiB)]]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("GiB", "seconds")
    assert f"peak {peak.reserved / GiB:.1f} GiB" in texts(picture.figure)
    assert "KV cache 490.0 MiB" in picture.alt and "The budget is 4.0 GiB." in picture.alt
    assert f"{peak.reserved / GiB:.1f} GiB after {peak.seconds:.3g} s" in picture.alt
    assert_nothing_overlaps(picture)


def test_without_a_device_it_is_the_process() -> None:
    trace = Trace(FakeClock())
    for at in range(5):
        trace.add_memory(MemorySample(float(at), at * GiB, at * GiB))
    for plan in ({}, {"vram_budget": None}, {"vram_budget": GiB}):  # the last one rehearses a GPU on a CPU
        trace.plan = plan
        picture = vram_timeline(trace)
        assert [area.get_label() for area in picture.figure.axes[0].collections] == ["process"]
        assert (
            any(text.startswith("Resident set of the process") for text in texts(picture.figure))
            and "VRAM" not in picture.alt
        )
        assert "now 4.0 GiB" in picture.alt
    assert_nothing_overlaps(picture)


def test_many_samples_keep_the_peak() -> None:
    trace = device_trace(2000)
    axes = vram_timeline(trace).figure.axes[0]
    points = axes.collections[0].get_paths()[0].vertices
    assert len(points) < 3 * MOST_SAMPLES
    assert axes.collections[-2].get_paths()[0].vertices[:, 1].max() == pytest.approx(trace.peak_bytes / GiB)


# ---- a sweep


@pytest.fixture(scope="module")
def busy() -> Any:
    """80 layers of 7 units, a third of them from disk."""
    return last_sweep(pipeline(560, 0.009, 0.002, 0.0004))


def test_lanes_are_drawn_as_long_as_they_took(busy: Any) -> None:
    picture = overlap(busy, "a title", PLAN)
    whole, close = picture.figure.axes
    for stage, name in canvas.LANE_NAMES.items():
        if stage in ("dequantise", "wait"):
            continue
        assert length(boxes(whole, name)) == pytest.approx(busy.busy[stage], rel=1e-6)
    assert length(boxes(whole, "compute waits")) == pytest.approx(sum(busy.waited.values()), rel=1e-6)
    assert length(boxes(whole, "compute waits", canvas.WAITS["read"])) == pytest.approx(busy.waited["read"], rel=1e-6)
    # The copy lane tells from which tier the bytes came.
    for tier in ("disk", "ram"):
        took = union([span for span in busy.lanes["copy"] if busy.tiers[span.unit] == tier])
        drawn = boxes(whole, "host to device", canvas.moved("copy", tier))
        assert length(drawn) == pytest.approx(sum(end - start for start, end in took), rel=1e-6)
    assert "dequantise" not in texts(picture.figure)
    assert whole.get_xlim() == pytest.approx((0, busy.seconds))
    assert 0 < close.get_xlim()[0] < close.get_xlim()[1] < busy.seconds
    assert len(boxes(close, "unit")) == 12
    assert close.get_xlabel() == "seconds since the sweep began"


def test_words_and_numbers_of_a_sweep(busy: Any) -> None:
    picture = overlap(busy, "a title", PLAN)
    shown = " ".join(texts(picture.figure))
    for text in (
        f"Overlap efficiency {busy.efficiency:.0%}", "Disk-bound:", "A larger --ram", "12 units from the middle",
    ):  # fmt: skip
        assert text in shown
    assert picture.alt.startswith(f"a title: {busy.seconds:.3g} s a sweep, overlap {busy.efficiency:.0%}, disk-bound.")
    for name, stage in (("disk read", "read"), ("host to device", "copy"), ("compute", "compute")):
        assert f"{name} {busy.busy[stage] / busy.seconds:.0%}" in picture.alt
    units = [text.split("\n") for text in texts(picture.figure) if re.fullmatch(r"\d+\nunit\d", text)]
    assert units, "no unit is named in the close-up"
    assert_nothing_overlaps(picture)


def test_long_names_of_units_do_not_collide() -> None:
    trace = pipeline(100, 0.001, 0.002, 0.0004)
    names = {unit: f"model.layers.{at}.a_very_long_name_of_a_projection_{at}" for at, unit in enumerate(trace.tiers)}
    other = Trace(FakeClock())
    for span in trace.spans:
        other.add(span.stage, names[span.unit], *span[2:5])
    other.end_sweep(*trace.windows[-1])
    assert_nothing_overlaps(overlap(last_sweep(other)))


def test_a_cpu_has_the_lanes_that_exist() -> None:
    spans = [("compute", f"layers.{at}", at * 0.001, at * 0.001 + 0.0009) for at in range(30)]
    picture = overlap(view_of(spans, (0, 0.03), {f"layers.{at}": "ram" for at in range(30)}))
    rows = {text for text in texts(picture.figure) if text in canvas.LANE_NAMES.values()}
    assert rows == {"compute"}
    assert "Nothing streams: compute-bound." in picture.alt and "Overlap" not in " ".join(texts(picture.figure))
    assert picture.figure.axes[0].get_xlim()[1] == pytest.approx(30)
    assert picture.figure.axes[1].get_xlabel() == "milliseconds since the sweep began"
    assert_nothing_overlaps(picture)


def test_a_sweep_that_runs_and_units_that_are_read_once() -> None:
    trace = Trace(FakeClock())
    trace.tiers = {f"layers.{at}": "ram" for at in range(9)}
    for at in range(9):
        trace.add("read", f"layers.{at}", at, at + 1, 1000)
        trace.add("compute", f"layers.{at}", at + 1, at + 1.5)
    picture = overlap(last_sweep(trace))
    assert "9.5 s so far" in picture.alt and "So far: " in picture.alt
    assert "read, then kept in RAM" in texts(picture.figure)


def test_thin_keeps_totals(busy: Any) -> None:
    spans, window = busy.lanes["compute"], (busy.start, busy.end)
    looks = [canvas.LANES["compute"], canvas.LANES["copy"]]
    bars = thin(spans, window, lambda span: looks[len(span.unit) % 2])
    assert len(bars) <= 2 * MOST_BARS < len(spans)
    for at, look in enumerate(looks):
        took = sum(span.end - span.start for span in spans if len(span.unit) % 2 == at)
        assert sum(bar.end - bar.start for bar in bars if bar.look == look) == pytest.approx(took)
    for before, after in itertools.pairwise(bars):
        assert before.end <= after.start + 1e-9
    assert window[0] <= bars[0].start and bars[-1].end <= window[1] + 1e-9
    assert len(thin(spans[:50], window, lambda span: looks[0])) == 50


def test_runs_are_compared_on_one_scale(busy: Any) -> None:
    slow = last_sweep(pipeline(200, 0.05, 0.01, 0.004, ahead=1))
    assert slow is not None
    picture = compare([busy, slow], ["prefetching on", "prefetching off"])
    first, second = picture.figure.axes
    assert first.get_xlim() == second.get_xlim() == pytest.approx((0, max(busy.seconds, slow.seconds)))
    assert max(right for _, right in boxes(first, "compute")) == pytest.approx(busy.seconds, rel=0.01)
    shown = texts(picture.figure)
    for view, title in ((busy, "prefetching on"), (slow, "prefetching off")):
        head = f"{view.seconds:.3g} s a sweep, overlap {view.efficiency:.0%}, {view.bound_by}-bound"
        assert title in shown and head in shown and f"{title}: {head}" in picture.alt
    assert_nothing_overlaps(picture)


# ---- every picture


def test_empty_data_says_so(tmp_path: Path) -> None:
    for picture, said in (
        (overlap(None), "No sweep"),
        (compare([None], ["x"]), "No sweep"),
        (vram_timeline(Trace()), "No memory"),
        (overlap(view_of([], (0, 1))), "Nothing streams"),
    ):
        assert said in picture.alt and said in texts(picture.figure)[0]
        assert picture.png().startswith(b"\x89PNG")


def test_a_png_is_small_wide_white_and_described(busy: Any) -> None:
    for picture in (overlap(busy, "x", PLAN), vram_timeline(device_trace()), plan_bar(residency()),
                    compare([busy, busy], "ab")):  # fmt: skip
        data = picture.png()
        image = Image.open(io.BytesIO(data))
        assert image.width == 2 * WIDTH and len(data) < 85_000
        assert image.text["Description"] == picture.alt  # type: ignore[attr-defined]
        pixels = np.asarray(image.convert("RGB"))
        assert (pixels[0, 0] == 255).all() and (pixels[-1, -1] == 255).all()
        assert 0.03 < (pixels < 250).any(axis=2).mean() < 0.9
        assert Image.open(io.BytesIO(picture.png(scale=1))).width == WIDTH


def test_pictures_are_saved(tmp_path: Path, busy: Any) -> None:
    picture = overlap(busy)
    assert picture.save(tmp_path / "a.png").read_bytes() == picture.png()
    svg = picture.save(str(tmp_path / "a.svg")).read_text()
    assert "<svg" in svg and picture.alt.replace("&", "&amp;") in svg
    with pytest.raises(OptionError, match=r"a\.pdf"):
        picture.save(tmp_path / "a.pdf")


def test_a_figure_is_drawn_again(busy: Any) -> None:
    small = last_sweep(pipeline(30, 0.009, 0.002, 0.0004))
    first = overlap(busy, "first")
    again = overlap(small, "again", figure=first.figure)
    assert again.figure is first.figure
    assert again.png() == overlap(small, "again").png()
    assert vram_timeline(device_trace(), figure=again.figure).png() == vram_timeline(device_trace()).png()


def test_a_style_of_the_user_changes_nothing(busy: Any) -> None:
    plain = overlap(busy, "x").png()
    wild = {"axes.facecolor": "black", "text.color": "white", "font.size": 30, "axes.grid": True, "hatch.linewidth": 5,
            "savefig.facecolor": "black", "axes.spines.top": True, "lines.linewidth": 9}  # fmt: skip
    with matplotlib.rc_context(wild):
        assert overlap(busy, "x").png() == plain


@pytest.mark.slow
def test_redrawing_is_fast_and_leaks_nothing(busy: Any) -> None:
    trace, picture, memory = device_trace(), overlap(busy), vram_timeline(device_trace())
    times = []

    def redraw(count: int) -> None:
        nonlocal picture, memory
        for _ in range(count):
            start = time.thread_time()
            picture = overlap(busy, "x", PLAN, picture.figure)
            memory = vram_timeline(trace, memory.figure)
            times.append(time.thread_time() - start)

    def used() -> tuple[int, int]:
        picture.png(), memory.png()
        gc.collect()
        if sys.platform == "linux":  # what is free but kept is no leak, and other tests of this process leave much
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(gc.get_objects())

    samples = []
    for _ in range(10):
        redraw(10)
        samples.append(used())
    # What leaks grows every time; a step in one of them is the allocator's or another test's.
    grown = [min(later[i] - earlier[i] for earlier, later in itertools.pairwise(samples)) for i in (0, 1)]
    assert grown[0] < 16 * MiB, "each of ten redraws has 8 MB of pixels"
    assert grown[1] < 500, "each of ten figures has hundreds of objects"
    assert min(times) < 0.5, "two pictures take 40 ms on a quiet machine"


def test_a_picture_keeps_no_pixels(busy: Any) -> None:
    picture = overlap(busy)
    picture.png()
    assert not hasattr(picture.figure.canvas, "renderer")


def test_drawing_while_another_thread_writes() -> None:
    trace, stop = pipeline(60, 0.003, 0.001, 0.0005), threading.Event()
    trace.plan = PLAN

    def write() -> None:
        at = trace.windows[-1][1]
        while not stop.is_set():
            for unit in trace.tiers:
                trace.add("read", unit, at, at + 0.5, 10)
                trace.add("compute", unit, at + 0.5, at + 1)
                at += 1
            trace.end_sweep(at - 60, at)
            trace.add_memory(MemorySample(at, GiB, 2 * GiB, 0, 0, 10))
            time.sleep(0.0005)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(10):
                assert "s a sweep" in overlap(last_sweep(trace)).alt
                assert vram_timeline(trace).alt
    finally:
        stop.set()
        thread.join(60)


def test_looks_differ_without_colour() -> None:
    def grey(look: canvas.Look) -> float:
        red, green, blue = (int(look.face[at : at + 2], 16) / 255 for at in (1, 3, 5))
        return 0.21 * red + 0.72 * green + 0.07 * blue

    def alike(one: canvas.Look, other: canvas.Look) -> bool:
        return one.hatch == other.hatch and abs(grey(one) - grey(other)) < 0.08

    neighbours = [
        list(canvas.TIERS.values()), list(canvas.WAITS.values()),
        [look for name, look in canvas.PARTS.items() if name not in ("scratch", "free", "process")],
        [canvas.PARTS[name] for name in ("weights", "slots", "kv cache", "activations", "scratch", "free")],
        list(canvas.LANES.values()),
    ]  # fmt: skip
    for looks in neighbours:
        for at, look in enumerate(looks):
            assert not any(alike(look, other) for other in looks[:at]), look


def test_widths_are_measured() -> None:
    assert text_width("mmmm") > 3 * text_width("ll") > 0
    assert text_width("mm", 20) == pytest.approx(2 * text_width("mm", 10), rel=0.1)


def test_lanes_give_bytes_a_second() -> None:
    rows = {lane.name: lane for lane in lanes(view_of([("read", "a", 0, 2, 4_000_000_000)], (0, 4)))}
    assert rows["disk read"].rate == 2e9 and rows["disk read"].share == 0.5
    assert "disk read 50% at 2.0 GB/s" in overlap(view_of([("read", "a", 0, 2, 4_000_000_000)], (0, 4))).alt
    assert "disk read 50% at 20 MB/s" in overlap(view_of([("read", "a", 0, 2, 40_000_000)], (0, 4))).alt


def test_pyplot_is_never_imported() -> None:
    code = (
        "import sys; from airllm_nb.notebook.memory_figures import vram_timeline; from airllm_nb.trace import Trace;"
        "from airllm_nb.notebook.sweep_figures import overlap;"
        "vram_timeline(Trace()).png(); overlap(None).png(); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
