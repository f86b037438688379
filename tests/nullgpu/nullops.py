"""Stand-ins for what cuDNN, cuBLAS and cuSOLVER compute: the right shapes and strides, no values.

These libraries would not start without a driver. Each stand-in notes its call in the log of the null device, on the
stream on which the library would have worked, so that library calls are counted apart from kernels. On a real GPU one
call is one or more kernels.
"""

import ctypes
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_DEVICE = ctypes.CDLL("libcuda.so.1")
_LIBRARY = torch.library.Library("aten", "IMPL")  # kept alive: the registrations end with it


def note(name: str, detail: str = "") -> None:
    """Log a library call on the current stream of the calling thread."""
    stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(torch.cuda.current_device()))
    _DEVICE.nullgpu_library(name.encode(), stream, detail.encode())


# ------------------------------------------------------------------------------------------------------- convolutions


def is_channels_last(tensor: Tensor) -> bool:
    """Return whether a 4-D tensor's memory is channels-last; where both formats describe it, it is."""
    return tensor.is_contiguous(memory_format=torch.channels_last)


def _layout(**tensors: Tensor) -> str:
    """Return what the report reads: each tensor's shape and whether it is channels-last."""
    return ";".join(
        f"{name}={'x'.join(map(str, t.shape))}:{'nhwc' if is_channels_last(t) else 'nchw'}"
        for name, t in tensors.items()
    )


def _format(*tensors: Tensor) -> torch.memory_format:
    """Return the memory format of a convolution's output: as cuDNN's, channels-last if an input clearly is."""
    clearly = any(is_channels_last(t) and not t.is_contiguous() for t in tensors)
    return torch.channels_last if clearly else torch.contiguous_format


def _output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def convolution(
    images: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """Stand for a convolution's forward pass: (B, C, H, W) by (K, C / groups, h, w) -> (B, K, H', W')."""
    note("convolution", _layout(images=images, weight=weight))
    if transposed:
        raise NotImplementedError("the null device has no transposed convolution")
    rest = zip(images.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    shape = (images.shape[0], weight.shape[0], *(_output_size(*each) for each in rest))
    # Made in its format at once: converting it would be a launch that no real convolution has.
    return torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=_format(images, weight))


def convolution_backward(
    grad: Tensor, images: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Stand for a convolution's backward pass; ``mask`` says which of the three gradients are wanted."""
    note("convolution_backward", _layout(grad=grad, images=images, weight=weight))
    memory = _format(images, weight)
    like = [torch.empty_like(t, dtype=grad.dtype, memory_format=memory) for t in (images, weight)]
    bias = grad.new_empty(weight.shape[:1])
    return like[0] if mask[0] else None, like[1] if mask[1] else None, bias if mask[2] else None


def cudnn_batch_norm(
    images: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stand for cuDNN's BatchNorm: output, saved mean and inverse deviation (empty in evaluation), reserve."""
    note("cudnn_batch_norm")
    saved = torch.empty(images.shape[1] if training else 0, device=images.device)
    reserve = torch.empty(0, dtype=torch.uint8, device=images.device)
    return torch.empty_like(images), saved, saved.clone(), reserve


def cudnn_batch_norm_backward(
    images: Tensor, grad: Tensor, weight: Tensor, mean: Tensor, var: Tensor, saved_mean: Tensor, saved_var: Tensor,
    eps: float, reserve: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Stand for the backward pass of cuDNN's BatchNorm."""
    note("cudnn_batch_norm_backward")
    return torch.empty_like(images), torch.empty_like(weight), torch.empty_like(weight)


# ----------------------------------------------------------------------------------------------------- matrix products


def mm(a: Tensor, b: Tensor) -> Tensor:
    """Stand for a matrix product (N, K) by (K, M)."""
    note("mm")
    return a.new_empty(a.shape[0], b.shape[1])


def addmm(added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Stand for ``beta * added + alpha * a @ b``."""
    note("addmm")
    return a.new_empty(a.shape[0], b.shape[1])


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """Stand for a batch of matrix products."""
    note("bmm")
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


def baddbmm(added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Stand for ``beta * added + alpha * a @ b``, in batches; torch copies ``added`` to where the result will be."""
    result = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    result.copy_(added)
    note("baddbmm")
    return result


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Stand for an inner product."""
    note("dot")
    return a.new_empty(())


def cudnn_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, log_sum_exp: bool, dropout: float = 0.0,
    causal: bool = False, debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[Tensor, Tensor, None, None, int, int, Tensor, Tensor, None]:  # fmt: skip
    """Stand for cuDNN's attention, (B, heads, T, D) each: output, and what its backward pass needs."""
    note("attention")
    sums = torch.empty((*query.shape[:3], 1), device=query.device)
    seed, offset = (torch.empty((), dtype=torch.int64, device=query.device) for _ in range(2))
    return torch.empty_like(query), sums, None, None, query.shape[2], key.shape[2], seed, offset, None


def cudnn_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Stand for the backward pass of cuDNN's attention: the gradients of query, key and value."""
    note("attention_backward")
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def eigh(matrix: Tensor, uplo: str = "L", compute_v: bool = True) -> tuple[Tensor, Tensor]:
    """Stand for an eigendecomposition (cuSOLVER); the speed net's whitening asks for one."""
    note("eigh")
    return matrix.new_empty(matrix.shape[:-1]), torch.empty_like(matrix)


def _into(name: str) -> Callable[..., Tensor]:
    """Return the variant of an operator that writes into ``out``."""

    def write(*args: Any, out: Tensor, **kwargs: Any) -> Tensor:
        note(name)
        return out

    return write


def install() -> None:
    """Put the stand-ins in the place of the CUDA implementations."""
    implementations: dict[str, Callable[..., Any]] = {
        "convolution": convolution, "convolution_backward": convolution_backward,
        "cudnn_batch_norm": cudnn_batch_norm, "cudnn_batch_norm_backward": cudnn_batch_norm_backward,
        "mm": mm, "addmm": addmm, "bmm": bmm, "baddbmm": baddbmm, "dot": dot, "_linalg_eigh": eigh,
        "_scaled_dot_product_cudnn_attention": cudnn_attention,
        "_scaled_dot_product_cudnn_attention_backward": cudnn_attention_backward,
    }  # fmt: skip
    implementations |= {f"{name}.out": _into(name) for name in ("mm", "addmm", "bmm", "baddbmm")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it has implementations already: that is the point
        for name, implementation in implementations.items():
            _LIBRARY.impl(name, implementation, "CUDA")
