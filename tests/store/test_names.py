"""Names of stores: what is made is read again, and what others call their files is not ours."""

from __future__ import annotations

import pytest

from airllm_nb.store import names
from airllm_nb.store.names import ADAPTER, BESIDE, StoreName


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (StoreName("m", "4bit", "bfloat16", "0" * 8), "m--4bit--bfloat16--00000000"),
        (StoreName("a--b.c", BESIDE, "float32", "0123abcd"), "a--b.c--normalised--float32--0123abcd"),
        (StoreName("lora", ADAPTER, "", "f" * 16), f"lora--{'f' * 16}.safetensors"),
    ],
)
def test_a_name_that_is_made_is_read_again(name: StoreName, text: str) -> None:
    parse, other = (StoreName.parse_copy, StoreName.parse) if name.codec == ADAPTER else (
        StoreName.parse, StoreName.parse_copy)  # fmt: skip
    assert str(name) == text and parse(text) == name and other(text) is None


@pytest.mark.parametrize("text", ["m", "m--4bit", "m--4bit--int8--00000000", "m--4bit--bfloat16--0000000", "--4bit--"])
def test_others_names_are_not_ours(text: str) -> None:
    assert StoreName.parse(text) is None and StoreName.parse_copy(text) is None


def test_what_is_on_its_way_or_goes_is_known_by_what_it_was() -> None:
    assert names.final(names.temporary("config.json")) == "config.json" and names.final("config.json") is None
    assert names.is_unfinished(names.unfinished("layer-00001.safetensors"))
    assert not names.is_unfinished(names.unfinished("model.safetensors"))
    assert names.removed(names.removing("m--4bit")) == "m--4bit" and names.removed("m--4bit") is None
    assert names.is_partial(names.partial("made")) and not names.is_partial("made")
    for shard in (names.shard_name("lm_head.weight"), names.part_name(names.shard_name("a.3.weight"), 0),
                  names.carried_name(0, 2)):  # fmt: skip
        assert names.is_shard(f"{shard}.safetensors")
