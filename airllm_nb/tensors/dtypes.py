"""The dtypes of files, by the names that safetensors has for them, and torch's own."""

from __future__ import annotations

import torch

from ..errors import CheckpointError
from .index import TensorInfo

TORCH_DTYPES = {
    "F8_E8M0": torch.uint8,  # powers of two, as their exponents: older versions of torch have no dtype for them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# Of floating point, and of more than a byte: what such a matrix may be cast from.
CASTABLE = ("F64", "F32", "F16", "BF16")


def torch_dtype(info: TensorInfo) -> torch.dtype:
    """What a tensor that is needed is read as; one that nobody needs may be of any dtype.

    Raises
    ------
    CheckpointError
        If there is no such dtype in torch.
    """
    if info.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"{info.extents[0].path}: {info.name} is {info.dtype}, which nothing here can compute "
                              "with; get the checkpoint in another dtype, such as bfloat16")  # fmt: skip
    return TORCH_DTYPES[info.dtype]
