"""Compressed models through the façade: 4-bit equals the library's own, 8-bit is close to plain, disks are safe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from airllm_nb import AutoModel
from airllm_nb.errors import CheckpointError, OptionError
from airllm_nb.intake.pointer import POINTER

PROMPT = [{"role": "user", "content": "Name three rivers in Europe."}]


def greedy(model, ids, tokens=16):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)


@pytest.fixture(scope="session")
def smollm2_4bit(smollm2_folder, tmp_path_factory):
    """A folder for the 4-bit store of the real model, and the store's own folder."""
    shards = tmp_path_factory.mktemp("shards")
    with AutoModel.from_pretrained(smollm2_folder, compression="4bit", layer_shards_saving_path=shards) as model:
        return shards, model.folder


@pytest.fixture(scope="session")
def library_4bit(smollm2_folder):
    """Ids, logits and text of the same checkpoint by transformers and bitsandbytes, computing on the plain packing.

    On some CPUs bitsandbytes repacks the weights for a kernel that rounds otherwise; what is compared is the format.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.bfloat16, quantization_config=config)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    ids = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return ids, model.eval()(ids).logits, greedy(model, ids)


@pytest.mark.parametrize("budgets", [{}, {"ram_budget": "70MiB"}, {"vram_budget": "200MiB", "ram_budget": "80MiB"}])
def test_4bit_equals_the_library(smollm2_folder, smollm2_4bit, library_4bit, budgets):
    shards, (ids, logits, tokens) = smollm2_4bit[0], library_4bit
    options = {"compression": "4bit", "layer_shards_saving_path": shards, "max_seq_len": 128, **budgets}
    with AutoModel.from_pretrained(smollm2_folder, **options) as model:
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(greedy(model, ids), tokens)


def test_4bit_moves_the_encoded_bytes(smollm2_folder, smollm2_4bit):
    shards, _ = smollm2_4bit
    options = {"compression": "4bit", "layer_shards_saving_path": shards, "ram_budget": "70MiB"}
    with AutoModel.from_pretrained(smollm2_folder, **options) as model:
        model(torch.tensor([[1, 2, 3]]))
        read = model.trace.totals["read"].nbytes
        model(torch.tensor([[1, 2, 3]]))
        streamed = model.plan.streamed_bytes
    # nf4 with float32 absmax takes 4.5 bits a value; SmolLM2's 30 layers have 106 million. What is read ahead into the
    # next sweep counts for either.
    assert 0.5 * streamed < read < 2 * streamed
    assert streamed < 106.2e6 * 4.5 / 8 + 57e6 + 30 * 4096


def test_8bit_is_within_one_percent(smollm2_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    with AutoModel.from_pretrained(
        smollm2_folder, compression="8bit", dtype="float32", layer_shards_saving_path=tmp_path
    ) as model:
        ids = model.tokenizer("The history of Europe is long, and", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = reference(ids).logits
        error = (model(ids).logits - expected).norm() / expected.norm()
    assert error < 0.01


def test_a_store_is_a_model_of_its_own(smollm2_4bit, smollm2_folder):
    _, store = smollm2_4bit
    with AutoModel.from_pretrained(store) as model:
        assert model._prepared.codec.compression == "4bit"
        assert "Paris" in model.answer([{"role": "user", "content": "What is the capital of France?"}]).text
    with pytest.raises(OptionError, match="8bit"):
        AutoModel.from_pretrained(store, compression="8bit")


def test_a_finished_store_is_not_written_again(tiny_llama, tmp_path):
    folder, seen = tiny_llama(), []
    for _ in range(2):
        AutoModel.from_pretrained(
            folder, compression="8bit", layer_shards_saving_path=tmp_path, progress=seen.append
        ).close()
        stages = {progress.stage for progress in seen}
        seen.clear()
    assert "convert" not in stages


def test_delete_original_deletes_after_verification_only(tiny_llama, tmp_path, monkeypatch):
    from airllm_nb.errors import StoreError
    from airllm_nb.store.manifest import Store

    # A copy: the fixture's folders are shared.
    folder = Path(shutil.copytree(tiny_llama(), tmp_path / "model"))
    weights = sorted(folder.glob("*.safetensors"))
    options = {"compression": "8bit", "layer_shards_saving_path": tmp_path / "shards", "delete_original": True}

    def damaged(*_):
        raise StoreError("a shard is not what was written")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "verify", damaged)
        with pytest.raises(StoreError):
            AutoModel.from_pretrained(folder, **options)
    assert all(path.exists() for path in weights)

    with AutoModel.from_pretrained(folder, **options | {"delete_original": False}) as model:
        expected = model(torch.tensor([[5, 6, 7]])).logits
    with AutoModel.from_pretrained(folder, **options) as model:
        assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, expected)
    assert not any(path.exists() for path in weights)
    assert (folder / "config.json").exists()
    assert (folder / POINTER).exists()
    with AutoModel.from_pretrained(folder, compression="8bit", layer_shards_saving_path=tmp_path / "shards") as model:
        assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, expected)


def test_delete_original_needs_compression(tiny_llama):
    with pytest.raises(OptionError, match="delete_original"):
        AutoModel.from_pretrained(tiny_llama(), delete_original=True)


def test_profiling_times_dequantisation(tiny_llama, tmp_path, caplog):
    caplog.set_level("INFO", logger="airllm_nb")
    with AutoModel.from_pretrained(
        tiny_llama(), compression="8bit", layer_shards_saving_path=tmp_path, profiling_mode=True, ram_budget="1MiB"
    ) as model:
        model(torch.tensor([[5, 6, 7]]))
        table = model.trace.table()
    assert model.trace.totals["dequantise"].seconds > 0
    assert all(stage in table for stage in ("read", "copy", "dequantise", "compute", "wait", "total"))
    assert table in caplog.text


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "jamba", "longcat_flash", "bloom"])
def test_what_is_read_without_a_call_stays_whole(model_type: str, tmp_path: Path) -> None:
    """Fused kernels and routers read a layer's matrix by themselves: an encoded one would be bytes to them."""
    import tiny_models

    native = tiny_models.save_tiny(model_type, tmp_path / "source").eval()
    with torch.inference_mode():
        exact = native(tiny_models.IDS).logits
    how = {"compression": "8bit", "layer_shards_saving_path": tmp_path / "store", "dtype": "float32"}
    with AutoModel.from_pretrained(tmp_path / "source", **how) as model:
        logits = model(tiny_models.IDS).logits
    assert torch.nn.functional.cosine_similarity(logits.flatten(), exact.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("compression", [None, "4bit", "8bit"])
def test_a_dtype_that_nothing_computes_with_is_named(tiny_llama, tmp_path, compression):
    """Whatever is done with the weights: here two values of 4 bits a byte."""
    folder = shutil.copytree(tiny_llama(), tmp_path / "model")
    name, file = "model.layers.1.mlp.up_proj.weight", folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    raw, entries = b"", {}
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        values = body[begin : end if key != name else begin + (end - begin) // 8]
        entries[key] = entry | {"data_offsets": [len(raw), len(raw) + len(values)]}
        raw += values
    entries[name]["dtype"] = "F4"
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is F4, which nothing here can compute with"):
        AutoModel.from_pretrained(folder, compression=compression, layer_shards_saving_path=tmp_path / "shards")
