"""The quick convolutions against vmap's: outputs, gradients of every order, and the
ones left to PyTorch.
"""

import contextlib
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn import functional as F

from minisupernet.errors import TargetError
from minisupernet.fast import convolution as fast_convolution
from minisupernet.fast.convolution import FastConvolutions, TaskConvolution
from minisupernet.target import TaskClassifier, WeightSpec, run_tasks

TASKS, IMAGES = 3, 2


def by_vmap(target: nn.Module, weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """The oracle: PyTorch alone."""
    return vmap(lambda own, x: functional_call(target, own, (x,)))(weights, images)


def case(
    target: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tasks: int = TASKS,
    images: int = IMAGES,
):
    """Weights and images that want gradients."""
    torch.manual_seed(0)
    named = target.named_parameters()
    weights = {
        name: torch.randn(tasks, *p.shape, dtype=dtype, requires_grad=True)
        for name, p in named
    }
    return weights, torch.randn(tasks, images, *shape, dtype=dtype, requires_grad=True)


def assert_equal(
    target: nn.Module, weights: dict[str, Tensor], images: Tensor, relative: float
) -> None:
    """Outputs and gradients differ from vmap's by at most `relative` of their largest
    value.
    """
    inputs, results = [images, *weights.values()], []
    for run in (run_tasks, by_vmap):
        outputs = run(target, weights, images)
        direction = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(
            outputs
        )
        results.append([outputs, *torch.autograd.grad(outputs, inputs, direction)])
    for mine, expected in zip(*results, strict=True):
        assert mine.shape == expected.shape
        assert (mine - expected).abs().max() <= relative * expected.abs().max()


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Which of the quick ways were taken."""
    taken = []
    for name in ("_by_phases", "_blocked"):
        original = getattr(fast_convolution, name)
        monkeypatch.setattr(
            fast_convolution,
            name,
            lambda *a, original=original, name=name: (taken.append(name), original(*a))[
                1
            ],
        )
    return taken


GEOMETRIES = [
    (kernel, stride, padding, size)
    for kernel, stride, padding, size in itertools.product(
        (1, 2, 3, 5), (1, 2), (0, 1, 2), (7, 8)
    )
    if size + 2 * padding >= kernel
]


@pytest.mark.parametrize(
    "channels", [(3, 16), (8, 16), (8, 5)], ids=["colour", "blocks", "odd"]
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_any_geometry_gives_what_vmap_gives_in_float64(channels, bias):
    for kernel, stride, padding, size in GEOMETRIES:
        layer = nn.Conv2d(*channels, kernel, stride, padding, bias=bias)
        weights, images = case(layer, (channels[0], size, size), torch.float64)
        assert_equal(layer, weights, images, 1e-10)


@pytest.mark.parametrize(("tasks", "images"), [(1, 3), (2, 1), (5, 4)])
@pytest.mark.parametrize("channels", [(3, 16), (16, 16)])
def test_float32_agrees_to_rounding(channels, tasks, images):
    layer = nn.Conv2d(*channels, 5, stride=2, padding=2)
    assert_equal(
        layer, *case(layer, (channels[0], 16, 12), torch.float32, tasks, images), 1e-5
    )


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, (3, 5), stride=2, padding=(1, 2)),
        nn.Conv2d(8, 8, (5, 2), stride=(2, 1), padding=(0, 1)),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, dilation=2),
        nn.Conv2d(8, 8, 3, groups=2),
    ],
    ids=["oblong", "uneven stride", "reflect", "same", "dilated", "grouped"],
)
def test_rarer_convolutions_agree_too(layer):
    assert_equal(layer, *case(layer, (8, 9, 8), torch.float64), 1e-10)


def test_the_quick_ways_are_taken_where_they_apply(calls):
    weights, images = case(TaskClassifier(), (3, 32, 32), torch.float32)
    run_tasks(TaskClassifier(), weights, images.detach()).sum().backward()
    assert calls.count("_by_phases") == 3, (
        "the first layer's images want no gradient, the other three layers' do"
    )
    assert calls.count("_blocked") == 8


@pytest.mark.parametrize(
    "settings", [{"dilation": 2}, {"groups": 2}, {"padding": "same"}]
)
def test_others_are_left_to_pytorch(calls, settings):
    layer = nn.Conv2d(8, 8, 3, **settings)
    run_tasks(layer, *case(layer, (8, 8, 8), torch.float32)).sum().backward()
    assert not calls


def test_one_network_alone_is_run_as_it_is(calls):
    target = TaskClassifier()
    weights, images = case(target, (3, 32, 32), torch.float32, tasks=1)
    expected = functional_call(
        target, {name: w[0] for name, w in weights.items()}, (images[0],)
    )
    assert torch.equal(run_tasks(target, weights, images)[0], expected) and not calls


def test_images_and_kernels_need_not_be_contiguous():
    layer = nn.Conv2d(8, 8, 3, stride=2, padding=1)
    weights, images = case(layer, (8, 9, 9), torch.float64)
    turned = {
        name: w.detach().mT.contiguous().mT.requires_grad_()
        for name, w in weights.items()
    }
    assert not turned["weight"].is_contiguous()
    assert_equal(
        layer, turned, images.detach().transpose(3, 4)[..., :8].requires_grad_(), 1e-10
    )


def test_a_kernel_that_is_the_same_for_all_tasks_works():
    class Blurred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(8, 8, 3)
            self.register_buffer("blur", torch.ones(8, 8, 2, 2, dtype=torch.float64))

        def forward(self, images):
            return self.layer(F.conv2d(images, self.blur, stride=2))

    assert_equal(Blurred(), *case(Blurred(), (8, 9, 9), torch.float64), 1e-10)


@pytest.mark.parametrize("channels", [(3, 4), (8, 8)])
def test_first_and_second_derivatives_are_exact(channels):
    torch.manual_seed(0)
    shapes = (
        (1, 2, channels[0], 5, 5),
        (2, channels[1], channels[0], 3, 3),
        (2, channels[1]),
    )
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes
    ]

    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return TaskConvolution.apply(x, weight, bias, [2, 2], [1, 1])

    assert torch.autograd.gradcheck(
        convolve, inputs, check_forward_ad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(convolve, inputs, fast_mode=True)


TRANSFORMS = {
    "gradient": lambda f, w: grad(lambda v: f(v).square().sum())(w),
    "gradient of a gradient": lambda f, w: grad(
        lambda v: grad(lambda u: f(u).square().sum())(v).square().sum()
    )(w),
    "jacobian": lambda f, w: jacrev(f)(w),
    "forward mode": lambda f, w: jvp(f, (w,), (w,))[1],
    "hessian": lambda f, w: hessian(lambda a: f(a * w).square().sum())(
        torch.ones((), dtype=w.dtype)
    ),
    "vmap outside": lambda f, w: vmap(f)(torch.stack([w, 2 * w])),
    "vmap of gradients": lambda f, w: vmap(grad(lambda v: f(v).square().sum()))(
        torch.stack([w, 2 * w])
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms_work_around_it(name):
    target = nn.Sequential(
        nn.Conv2d(8, 8, 3, 2, 1), nn.Tanh(), nn.Conv2d(8, 4, 3, 2, 1), nn.Flatten()
    )
    spec = WeightSpec.of(target)
    flat = spec.draw(TASKS, torch.Generator().manual_seed(0)).double()
    images = torch.randn(TASKS, IMAGES, 8, 8, 8, dtype=torch.float64)
    mine, expected = (
        TRANSFORMS[name](lambda w, run=run: run(target, spec.split(w), images), flat)
        for run in (run_tasks, by_vmap)
    )
    torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_autocast_is_left_to_pytorch(calls):
    weights, images = case(TaskClassifier(), (3, 32, 32), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = run_tasks(TaskClassifier(), weights, images)
    in_bfloat16 = (
        {name: own.bfloat16() for name, own in weights.items()},
        images.bfloat16(),
    )
    assert torch.equal(logits, by_vmap(TaskClassifier(), *in_bfloat16))
    logits.float().sum().backward()
    assert not calls


def test_outside_vmap_the_mode_gives_pytorchs_convolution():
    layer, images = nn.Conv2d(8, 8, 3, stride=2), torch.randn(2, 8, 7, 7)
    with FastConvolutions():
        quick = layer(images)
    torch.testing.assert_close(quick, layer(images))


def drawn(dtype: torch.dtype) -> list[Tensor]:
    """Images, kernels and bias that want gradients, as the quick way would take."""
    random = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 7, 7), (8, 8, 3, 3), (8,))
    return [
        torch.randn(shape, generator=random).to(dtype).requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    "dtype",
    ["float32", "float64", "bfloat16", "float16", "complex64", "complex128"],
)
def test_alone_the_mode_is_pytorch_in_every_dtype(dtype, autocast):
    """The result's dtype, its values and all gradients, the latter taken inside the
    autocast block too.
    """
    results = []
    for mode in (contextlib.nullcontext(), FastConvolutions()):
        inputs = drawn(getattr(torch, dtype))
        with mode, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = F.conv2d(*inputs, 2, 1)
            total = outputs.abs().square().sum().float()
            results.append([outputs, *torch.autograd.grad(total, inputs)])
    close = {"rtol": 1e-5, "atol": 1e-4}
    for quick, plain in zip(*results, strict=True):
        torch.testing.assert_close(quick, plain, **close)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, w, b: F.conv2d(x, w.double(), b),
        lambda x, w, b: F.conv2d(x, w, b.bfloat16()),
        lambda x, w, b: F.conv2d(x, w[:, :5], b),
        lambda x, w, b: F.conv2d(x, w, b, stride=0),
        lambda x, w, b: F.conv2d(x, w, b, stride=(1, 1, 1)),
        lambda x, w, b: F.conv2d(x, w, b, padding=-1),
        lambda x, w, b: F.conv2d(x[0, 0], w, b),
    ],
)
def test_what_pytorch_refuses_the_mode_refuses_in_its_words(wrong):
    inputs, said = drawn(torch.float32), []
    for mode in (contextlib.nullcontext(), FastConvolutions()):
        with mode, pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
            wrong(*inputs)
        said.append(str(caught.value)[:60])
    assert said[0] == said[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64", "int64"])
def test_the_node_itself_refuses_other_dtypes(dtype):
    x, weight = torch.ones(2, 1, 3, 8, 8), torch.ones(1, 4, 3, 3, 3)
    for one, other in ((x.to(getattr(torch, dtype)), weight), (x, weight.double())):
        with pytest.raises(TargetError, match="float32 or float64 on the CPU, all in"):
            TaskConvolution.apply(one, other, None, [1, 1], [0, 0])


def test_a_gradient_taken_under_autocast_keeps_its_precision():
    layer = nn.Conv2d(8, 8, 3, stride=2, padding=1)
    weights, images = case(layer, (8, 9, 8), torch.float32)
    results = []
    for autocast in (False, True):
        outputs = run_tasks(layer, weights, images)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(torch.autograd.grad(outputs.square().sum(), images)[0])
    assert torch.equal(*results)


def test_no_images_are_no_outputs():
    for mode in (contextlib.nullcontext(), FastConvolutions()):
        x, *rest = drawn(torch.float32)
        with mode:
            outputs = F.conv2d(x[:0], *rest, 2, 1)
        assert outputs.shape == (0, 8, 4, 4)
        assert not torch.autograd.grad(outputs.sum(), rest[0])[0].any()
