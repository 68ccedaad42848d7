"""Which experts tokens are routed to, where somebody else than the router says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from airllm_nb.bench import bench_model, bench_open, bench_synthetic, synthetic_model
from airllm_nb.bench.routing import ROUTINGS, Routing, routes
from airllm_nb.config import LoadOptions
from airllm_nb.decode.made_of import has_foreign_hooks
from airllm_nb.engine.facade import StreamedModel, open_model
from airllm_nb.errors import OptionError
from airllm_nb.flags import MEASURING
from airllm_nb.stream.lru import LRU

LAYERS, EXPERTS, EACH = 2, 16, 4


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AIRLLM_NB_CACHE", str(tmp_path))
    return synthetic_model("small-moe", LAYERS)


def asked(model: StreamedModel) -> list[torch.Tensor]:
    """What the experts of the first layer are asked for, forward by forward, as it comes."""
    found: list[torch.Tensor] = []
    experts = next(module for module in model.modules() if hasattr(module, "is_transposed"))
    experts.register_forward_pre_hook(lambda _, args: found.append(args[1].clone()))
    return found


@pytest.mark.parametrize("name", ROUTINGS)
def test_no_token_has_an_expert_twice(name: str) -> None:
    ids = routes(50, 3, 8, 4, ROUTINGS[name])
    assert ids.shape == (50, 3, 4) and ids.min() >= 0 and ids.max() < 8
    assert all(len(set(row.tolist())) == 4 for row in ids.flatten(0, 1))
    assert torch.equal(ids, routes(50, 3, 8, 4, ROUTINGS[name]))
    assert not torch.equal(ids, routes(50, 3, 8, 4, ROUTINGS[name], seed=1))


def hits(name: str, slots: int) -> float:
    """The share of 400 tokens' experts, 8 of 128, that a cache of the least recently used has."""
    found, cache = 0, LRU(128, slots)
    ids = routes(432, 1, 128, 8, ROUTINGS[name])[:, 0].tolist()
    for number, row in enumerate(ids):
        found += sum(expert in cache.cached for expert in row) if number >= 32 else 0
        cache.ensure(row)
    return found / (400 * 8)


@pytest.mark.parametrize(
    ("name", "slots", "share"),
    [("uniform", 23, 0.18), ("uniform", 50, 0.39), ("local", 23, 0.40), ("local", 50, 0.62), ("local", 93, 0.86)],
)
def test_a_cache_has_the_hits_that_are_said(name: str, slots: int, share: float) -> None:
    assert hits(name, slots) == pytest.approx(share, abs=0.04)


def test_tokens_are_sent_where_it_says_and_the_prompt_is_not(mixture: Path) -> None:
    with open_model(mixture, LoadOptions(device="cpu")) as model:
        bench_open(model, sweeps=1)
        seen = asked(model)
        result = bench_open(model, sweeps=5, batch=3, routing="local")
        assert result.same_tokens and result.routing == "local"
        prompt, *steps = seen[6:]
        assert [tuple(ids.shape) for ids in steps] == [(3, EACH)] * 5 and len(prompt) == 3 * 16
        for sequence in range(3):
            wanted = routes(5, LAYERS, EXPERTS, EACH, ROUTINGS["local"], seed=sequence)
            assert torch.equal(torch.stack(steps)[:, sequence], wanted[:, 0])
        # Afterwards the routers choose again.
        seen.clear()
        bench_open(model, sweeps=5)
        assert not torch.equal(seen[-1], steps[-1][:1])


def test_the_buffer_stays_where_it_is(mixture: Path) -> None:
    with open_model(mixture, LoadOptions(device="cpu")) as model:
        seen: list[int] = []
        experts = next(module for module in model.modules() if hasattr(module, "is_transposed"))
        with Routing(model, "uniform", 1, 4) as routing:
            assert not has_foreign_hooks(model), "steps may be recorded"
            experts.register_forward_pre_hook(lambda _, args: seen.append(args[1].data_ptr()))
            for _ in range(4):
                routing.step()
                model(torch.tensor([[5]]))
    assert len(set(seen)) == 1


def test_what_has_no_experts_is_refused(mixture: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="has no experts whose routing"):
        bench_model(synthetic_model("small-qwen", 1), routing="local")
    with pytest.raises(OptionError, match="use uniform or local"):
        bench_model(mixture, routing="even")


def test_a_dense_shape_is_refused_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRLLM_NB_CACHE", str(tmp_path))
    with pytest.raises(OptionError, match="small-qwen has no experts"):
        bench_synthetic("small-qwen", 1, routing="local")
    assert not list(tmp_path.iterdir())


def test_the_flag_has_all_names() -> None:
    (flag,) = [flag for flag in MEASURING if flag.dest == "routing"]
    assert flag.how["choices"] == list(ROUTINGS)


def test_what_moves_is_what_was_missed(mixture: Path) -> None:
    options = LoadOptions.create(device="cpu", vram_budget="6MiB", max_seq_len=64)
    result = bench_model(mixture, options, routing="uniform", sweeps=12)
    assert result.experts is not None and result.same_tokens
    assert result.experts["asked"] == LAYERS * EACH and 0 < result.experts["hit_rate"] < 0.9
    missed = result.experts["moved"] * result.experts["expert_bytes"]
    assert result.experts["moved_bytes"] == pytest.approx(missed) and result.experts["prompt_bytes"] > 0
    assert result.links["link"]["bytes"] == result.experts["bytes"] >= result.experts["moved_bytes"]
    assert "expert hits" in dict(result.rows)["experts"]
    # With locality more of them are there.
    local = bench_model(mixture, options, routing="local", sweeps=12).experts
    assert local is not None and local["hit_rate"] > result.experts["hit_rate"]
