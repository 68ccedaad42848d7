"""AirLLM's own README example and parameters, with only the import changed."""

from __future__ import annotations

import logging

import pytest
import torch

from airllm_nb import AutoModel
from airllm_nb.errors import OptionError


def test_the_readme_example_of_the_peer_runs(smollm2_folder):
    MAX_LENGTH = 128
    model = AutoModel.from_pretrained(str(smollm2_folder))

    input_text = [
        "What is the capital of United States?",
    ]

    input_tokens = model.tokenizer(
        input_text,
        return_tensors="pt",
        return_attention_mask=False,
        truncation=True,
        max_length=MAX_LENGTH,
        padding=False,
    )

    ids = input_tokens["input_ids"]
    generation_output = model.generate(
        ids.cuda() if torch.cuda.is_available() else ids,
        max_new_tokens=20,
        use_cache=True,
        return_dict_in_generate=True,
    )

    output = model.tokenizer.decode(generation_output.sequences[0])
    assert output.startswith("What is the capital of United States?")
    model.close()


@pytest.mark.parametrize(
    "options",
    [
        {"compression": None},
        {"compression": "8bit"},
        {"profiling_mode": True},
        {"hf_token": "hf_notused"},
        {"prefetching": False},
        {"device": "cpu"},
        {"dtype": torch.float32},
        {"dtype": "float16"},
        {"max_seq_len": 64},
        {"delete_original": False},
        {"trust_remote_code": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_parameter_of_the_peer_is_accepted(tiny_llama, tmp_path, options):
    with AutoModel.from_pretrained(tiny_llama(), layer_shards_saving_path=tmp_path, **options) as model:
        out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert out.shape == (1, 7)
        if "dtype" in options:
            assert str(options["dtype"]) in str(model.dtype)


def test_a_token_is_never_shown(tiny_llama, caplog):
    caplog.set_level(logging.DEBUG)
    with AutoModel.from_pretrained(tiny_llama(), hf_token="hf_secret") as model:
        assert "hf_secret" not in repr(model) + repr(model.options) + str(model.status()) + caplog.text


def test_an_unknown_option_names_the_nearest(tiny_llama):
    with pytest.raises(OptionError, match="did you mean 'compression'"):
        AutoModel.from_pretrained(tiny_llama(), compresion="4bit")


def test_a_local_folder_is_only_read(tiny_llama):
    """Nothing is written beside the checkpoint: read-only folders work."""
    folder = tiny_llama()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    folder.chmod(0o555)
    try:
        with AutoModel.from_pretrained(folder, ram_budget="1MiB") as model:
            model(torch.tensor([[5, 6, 7]]))
    finally:
        folder.chmod(0o755)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_auto_model_is_not_made_directly():
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoModel()
