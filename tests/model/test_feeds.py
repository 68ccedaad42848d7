"""How a unit gets its weights: what is taken for it is given back, also where that is interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from airllm_nb import AutoModel
from airllm_nb.model import executor, feeds

STREAMED: dict[str, Any] = {"dtype": "float32", "vram_budget": "1MiB", "ram_budget": "1MiB", "max_seq_len": 16}


@pytest.mark.parametrize("where", ["Prefetcher", "_typed_view", "after"])
def test_an_interrupt_while_memory_is_taken_leaves_none(
    where: str, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    closed: list[Any] = []

    class Memory(feeds.StreamMemory):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            made.append(self)

        def close(self) -> None:
            closed.append(self)
            super().close()

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with AutoModel.from_pretrained(tiny_llama(num_hidden_layers=12), **STREAMED) as model:
        with monkeypatch.context() as patch:
            patch.setattr(feeds, "StreamMemory", Memory)
            if where == "after":
                patch.setattr(executor.Executor, "_feed_tables", lambda *_: None)
                patch.setattr(executor, "UnitHooks", interrupt)
            else:
                patch.setattr(feeds, where, interrupt)
            with pytest.raises(KeyboardInterrupt):
                AutoModel.from_pretrained(tiny_llama(num_hidden_layers=12), **STREAMED)
        assert len(made) == 1 and closed and set(map(id, closed)) == {id(made[0])}
        assert model(torch.tensor([[1, 5, 9]])).logits.isfinite().all()
