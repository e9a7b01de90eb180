"""The convolutions of T networks at once, on the CPU: for each piece of work the
quickest of PyTorch's kernels.

`vmap` turns T convolutions into one with T groups. On a CPU that is slow in three
places, and `TaskConvolution` goes another way there: kernels over few channels, such as
the first layer's over 3, run task by task, in the kernel made for colour images; the
gradient of the images under a stride is an ordinary convolution, by phases; and no
gradient is made that nobody asks for. It gives what `vmap` gives, to rounding, for any
`Conv2d` inside any target.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from minisupernet.errors import TargetError

__all__ = ["FastConvolutions", "TaskConvolution"]

BLOCK = 8  # channels in a register: grouped kernels are quick for whole multiples


DTYPES = torch.float32, torch.float64  # the others gain nothing, or round otherwise


class FastConvolutions(TorchFunctionMode):
    """Inside the block, `conv2d` is `TaskConvolution` wherever that can do it;
    everything else is as it was: other devices and dtypes, autocast, groups, dilation.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Send one call of a PyTorch function on its way."""
        if func is torch.conv2d:
            plan = _plan(*args, **(kwargs or {}))
            if plan is not None:
                x, weight, bias, stride, padding = plan
                bias = None if bias is None else bias.unsqueeze(0)
                return TaskConvolution.apply(
                    x.unsqueeze(1), weight.unsqueeze(0), bias, stride, padding
                ).squeeze(1)
        return func(*args, **(kwargs or {}))


def _plan(
    input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1
) -> tuple | None:  # torch.conv2d's names
    """The arguments of a `TaskConvolution` of one task; None for the convolutions it
    leaves to PyTorch.
    """
    tensors = [input, weight] if bias is None else [input, weight, bias]
    if not _is_ordinary(*tensors) or torch.is_autocast_enabled("cpu"):
        return None
    sizes = [_pair(value) for value in (stride, padding, dilation)]
    if None in sizes or sizes[2] != [1, 1] or groups != 1 or input.ndim != 4:
        return None
    return input, weight, bias, *sizes[:2]


def _is_ordinary(*tensors: Tensor) -> bool:
    """Whether all are of one dtype in which this is tested, and on the CPU."""
    return all(
        isinstance(tensor, Tensor)
        and tensor.dtype == tensors[0].dtype
        and tensor.dtype in DTYPES
        and tensor.device.type == "cpu"
        for tensor in tensors
    )


def _pair(value: object) -> list[int] | None:
    """A size for both axes; None for what is not one or two whole numbers."""
    sides = [value] * 2 if isinstance(value, int) else value
    if not isinstance(sides, list | tuple) or len(sides) not in (1, 2):
        return None
    plain = all(isinstance(side, int) for side in sides)
    return [*sides] * (2 // len(sides)) if plain else None


class TaskConvolution(torch.autograd.Function):
    """T convolutions: images (B, T, C, H, W), kernels (T, O, C, h, w), bias (T, O) or
    None -> (B, T, O, H', W').

    Under `vmap` the mapped axis joins the task axis, so that one rule serves any
    nesting. Autocast changes nothing here.

    Raises:
        TargetError: for tensors that are not float32 or float64 on the CPU.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
    ) -> Tensor:
        """Convolve each task's images with its own kernels."""
        _check(x, weight, *([] if bias is None else [bias]))
        with torch.autocast("cpu", enabled=False):
            return _convolve(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        """Keep what the backward pass needs: images and kernels."""
        x, weight, bias, ctx.stride, ctx.padding = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the images, kernels and bias, those alone that are asked for."""
        given = (gradient, *ctx.saved_tensors, ctx.stride, ctx.padding)
        for_x = for_weight = for_bias = None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[0]:
                for_x = _gradient_of_images(*given)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                for_weight, for_bias = _gradient_of_kernels(*given)
        return for_x, for_weight, for_bias if ctx.has_bias else None, None, None

    @staticmethod
    def jvp(
        ctx: Any, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, *_: None
    ) -> Tensor:
        """How the output moves when images, kernels and bias move so (None: not at
        all): it is linear in each.
        """
        images, kernels = ctx.saved_tensors
        pairs = ((x, kernels), (images, weight))
        moved = [
            TaskConvolution.apply(*p, None, ctx.stride, ctx.padding)
            for p in pairs
            if all(t is not None for t in p)
        ]
        return sum(moved if bias is None else [*moved, bias[..., None, None]])

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[Tensor, int]:
        """Join the mapped axis to the task axis."""

        *tensors, stride, padding = inputs
        joined = [
            _join(tensor, dim, axis, info.batch_size)
            for tensor, dim, axis in zip(tensors, in_dims[:3], (1, 0, 0), strict=True)
        ]
        return (
            TaskConvolution.apply(*joined, stride, padding).unflatten(
                1, (info.batch_size, -1)
            ),
            1,
        )


def _check(*tensors: Tensor) -> None:
    if not _is_ordinary(*tensors):
        found = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        raise TargetError(
            "the convolutions of many networks take float32 or float64 on the CPU, all"
            f" in one dtype, not {found}; use run_tasks, which leaves others to"
            " PyTorch."
        )


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list, padding: list
) -> Tensor:
    """In one call where blocks fit, else task by task."""
    tasks = len(weight)
    if _blocked(weight):
        own = None if bias is None else bias.flatten()
        flat = x.flatten(1, 2), weight.flatten(0, 1), own
        made = F.conv2d(*flat, stride, padding, 1, tasks)
        return made.unflatten(1, (tasks, -1))
    own = [None] * tasks if bias is None else bias.unbind()
    alone = zip(x.unbind(1), weight.unbind(), own, strict=True)
    made = [F.conv2d(*each, stride, padding) for each in alone]
    return torch.stack(made, 1)


def _join(
    tensor: Tensor | None, dim: int | None, axis: int, size: int
) -> Tensor | None:
    """`tensor` with its mapped axis `dim` (None: the same for all) and its task axis
    `axis` as one.
    """
    if tensor is None:
        return None
    if dim is None:
        tensor, dim = tensor.expand(size, *tensor.shape), 0
    return tensor.movedim(dim, axis).flatten(axis, axis + 1)


def _blocked(weight: Tensor) -> bool:
    return weight.shape[1] % BLOCK == 0 and weight.shape[2] % BLOCK == 0


def _backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list,
    padding: list,
    groups: int,
    mask: list,
):
    """PyTorch's own gradients (images, kernels, bias) of a convolution, those in
    `mask`.
    """
    bias = [weight.shape[0]]
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, bias, stride, padding, [1, 1], False, [0, 0], groups, mask
    )


def _gradient_of_kernels(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: list, padding: list
):
    """(T, O, C, h, w) and (T, O): one call where blocks fit, else task by task."""
    tasks, mask = len(weight), [False, True, True]
    if _blocked(weight):
        flat = gradient.flatten(1, 2), x.flatten(1, 2), weight.flatten(0, 1)
        _, kernels, bias = _backward(*flat, stride, padding, tasks, mask)
        return kernels.unflatten(0, (tasks, -1)), bias.unflatten(0, (tasks, -1))
    alone = zip(gradient.unbind(1), x.unbind(1), weight.unbind(), strict=True)
    pairs = [_backward(*own, stride, padding, 1, mask)[1:] for own in alone]
    return torch.stack([kernel for kernel, _ in pairs]), torch.stack(
        [bias for _, bias in pairs]
    )


def _gradient_of_images(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: list, padding: list
) -> Tensor:
    """(B, T, C, H, W): by phases under a stride of 2, else PyTorch's own."""
    tasks = len(weight)
    if stride == [2, 2] and _phases_cover(gradient, x, weight, padding):
        return _by_phases(gradient, x, weight, padding)
    flat = gradient.flatten(1, 2), x.flatten(1, 2), weight.flatten(0, 1)
    return _backward(*flat, stride, padding, tasks, [True, False, False])[0].unflatten(
        1, (tasks, -1)
    )


def _phases_cover(
    gradient: Tensor, x: Tensor, weight: Tensor, padding: list[int]
) -> bool:
    """Whether `_by_phases` reaches every pixel: not so where the last met no tap, or
    padding is wider than taps.
    """
    sizes = zip(
        gradient.shape[-2:], x.shape[-2:], weight.shape[-2:], padding, strict=True
    )
    return all(
        _reach(taps, pad) >= 0
        and made + 2 * _reach(taps, pad) - (taps + 1) // 2
        >= (size + pad - 1) // 2 - pad // 2
        for made, size, taps, pad in sizes
    )


def _reach(taps: int, padding: int) -> int:
    """How far the gradient is padded, so that the first output of its convolutions
    belongs to the first pixels.
    """
    return (taps + 1) // 2 - 1 - padding // 2


def _by_phases(
    gradient: Tensor, x: Tensor, weight: Tensor, padding: list[int]
) -> Tensor:
    """The images' gradient under a stride of 2, as four convolutions of stride 1 in one
    call.

    Output i met pixel n through the tap k = n + padding - 2 i. A pixel with n + padding
    even has met even taps alone, an odd one odd taps: for each of the four phases (row
    even or odd, column even or odd) the gradient is convolved with that phase's taps,
    turned round. The phases are laid into one another at the end.
    """
    tasks, _, channels, height, width = weight.shape
    turned = F.pad(
        weight.flip(3, 4).transpose(1, 2), (width % 2, 0, height % 2, 0)
    )  # (T, C, O, 2h', 2w')
    taps = (
        turned.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 4, 6, 2, 3, 5)
    )  # (T, C, 2, 2, O, h', w')
    taps = taps.flip(2, 3)  # having been turned, the odd phase came first
    reach = [
        _reach(side, pad) for side, pad in zip((height, width), padding, strict=True)
    ]
    phases = F.conv2d(
        gradient.flatten(1, 2), taps.flatten(0, 3), None, 1, reach, 1, tasks
    )  # (B, T C 2 2, H/2, W/2)
    images = F.pixel_shuffle(phases, 2).unflatten(1, (tasks, channels))
    top, left = padding[0] % 2, padding[1] % 2
    return images[..., top : top + x.shape[-2], left : left + x.shape[-1]]
