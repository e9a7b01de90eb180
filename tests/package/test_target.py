"""Targets: the spec of a network's weights, and T networks at once against a plain
loop.
"""

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

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
        (nn.Sequential(nn.GRU(3, 4)), r"layer '0' \(GRU\) cannot run per task"),
        (
            nn.Sequential(nn.LazyLinear(3)),
            r"layer '0' \(LazyLinear\) does not know its shape",
        ),
        (nn.ReLU(), "ReLU has no weights to generate"),
        (nn.Linear(0, 3), r"'weight' are \(3, 0\) of torch.float32; only real numbers"),
        (nn.Linear(2, 3, dtype=torch.complex64), "'weight' are .* only real numbers"),
        (
            nn.LayerNorm(4, device="meta"),
            "weights 'weight' have no values to start from",
        ),
        (
            nn.LazyBatchNorm1d(affine=False).eval(),
            r"layer 'itself' \(LazyBatchNorm1d\) does not know its shape",
        ),
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


class Shared(nn.Module):
    """One layer, reachable under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = self.a

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 1), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.scale * self.layer(x)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, x):
        h = self.layer(x)
        return h, {"relu": h.relu()}


class Drop(Two):
    def forward(self, x):
        return F.dropout(self.layer(x), 0.5, self.training)


class Count(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        self.seen += 1
        return self.layer(x) + self.seen


@pytest.mark.parametrize("kind", [Shared, Tied, Scaled])
@pytest.mark.parametrize("tasks", [1, 3])
def test_a_target_with_shared_parts_is_run_right_and_never_touched(kind, tasks):
    net, x = kind(), torch.randn(tasks, 4, 6)
    own = dict(net.named_parameters(remove_duplicate=False))
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    spec = WeightSpec.of(net)
    weights = spec.split(spec.draw(tasks, torch.Generator().manual_seed(0)))
    found = run_tasks(net, weights, x)
    for t in range(tasks):
        alone = copy.deepcopy(net)
        with torch.no_grad():
            for name, parameter in alone.named_parameters():
                parameter.copy_(weights[name][t])
        torch.testing.assert_close(found[t], alone(x[t]))
    after = dict(net.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in own.items())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    copy.deepcopy(net)(x[0])


def test_a_scalar_parameter_is_a_weight_of_no_axis():
    spec = WeightSpec.of(Scaled())
    weights = spec.split(torch.arange(16.0).view(2, 8))
    assert weights["scale"].shape == (2,)
    assert torch.equal(spec.join(weights), torch.arange(16.0).view(2, 8))


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm((8, 8, 8)), nn.RMSNorm((8, 8)), nn.GroupNorm(2, 8)]
)
def test_a_normalisation_of_several_axes_starts_where_the_module_has_it(layer):
    spec = WeightSpec.of(nn.Sequential(nn.Conv2d(3, 8, 3), layer))
    scale = next(tensor for tensor in spec.tensors if tensor.name == "1.weight")
    assert (scale.centre, scale.spread) == (1.0, 0.0)


def test_a_scale_of_ones_of_ones_own_starts_at_one():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.full((8, 1, 1), 0.1))
            self.matrix = nn.Parameter(torch.randn(8, 4))

    module = Own()
    gamma, matrix = WeightSpec.of(module).tensors
    assert (gamma.centre, gamma.spread) == (pytest.approx(0.1), 0.0)
    assert matrix.centre == pytest.approx(module.matrix.mean().item(), abs=1e-6)
    assert matrix.spread == pytest.approx(module.matrix.std(correction=0).item())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(8, 64, 3),
        nn.ConvTranspose2d(64, 32, 3),
        nn.Bilinear(30, 20, 40),
        nn.Embedding(200, 20),
        nn.GRUCell(30, 50),
        nn.RNNCell(50, 80),
        nn.MultiheadAttention(64, 2),
        nn.MultiheadAttention(64, 2, kdim=32, vdim=32),
        nn.utils.parametrizations.weight_norm(nn.Linear(60, 90)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_each_kind_of_layer_starts_as_pytorch_draws_it(layer):
    """Also a layer that computes its weights: the network it becomes starts alike."""
    for tensor in WeightSpec.of(layer).tensors:
        own = layer.get_parameter(tensor.name).detach()
        if tensor.name in ("out_proj.bias", "in_proj_bias"):
            assert not own.any() and tensor.centre == 0  # 0 in attention alone
        else:
            room = 4 * tensor.spread / own.numel() ** 0.5
            assert own.mean().item() == pytest.approx(tensor.centre, abs=room)
            assert own.std().item() == pytest.approx(tensor.spread, rel=0.25)


def test_glorots_rule_leaves_what_has_no_fan_in_at_its_centre():
    spec = WeightSpec.of(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm((2, 6)), Scaled()))
    drawn = spec.draw(2, torch.Generator().manual_seed(0), "glorot")
    drawn = spec.split(drawn)
    assert drawn["0.weight"].std() > 0 and not drawn["0.bias"].any()
    assert torch.equal(drawn["1.weight"], torch.ones(2, 2, 6))
    assert torch.equal(drawn["2.scale"], torch.full((2,), 1.5))
    with pytest.raises(TargetError, match="no rule 'he'; choose 'torch' or 'glorot'"):
        spec.draw(2, torch.Generator(), "he")


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Drop, "Drop draws random numbers as it runs; call .eval()"),
        (Count, "changes its 'seen' as it runs; call .eval()"),
    ],
)
def test_what_is_drawn_or_changed_is_refused_for_any_number(kind, said, tasks):
    net = kind()
    spec = WeightSpec.of(net)
    weights = spec.split(spec.draw(tasks, torch.Generator().manual_seed(0)))
    with pytest.raises(TargetError, match=re.escape(said)):
        run_tasks(net, weights, torch.randn(tasks, 4, 6))
    if kind is Count:
        assert not net.seen.any()
    else:
        run_tasks(net.eval(), weights, torch.randn(tasks, 4, 6))


class Keeps(Two):
    """Changes attributes of its own, as a network that shows its features does."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.features, self.calls = None, [], 0

    def forward(self, x):
        self.last, self.calls = self.layer(x), self.calls + 1
        self.features.append(self.last)
        return self.last * self.calls


class Masked(Two):
    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.ones(2)  # no buffer

    def forward(self, x):
        return self.layer(x) * self.mask.mul_(0.5)


@pytest.mark.parametrize("tasks", [1, 3])
def test_what_a_target_keeps_as_it_runs_is_forgotten(tasks):
    net, features = Keeps(), None
    features, spec = net.features, WeightSpec.of(net)
    weights = spec.split(spec.draw(tasks, torch.Generator().manual_seed(0)))
    found = run_tasks(net, weights, torch.randn(tasks, 4, 6))
    assert (net.last, net.calls) == (None, 0)
    assert net.features is features and not features
    assert found.shape == (tasks, 4, 2)
    masked = Masked()
    with pytest.raises(TargetError, match="Masked changes its 'mask' as it runs"):
        run_tasks(masked, weights, torch.randn(tasks, 4, 6))
    assert torch.equal(masked.mask, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_are_never_changed_under_autocast_either(dtype):
    net = Count().to(dtype)
    weights = WeightSpec.of(net).split(torch.randn(1, 14))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TargetError):
        run_tasks(net, weights, torch.randn(1, 4, 6))
    assert not net.seen.any()


class Gives(Two):
    def __init__(self, more: object) -> None:
        super().__init__()
        self.more = more

    def forward(self, x):
        return self.layer(x), self.more


class Over(Two):
    def forward(self, x):
        return self.layer(x.relu_())


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize(
    ("net", "said"),
    [
        (Gives(None), "Gives returns NoneType among its outputs; let it return tensor"),
        (Gives(1.0), "Gives returns float among its outputs"),
        (Over(), r"Over writes over the images or weights .* \(inplace=False\)"),
    ],
)
def test_other_outputs_and_changed_images_are_refused_for_any_number(net, said, tasks):
    weights = WeightSpec.of(net).split(torch.randn(tasks, 14))
    with pytest.raises(TargetError, match=said):
        run_tasks(net, weights, torch.randn(tasks, 4, 6))


@pytest.mark.parametrize("tasks", [1, 3])
def test_what_one_network_cannot_do_alone_says_so_itself(tasks):
    """Images of the wrong size: the sentence is that of the layer, for any number."""
    target = TaskClassifier()
    weights = WeightSpec.of(target).split(torch.zeros(tasks, 37_165))
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 1"):
        run_tasks(target, weights, torch.zeros(tasks, 2, 1, 32, 32))


class Writes(Two):
    def forward(self, x):
        return torch.zeros(4, 2).add_(self.layer(x))


class Chooses(Two):
    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x[:, :2]


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (Writes(), r"Writes writes into a tensor that all .* \(images.new_zeros\)"),
        (Chooses(), "Chooses cannot run per task .*data-dependent control flow"),
    ],
)
def test_what_cannot_run_side_by_side_is_refused_in_one_sentence(net, said):
    weights = WeightSpec.of(net).split(torch.randn(2, 14))
    with pytest.raises(TargetError, match=said) as error:
        run_tasks(net, weights, torch.randn(2, 4, 6))
    assert "\n" not in str(error.value)
    alone = {name: own[:1] for name, own in weights.items()}
    assert run_tasks(net, alone, torch.ones(1, 4, 6)).shape == (1, 4, 2)


def test_weights_without_networks_are_refused():
    images = torch.zeros(1, 4, 6)
    with pytest.raises(TargetError, match=r"leading task axis .* not shape \(\)"):
        run_tasks(Scaled(), dict(Scaled().named_parameters()), images)
    empty = WeightSpec.of(Two()).split(torch.zeros(0, 14))
    with pytest.raises(TargetError, match="of at least one network"):
        run_tasks(Two(), empty, torch.zeros(0, 4, 6))
    with pytest.raises(TargetError, match="this target has no weights"):
        run_tasks(nn.ReLU(), {}, images)


@pytest.mark.parametrize("tasks", [1, 3])
def test_several_outputs_keep_their_form(tasks):
    spec = WeightSpec.of(Two())
    weights = spec.split(spec.draw(tasks, torch.Generator().manual_seed(0)))
    first, named = run_tasks(Two(), weights, torch.randn(tasks, 4, 6))
    assert first.shape == named["relu"].shape == (tasks, 4, 2)
    assert torch.equal(first.relu(), named["relu"])


def test_a_cell_that_cannot_run_per_task_is_named_with_advice_that_works():
    class Loop(nn.Module):
        def __init__(self, cell: type) -> None:
            super().__init__()
            self.cell = cell(6, 4)

        def forward(self, x):
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return state

    with pytest.raises(TargetError, match=r"'cell' \(LSTMCell\) .* nn.GRUCell"):
        WeightSpec.of(Loop(nn.LSTMCell))
    spec, net = WeightSpec.of(Loop(nn.GRUCell)), Loop(nn.GRUCell)
    weights = spec.split(spec.draw(2, torch.Generator().manual_seed(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is slow under vmap, and right
        assert run_tasks(net, weights, torch.randn(2, 3, 5, 6)).shape == (2, 3, 4)


def test_spectral_norm_in_training_mode_is_named():
    net = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 2))
    with pytest.raises(TargetError, match="changes itself in training mode"):
        WeightSpec.of(net)
    WeightSpec.of(net.eval())


@pytest.mark.parametrize("strict", [False, True])
def test_many_networks_can_be_exported(strict):
    norm = nn.BatchNorm2d(4).eval()
    target = nn.Sequential(nn.Conv2d(3, 4, 5, 4), norm, nn.Flatten(), nn.Linear(196, 1))
    spec = WeightSpec.of(target)

    class Many(nn.Module):
        def forward(self, flat, images):
            return run_tasks(target, spec.split(flat), images)

    flat = spec.draw(2, torch.Generator().manual_seed(0))
    inputs = flat, torch.randn(2, 3, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the target's weights are put in for the call
        program = torch.export.export(Many(), inputs, strict=strict)
    torch.testing.assert_close(program.module()(*inputs), Many()(*inputs))
