"""How products of fp32 tensors are taken on tensor cores. Begin with dot_precision."""

import torch


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's `input_precision` for a product of two tensors of this dtype; 16-bit dtypes do not look at it.

    fp32 follows `torch.set_float32_matmul_precision`: "highest" is three tf32 products, whose error is fp32's own.
    """
    exact = dtype is torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if exact else "tf32"
