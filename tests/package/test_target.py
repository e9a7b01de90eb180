"""Targets: the spec of a network's weights, and T networks at once against a plain
loop.
"""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from minisupernet.errors import TargetError
from minisupernet.target import TaskClassifier, WeightSpec, run_tasks


class Residual(nn.Module):
    """A small target with a skip connection, GroupNorm and pooling."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
        )
        self.norm, self.output = nn.GroupNorm(2, 8), nn.Linear(8, 5)

    def forward(self, images):
        x = torch.relu(self.first(images))
        x = torch.relu(x + self.norm(self.second(x)))
        return self.output(x.mean((2, 3)))


TARGETS = {
    "task classifier": (TaskClassifier(), (3, 32, 32)),
    "original head": (TaskClassifier(head_activation=False), (3, 32, 32)),
    "residual": (Residual(), (3, 8, 8)),
    "batch norm in eval mode": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval(), nn.Flatten()),
        (3, 5, 5),
    ),
    "perceptron": (
        nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)),
        (6,),
    ),
}


def loop(target, weights, images):
    """The oracle: one functional_call a task."""
    alone = [
        {name: tensor[t] for name, tensor in weights.items()}
        for t in range(len(images))
    ]
    return torch.stack(
        [
            functional_call(target, own, (x,))
            for own, x in zip(alone, images, strict=True)
        ]
    )


def test_the_original_classifier_has_37165_weights():
    assert WeightSpec.of(TaskClassifier()).size == 37_165
    assert sum(p.numel() for p in TaskClassifier().parameters()) == 37_165


def test_without_head_activation_the_head_is_one_linear_map():
    target = TaskClassifier(head_activation=False)
    x, y = torch.randn(2, 6, 64)

    def head(v):
        for linear in target.linears:
            v = nn.functional.leaky_relu(linear(v), target.head_slope)
        return target.output(v)

    torch.testing.assert_close(
        head(x + y) - head(torch.zeros_like(x)),
        head(x) + head(y) - 2 * head(torch.zeros_like(x)),
    )


@pytest.mark.parametrize("name", TARGETS)
def test_run_tasks_equals_the_loop_with_gradients(name):
    target, shape = TARGETS[name]
    spec = WeightSpec.of(target)
    flat = spec.draw(3, torch.Generator().manual_seed(0)).requires_grad_()
    images = torch.randn(3, 4, *shape)
    together, alone = (
        run_tasks(target, spec.split(flat), images),
        loop(target, spec.split(flat), images),
    )
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    direction = torch.randn_like(together)
    gradients = [
        torch.autograd.grad((outputs * direction).sum(), flat)[0]
        for outputs in (together, alone)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TARGETS)
def test_under_autocast_networks_run_in_bfloat16(name, made_in):
    """A generator under autocast makes its weights in bfloat16, while images are
    float32.
    """
    target, shape = TARGETS[name]
    spec = WeightSpec.of(target)
    flat = spec.draw(3, torch.Generator().manual_seed(0)).requires_grad_()
    images = torch.randn(3, 4, *shape, generator=torch.Generator().manual_seed(1))
    exact = run_tasks(target, spec.split(flat), images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = run_tasks(target, spec.split(flat.to(made_in)), images)
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).abs().max() < 0.03 * exact.abs().max()
    exact_gradient, gradient = (
        torch.autograd.grad(outputs.float().sum(), flat)[0]
        for outputs in (exact, rough)
    )
    assert (gradient - exact_gradient).norm() < 0.05 * exact_gradient.norm()


def test_whole_numbers_stay_so_under_autocast():
    target, codes = nn.Embedding(300, 2), torch.tensor([[257, 299]])
    table = torch.arange(600.0).view(1, 300, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            run_tasks(target, {"weight": table}, codes), table[:, codes[0]].bfloat16()
        )


def test_each_task_sees_only_its_own_weights():
    target = TaskClassifier()
    spec = WeightSpec.of(target)
    flat, images = (
        spec.draw(3, torch.Generator().manual_seed(0)),
        torch.randn(3, 4, 3, 32, 32),
    )
    before = run_tasks(target, spec.split(flat), images)
    flat[1] += 1
    after = run_tasks(target, spec.split(flat), images)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert not torch.allclose(before[1], after[1])


def test_split_and_join_are_inverse():
    spec = WeightSpec.of(Residual())
    flat = torch.randn(2, spec.size)
    assert torch.equal(spec.join(spec.split(flat)), flat)


@pytest.mark.parametrize("rule", ["torch", "glorot"])
def test_drawn_weights_have_the_stated_spread(rule):
    target = TaskClassifier()
    spec = WeightSpec.of(target)
    weights = spec.split(spec.draw(64, torch.Generator().manual_seed(0), rule))
    for tensor in spec.tensors:
        expected = tensor.spread
        if rule == "glorot":
            expected = (
                (2 / (tensor.fan_in + tensor.fan_out)) ** 0.5
                if len(tensor.shape) > 1
                else 0
            )
        assert weights[tensor.name].std().item() == pytest.approx(expected, rel=0.25)


def test_the_spread_is_that_of_pytorch_layers():
    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(16, 64, 5), "linear": nn.Linear(300, 200)}
    for layer in layers.values():
        spec = {tensor.name: tensor.spread for tensor in WeightSpec.of(layer).tensors}
        assert layer.weight.std().item() == pytest.approx(spec["weight"], rel=0.05)
        assert layer.bias.std().item() == pytest.approx(spec["bias"], rel=0.25)


def test_normalisation_layers_start_at_one_and_zero():
    weights = WeightSpec.of(nn.GroupNorm(2, 8))
    drawn = weights.split(weights.draw(2, torch.Generator().manual_seed(0)))
    assert torch.equal(drawn["weight"], torch.ones(2, 8)) and torch.equal(
        drawn["bias"], torch.zeros(2, 8)
    )


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
            r"layer '1' \(BatchNorm2d\) mixes the images of a batch",
        ),
        (
            nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)),
            r"layer '1' \(Dropout\) draws random numbers",
        ),
        (nn.Sequential(nn.GRU(3, 4)), r"layer '0' \(GRU\) is recurrent"),
        (
            nn.Sequential(nn.LazyLinear(3)),
            r"layer '0' \(LazyLinear\) does not know its shape",
        ),
        (nn.ReLU(), "ReLU has no weights to generate"),
    ],
)
def test_layers_that_cannot_run_per_task_are_named(module, message):
    with pytest.raises(TargetError, match=message):
        WeightSpec.of(module)


def test_the_same_layers_pass_where_they_are_harmless():
    assert (
        WeightSpec.of(
            nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).eval()
        ).size
        == 24
    )
    assert (
        WeightSpec.of(
            nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.InstanceNorm1d(4))
        ).size
        == 16
    )


def test_wrong_weights_are_refused_in_one_sentence():
    target, images = TaskClassifier(), torch.zeros(2, 1, 3, 32, 32)
    spec = WeightSpec.of(target)
    weights = spec.split(torch.zeros(2, spec.size))
    with pytest.raises(TargetError, match=r"missing \['output.bias'\]"):
        run_tasks(
            target,
            {name: w for name, w in weights.items() if name != "output.bias"},
            images,
        )
    with pytest.raises(
        TargetError, match=r"'output.bias' must be \(2, 1\), not \(2, 3\)"
    ):
        run_tasks(target, {**weights, "output.bias": torch.zeros(2, 3)}, images)
    with pytest.raises(
        TargetError, match=r"images must be \(2, B, \.\.\.\), not \(3, 1, 3, 32, 32\)"
    ):
        run_tasks(target, weights, torch.zeros(3, 1, 3, 32, 32))
    with pytest.raises(
        TargetError, match=r"expected weights of shape \(T, 37165\), got \(2, 5\)"
    ):
        spec.split(torch.zeros(2, 5))
