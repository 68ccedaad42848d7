"""Every GGUF type that the gguf package can dequantise, unpacked to the same values."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from airllm_nb.encoding import base, ggml, ggml_blocks, ggml_codebooks
from airllm_nb.encoding.ggml import encoding_of, packed_row_bytes
from airllm_nb.encoding.kernels import launch

Kind = gguf.GGMLQuantizationType
PLAIN = {Kind.F32, Kind.F16, Kind.BF16}
# where each block has its float16 numbers; the types that are missing here have none in one place
FLOATS = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "IQ2_XXS": (0,), "IQ2_XS": (0,),
    "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
COLUMNS = 768
MODULES = ggml, ggml_blocks, ggml_codebooks
TABLES = {value for module in MODULES for value in vars(module).values() if hasattr(value, "cache_clear")}


def can(work, kind: Kind) -> bool:
    """Whether the library has this function (``quantize``, ``dequantize``) for a type."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        work(np.zeros((1, nbytes), np.uint8) if work is gguf.dequantize else np.ones((1, block), np.float32), kind)
    except NotImplementedError:
        return False
    return True


KINDS = [kind for kind in Kind if kind not in PLAIN and can(gguf.dequantize, kind)]
MADE = [kind for kind in KINDS if can(gguf.quantize, kind)]
every_type = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def random_rows(kind: Kind, rows: int, columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    """Random bytes, but for the floating-point numbers among them, which are ordinary ones of both signs."""
    random = np.random.default_rng(seed)
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (rows * columns // block, nbytes), np.uint8)
    for at in FLOATS.get(kind.name, ()):
        numbers = random.uniform(1e-3, 0.1, len(blocks)) * random.choice((-1, 1), len(blocks))
        blocks[:, at : at + 2] = numbers.astype(np.float16)[:, None].view(np.uint8)
    if kind.name == "MXFP4":
        blocks[:, 0] = random.integers(110, 136, len(blocks))
    if kind.name == "IQ1_M":  # the sign and three bits of the exponent
        blocks[:, 55] = blocks[:, 55] & 0x0F | 0x20
    return torch.from_numpy(blocks.reshape(rows, -1))


def reference(kind: Kind, weight: torch.Tensor) -> torch.Tensor:
    values = torch.from_numpy(gguf.dequantize(weight.numpy(), kind))
    assert values.isfinite().all()
    return values


def unpacked(kind: Kind, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    found = encoding_of(int(kind))
    assert found is not None
    found.unpack({"weight": weight}, out)
    return out


def new(rows: int, dtype: torch.dtype = torch.float32, columns: int = COLUMNS) -> torch.Tensor:
    return torch.full((rows, columns), torch.nan, dtype=dtype)


def assert_close(kind: Kind, values: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within 1e-6 of the largest value of each block."""
    block = gguf.GGML_QUANT_SIZES[kind][0]
    error = (values - wanted).abs().unflatten(1, (-1, block)).amax(-1)
    assert (error <= 1e-6 * wanted.abs().unflatten(1, (-1, block)).amax(-1)).all()


def test_all_types_of_the_library_are_there() -> None:
    assert {kind for kind in Kind if encoding_of(int(kind)) is not None} == set(KINDS)
    assert encoding_of(9999) is None
    for kind in KINDS:
        found = encoding_of(int(kind))
        assert found.name == kind.name
        assert found.row_steps(256) == {"weight": 1}
    assert len({encoding_of(int(kind)) for kind in KINDS}) == len(KINDS)  # hashable, and no two are equal
    assert len(MADE) >= 7


@every_type
def test_values_are_the_librarys(kind: Kind) -> None:
    weight = random_rows(kind, rows=5)
    before, wanted = weight.clone(), reference(kind, weight)
    assert wanted.unique().numel() > 20
    assert_close(kind, unpacked(kind, weight, new(5)), wanted)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(unpacked(kind, weight, new(5, dtype)), wanted.to(dtype))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.name)
def test_what_the_library_quantised(kind: Kind) -> None:
    values = torch.randn(6, COLUMNS, generator=torch.Generator().manual_seed(1))
    values[1] = 0
    values[2] *= 1e-6
    weight = torch.from_numpy(gguf.quantize(values.numpy(), kind))
    out = unpacked(kind, weight, new(6))
    assert_close(kind, out, reference(kind, weight))
    assert torch.corrcoef(torch.stack((out[3:].flatten(), values[3:].flatten())))[0, 1] > 0.6


@every_type
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_may_have_strides(kind: Kind, dtype: torch.dtype) -> None:
    weight = random_rows(kind, rows=5)
    plain = unpacked(kind, weight, new(5, dtype))
    assert torch.equal(unpacked(kind, weight, new(COLUMNS, dtype, columns=5).t()), plain)
    wide = new(9, dtype, columns=COLUMNS + 40)
    unpacked(kind, weight, wide[2:7, 8 : 8 + COLUMNS])
    assert torch.equal(wide[2:7, 8 : 8 + COLUMNS], plain)
    assert wide.isnan().sum() == wide.numel() - plain.numel()


@every_type
@pytest.mark.parametrize("values", [1, COLUMNS * 3, COLUMNS * 8, COLUMNS * 12])
def test_chunks_meet(kind: Kind, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_rows(kind, rows=7)
    whole = unpacked(kind, weight, new(7, torch.bfloat16))
    monkeypatch.setattr(base, "HOST_VALUES", values)
    assert torch.equal(unpacked(kind, weight, new(7, torch.bfloat16)), whole)


@every_type
def test_some_rows_one_block_or_none(kind: Kind) -> None:
    weight = random_rows(kind, rows=7)
    wanted = unpacked(kind, weight, new(7))
    assert torch.equal(unpacked(kind, weight[2:5], new(3)), wanted[2:5])
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    one = unpacked(kind, weight[:1, nbytes : 2 * nbytes], new(1, columns=block))
    assert torch.equal(one, wanted[:1, block : 2 * block])
    assert unpacked(kind, weight[:0], new(0)).shape == (0, COLUMNS)
    assert unpacked(kind, weight[:, :0], new(7, columns=0)).shape == (7, 0)


@every_type
def test_bytes_at_an_odd_address(kind: Kind) -> None:
    weight = random_rows(kind, rows=3)
    buffer = torch.empty(weight.numel() + 1, dtype=torch.uint8)
    buffer[1:] = weight.flatten()
    odd = buffer[1:].view(weight.shape)
    assert torch.equal(unpacked(kind, odd, new(3)), unpacked(kind, weight, new(3)))


@every_type
def test_defaults_of_torch_do_not_matter(kind: Kind) -> None:
    weight, out = random_rows(kind, rows=3), new(3)
    for table in TABLES:
        table.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        torch.set_default_dtype(torch.float16)
        try:
            unpacked(kind, weight, out)
        finally:
            torch.set_default_dtype(torch.float32)
    assert_close(kind, out, reference(kind, weight))
    assert_close(kind, unpacked(kind, weight, new(3)), reference(kind, weight))


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return result


@every_type
def test_temporaries_are_those_of_a_chunk(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "HOST_VALUES", COLUMNS * 16)
    weight, out = random_rows(kind, rows=256), new(256, torch.bfloat16)
    unpacked(kind, weight, out)  # makes the tables, which stay
    with Largest() as largest:
        unpacked(kind, weight, out)
    assert 0 < largest.nbytes <= 4 * COLUMNS * 16


def test_bytes_of_a_row() -> None:
    for kind in KINDS:
        (nbytes,) = gguf.quant_shape_to_byte_shape((COLUMNS,), kind)
        assert packed_row_bytes(int(kind), COLUMNS) == nbytes
    assert packed_row_bytes(Kind.Q4_K, 0) == 0
    with pytest.raises(ValueError, match=r"800 values.*Q4_K, packed in blocks of 256"):
        packed_row_bytes(int(Kind.Q4_K), 800)
    for kind in PLAIN:
        with pytest.raises(ValueError, match="not packed"):
            packed_row_bytes(int(kind), 256)


@pytest.mark.gpu
@pytest.mark.parametrize("has_kernels", [True, False])
@every_type
def test_values_on_a_gpu(kind: Kind, has_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.usable(torch.device("cuda"))
    if not has_kernels:
        monkeypatch.setattr(launch, "usable", lambda device: False)
    weight = random_rows(kind, rows=33, columns=4096)
    wanted = reference(kind, weight)
    monkeypatch.setattr(base, "DEVICE_BYTES", int(4096 * 12 * encoding_of(int(kind)).spare))
    for shape, order in (((33, 4096), (0, 1)), ((4096, 33), (1, 0))):
        out = torch.full(shape, torch.nan, device="cuda").permute(order)
        assert_close(kind, unpacked(kind, weight.cuda(), out).cpu(), wanted)
    for dtype, epsilon in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        out = unpacked(kind, weight.cuda(), torch.full((33, 4096), torch.nan, dtype=dtype, device="cuda")).cpu()
        assert torch.allclose(out.float(), wanted, rtol=1.01 * epsilon, atol=1e-6 * float(wanted.abs().max()))
    assert not launch._failed
