"""A cache that was cut back, reused or offloaded gives what a fresh one gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from airllm_nb import AutoModel
from airllm_nb.decode.cache import Cache
from airllm_nb.errors import OptionError

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


def test_cut_back_to_what_prompts_share_it_gives_what_a_fresh_one_gives(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama(dtype="float32", eos_token_id=None)
    other = torch.tensor([[5, 6, 7, 8, 99, 98, 97]])
    native = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    expected = native.generate(other, max_new_tokens=5, do_sample=False)
    with AutoModel.from_pretrained(folder, dtype="float32", max_seq_len=64, vram_budget="8MiB") as model:
        cache = Cache.make(model.native)
        assert cache.length == 0
        first = model.generate(IDS, max_new_tokens=4, do_sample=False, past_key_values=cache.held)
        assert cache.length == first.shape[1] - 1 == Cache.given({"past_key_values": cache.held}).length
        assert cache.reuse(first[0].tolist(), other[0].tolist()) == 4 == cache.length
        again = model.generate(other, max_new_tokens=5, do_sample=False, past_key_values=cache.held)
    assert again.equal(expected)


def test_the_whole_prompt_is_never_served_as_a_forward_needs_a_token(tiny_llama: Callable[..., Path]) -> None:
    native = AutoModelForCausalLM.from_pretrained(tiny_llama(dtype="float32")).eval()
    for wanted, served in ((IDS[0].tolist(), 7), ([5], 0), ([], 0), ([1, 2], 0), ([*IDS[0].tolist(), 3, 4], 8)):
        cache = Cache.make(native)
        native(IDS, past_key_values=cache.held)
        assert cache.reuse(IDS[0].tolist(), wanted) == served == cache.length


@pytest.mark.parametrize("surplus", [0, 1, 5])
def test_what_cannot_be_cut_is_left_as_it_is(tiny_llama: Callable[..., Path], surplus: int) -> None:
    native = AutoModelForCausalLM.from_pretrained(tiny_llama(dtype="float32")).eval()
    cache = Cache(DynamicCache(config=native.config))
    native(IDS, past_key_values=cache.held)
    cache.held.layers[0].sliding_window = 4  # it has moved on by now
    assert cache.crop(8 - surplus) is (surplus == 0)
    assert cache.length == 8 and not cache.crop(9), "nor is it longer than it is"
    cache.held.layers[0].sliding_window = None
    cache.held.layers[0].recurrent_states = torch.zeros(1)
    assert cache.crop(8 - surplus) is (surplus == 0)
    assert not Cache(SimpleNamespace(get_seq_length=lambda: 8)).crop(4), "nobody knows what it is"


def test_none_is_empty_and_another_kind_is_refused(tiny_llama: Callable[..., Path]) -> None:
    assert Cache().length == Cache.given({}).length == 0
    assert Cache().crop(0) and not Cache().crop(1)
    config = SimpleNamespace(model_type="mamba")
    with pytest.raises(OptionError, match="architecture mamba has a cache of its own kind"):
        Cache.make(SimpleNamespace(config=config, _supports_default_dynamic_cache=lambda: False))


def test_offloaded_is_how_transformers_offloads(tiny_llama: Callable[..., Path]) -> None:
    native = AutoModelForCausalLM.from_pretrained(tiny_llama(dtype="float32")).eval()
    assert Cache.make(native, offloaded=True).held.offloading and not Cache.make(native).held.offloading
