"""What torch tensors must be for a call: errors name the argument, its shape and what is wrong."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._tensors import BF16, F16, F32, F64, LAYOUTS, check_layout

#: The types of numbers that are served, as the compiled half counts them.
CODES = {torch.float32: F32, torch.float64: F64, torch.float16: F16, torch.bfloat16: BF16}


def _shape(x: Tensor) -> list:
    return list(x.shape)


def _check(name: str, x, layout: str, dims: int, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is of type {type(x).__name__}, but q is a torch.Tensor")
    if x.dim() != dims:
        raise ValueError(f"{name} has shape {_shape(x)}, but layout {layout!r} is {LAYOUTS[layout]}")
    if x.dtype != q.dtype:
        raise TypeError(f"{name} with shape {_shape(x)} has dtype {x.dtype}, but q has {q.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} with shape {_shape(x)} is on {x.device}, but q is on {q.device}")


def check_tensors(q, k, v, layout: str) -> int:
    dims = check_layout(layout)
    if q.dtype not in CODES:
        raise TypeError(
            f"q with shape {_shape(q)} has dtype {q.dtype}, but it must be float32, float64, "
            "float16 or bfloat16"
        )
    if q.layout != torch.strided:
        raise TypeError(f"q with shape {_shape(q)} has layout {q.layout}, but it must be strided")
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(
            f"q with shape {_shape(q)} is on {q.device}, but only the CPU and CUDA devices are "
            "supported"
        )
    if q.dtype == torch.float64 and q.device.type == "cuda":
        raise TypeError(
            f"q with shape {_shape(q)} is float64, but GPUs take float32, float16 and bfloat16"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check(name, x, layout, dims, q)
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(
                f"{name} has shape {_shape(x)} and strides {list(x.stride())}, but its last "
                "dimension must be contiguous"
            )
    return dims


def check_mask(key_mask, q: Tensor, batch: int, keys: int) -> Tensor:
    if not isinstance(key_mask, Tensor):
        key_mask = torch.as_tensor(key_mask, device=q.device)
    if key_mask.dtype != torch.bool:
        raise TypeError(
            f"key_mask with shape {_shape(key_mask)} has dtype {key_mask.dtype}, not torch.bool"
        )
    if key_mask.dim() == 1 and batch == 1:
        key_mask = key_mask.unsqueeze(0)
    if key_mask.shape != (batch, keys):
        raise ValueError(
            f"key_mask has shape {_shape(key_mask)}, but it must be {[batch, keys]}"
        )
    if key_mask.device != q.device:
        raise ValueError(
            f"key_mask with shape {_shape(key_mask)} is on {key_mask.device}, but q is on {q.device}"
        )
    return key_mask


def check_gates(log_gates, q: Tensor, k: Tensor, layout: str) -> Tensor:
    if not isinstance(log_gates, Tensor):
        log_gates = torch.as_tensor(log_gates, dtype=torch.float32, device=q.device)
    if not log_gates.dtype.is_floating_point:
        raise TypeError(
            f"log_gates with shape {_shape(log_gates)} has dtype {log_gates.dtype}, but it must be "
            "of floating point"
        )
    if log_gates.shape != k.shape[:-1]:
        raise ValueError(
            f"log_gates has shape {_shape(log_gates)}, but it must be {_shape(k)[:-1]}"
        )
    if log_gates.device != q.device:
        raise ValueError(
            f"log_gates with shape {_shape(log_gates)} is on {log_gates.device}, but q is on "
            f"{q.device}"
        )
    return log_gates


def refuse_tangents(**tensors) -> None:
    """Torch would drop them without a word."""
    for name, x in tensors.items():
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{name} with shape {_shape(x)} has a forward gradient, which sata has not"
            )


def refuse_non_finite(found, **tensors) -> None:
    """The CPU looks for NaN beforehand; here it is looked for where denominators say so."""
    if not found.non_finite:
        return
    for name, x in tensors.items():
        if x is not None and not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} with shape {_shape(x)} holds NaN or infinity")
