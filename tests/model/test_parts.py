"""Checkpoints that hold more than a language model: text runs, the rest stays on disk until somebody needs it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_models import resident, streamed

from airllm_nb import AutoModel
from airllm_nb.errors import UnsupportedModelError
from airllm_nb.notebook.cards import model_card

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGE_TOKEN = 259


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma3")
    tiny_models.save_tiny("gemma3", folder)
    return folder


def test_what_sees_is_in_no_unit_and_said_to_be_left(gemma3: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "airllm_nb"), streamed(gemma3) as model:
        names = [binding.weight.name for unit in model._prepared.units for binding in unit.bindings]
        names += [weight.name for weight in model._prepared.small]
        assert any("language_model" in name for name in names)
        assert not any("vision" in name or "projector" in name for name in names)
        assert "left on disk  the vision part" in repr(model_card("m", model))
    (message,) = [record.getMessage() for record in caplog.records if "left on disk" in record.getMessage()]
    assert "model.vision_tower" in message
    assert "model.multi_modal_projector" in message


def test_an_image_is_seen_all_the_same(gemma3: Path) -> None:
    """Its weights are read when they are used."""
    ids = torch.tensor([[1, 70, *[IMAGE_TOKEN] * 4, 33, 60]])
    inputs = {"input_ids": ids, "pixel_values": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    native = resident(gemma3)
    with torch.inference_mode():
        expected, blind = native(**inputs).logits, native(input_ids=torch.where(ids == IMAGE_TOKEN, 5, ids)).logits
    assert not torch.allclose(expected[:, -1], blind[:, -1], atol=1e-3)
    with streamed(gemma3) as model:
        assert torch.equal(model(**inputs).logits, expected)
        # Nothing of it stays behind: text alone is what it was.
        with torch.inference_mode():
            text = native(input_ids=ids[:, :2]).logits
        assert torch.equal(model(ids[:, :2]).logits, text)


@pytest.mark.parametrize("model_type", ["llama4", "qwen3_5", "mllama"])
def test_weights_of_other_parts_are_said_to_be_left(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the class is of the text alone, the checkpoint's other names are nobody's."""
    tiny_models.save_tiny(model_type, tmp_path)
    with caplog.at_level(logging.INFO, "airllm_nb"), streamed(tmp_path):
        pass
    messages = [record.getMessage() for record in caplog.records if "left on disk" in record.getMessage()]
    assert any("vis" in message for message in messages)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("florence2", {"architectures": ["Florence2ForConditionalGeneration"], "is_encoder_decoder": True}),
        ("clip", {"architectures": ["CLIPModel"], "text_config": {}}),
        ("t5", {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}),
        ("pix2struct", {"architectures": ["Pix2StructForConditionalGeneration"], "text_config": {},
                        "is_encoder_decoder": True}),
    ],
)  # fmt: skip
def test_what_has_no_decoder_for_text_is_refused_by_name(model_type: str, config: dict, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    (tmp_path / "model.safetensors").write_bytes(b"never looked at")
    with pytest.raises(UnsupportedModelError, match=config["architectures"][0]):
        AutoModel.from_pretrained(tmp_path)
