"""A HyperLSTM layer over a whole sequence as one node of the graph, with its gradient
written by hand.

It computes what `HyperLSTMCell.step` in a loop computes, and tests compare the two.
Autograd would record some sixty small operations a step, and add one step's gradient of
every weight to the last's. Here a step back is thirty operations, and the gradient of
each large weight is one product over all steps at the end.

Where a gradient is to be differentiated again, the loop is run in its place; forward
mode and `torch.func` are refused by PyTorch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from minisupernet.errors import RecurrentError
from minisupernet.recurrent import by_gate

__all__ = ["HyperInputs", "hyper_sequence"]

EPSILON = 1e-5  # in the variance, as in nn.LayerNorm
normalise = torch.native_layer_norm
normalise_backward = torch.ops.aten.native_layer_norm_backward.default
sigmoid_backward_into = torch.ops.aten.sigmoid_backward.grad_input
tanh_backward = torch.ops.aten.tanh_backward.default
tanh_backward_into = torch.ops.aten.tanh_backward.grad_input


class Affine(NamedTuple):
    """The parameters of an LSTM step's layer normalisation."""

    gain: Tensor  # (4, 1, H)
    shift: Tensor  # (4, 1, H)
    cell_gain: Tensor  # (H,)
    cell_shift: Tensor  # (H,)


class HyperInputs(NamedTuple):
    """All that a sequence is made from: what `prepare` makes of the inputs, the state
    before it, and the weights, named as in `HyperLSTMCell` and `ScalingHeads`."""

    hyper_x: Tensor  # (T, B, 4 hyper_size)
    main_x: Tensor  # (T, B, 4 H)
    h: Tensor  # (B, H)
    c: Tensor
    hyper_h: Tensor  # (B, hyper_size)
    hyper_c: Tensor
    hidden_weight: Tensor
    hyper_hidden_weight: Tensor
    z_weight: Tensor
    z_bias: Tensor
    weight: Tensor
    base: Tensor
    hyper_gain: Tensor
    hyper_shift: Tensor
    hyper_cell_gain: Tensor
    hyper_cell_shift: Tensor
    gain: Tensor
    shift: Tensor
    cell_gain: Tensor
    cell_shift: Tensor

    def hyper_affine(self) -> Affine:
        """The layer normalisation of the small network."""
        return Affine(*self[12:16])

    def affine(self) -> Affine:
        """The layer normalisation of the main network."""
        return Affine(*self[16:20])

    def padded_bias(self) -> Tensor:
        """The bias of all z, (12 n_z,): z_b has none."""
        return F.pad(self.z_bias, (0, len(self.z_weight) - len(self.z_bias)))


def hyper_sequence(
    inputs: HyperInputs, dropout: float = 0.0, delayed: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a whole sequence of a HyperLSTM layer with layer normalisation.

    Under autocast it runs in the weights' own dtype, as layer normalisation does.

    Args:
        dropout: recurrent dropout, on the candidate of the main network.
        delayed: make the scalings from the small network's last state.

    Returns:
        h of all steps (T, B, H), then c, hyper_h and hyper_c after the last.
    """
    device, dtype = inputs.h.device.type, inputs.hidden_weight.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            same = HyperInputs(*(tensor.to(dtype) for tensor in inputs))
            return _HyperSequence.apply(dropout, delayed, *same)
    return _HyperSequence.apply(dropout, delayed, *inputs)


def plain_sequence(
    inputs: HyperInputs, delayed: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`hyper_sequence` without dropout, in operations that autograd knows."""
    h, c, hyper_h, hyper_c = inputs[2:6]
    split, outputs = (inputs.hyper_x.shape[2], inputs.main_x.shape[2]), []
    for hyper_part, main_part in zip(inputs.hyper_x, inputs.main_x, strict=True):
        of_h, main_h = F.linear(h, inputs.hidden_weight).split(split, dim=1)
        last, sums = hyper_h, F.linear(hyper_h, inputs.hyper_hidden_weight)
        sums = by_gate(hyper_part + of_h + sums)
        hyper_h, hyper_c = _plain_update(sums, hyper_c, inputs.hyper_affine())
        source = last if delayed else hyper_h
        z = F.linear(source, inputs.z_weight, inputs.padded_bias())
        d_h, d_x, b = torch.bmm(by_gate(z, 12), inputs.weight).split(4)
        sums = d_h * by_gate(main_h) + d_x * by_gate(main_part) + b + inputs.base
        h, c = _plain_update(sums, c, inputs.affine())
        outputs.append(h)
    return torch.stack(outputs), c, hyper_h, hyper_c


def _plain_update(sums: Tensor, c: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    y = affine.gain * F.layer_norm(sums, c.shape[1:], eps=EPSILON) + affine.shift
    i, f, o = torch.sigmoid(y[:3]).unbind()
    c = f * c + i * torch.tanh(y[3])
    cell = F.layer_norm(c, c.shape[1:], affine.cell_gain, affine.cell_shift, EPSILON)
    return o * torch.tanh(cell), c


class _Kept(NamedTuple):
    """What the step back through an `_Update` needs of the step forward."""

    sums: Tensor
    c: Tensor
    normal: Tensor
    gates: Tensor
    new_c: Tensor
    cell_normal: Tensor
    cell: Tensor
    keep: Tensor | None
    moments: list[Tensor]
    cell_moments: list[Tensor]


class _Update:
    """`LSTMUpdate` with layer normalisation, forwards and backwards through the steps
    of a sequence."""

    def __init__(self, affine: Affine, dropout: float = 0.0):
        self.affine, self.dropout, self.size = affine, dropout, affine.cell_gain.shape
        self.tape: list[_Kept] = []

    def forward(self, sums: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Sums (4, B, H) and cell (B, H) to the next (h, c)."""
        gain, shift, cell_gain, cell_shift = self.affine
        normal, *moments = normalise(sums, self.size, None, None, EPSILON)
        gates = torch.addcmul(shift, normal, gain)
        gates[:3].sigmoid_()
        gates[3].tanh_()
        i, f, o, g = gates.unbind()
        keep = F.dropout(torch.ones_like(c), self.dropout) if self.dropout else None
        new_c = (f * c).addcmul_(i, g if keep is None else g * keep)
        cell_normal, *cell_moments = normalise(new_c, self.size, None, None, EPSILON)
        cell = torch.addcmul(cell_shift, cell_normal, cell_gain).tanh_()
        kept = (sums, c, normal, gates, new_c, cell_normal, cell, keep)
        self.tape.append(_Kept(*kept, moments, cell_moments))
        return o * cell, new_c

    def start_back(self) -> None:
        """Set the gradients to zero; they are summed over the steps first, and over the
        batch at the end."""
        like = self.tape[0].gates, self.tape[0].gates, self.tape[0].cell
        self.gradients = [torch.zeros_like(each) for each in (*like, like[2])]

    def backward(self, t: int, d_h: Tensor, d_c: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of (h, c) after step t to those of its sums and of the cell before
        it."""
        was = self.tape[t]
        (i, f, o, g), keep = was.gates.unbind(), was.keep
        d_cell = tanh_backward(d_h * o, was.cell)
        self._add(2, d_cell, was.cell_normal)
        d_cell = d_cell * self.affine.cell_gain
        d_c = self._through_norm(d_cell, was.new_c, was.cell_moments).add_(d_c)
        kept = d_c if keep is None else d_c * keep
        d_gates = torch.stack((kept * g, d_c * was.c, d_h * was.cell, kept * i))
        sigmoid_backward_into(d_gates[:3], was.gates[:3], grad_input=d_gates[:3])
        tanh_backward_into(d_gates[3], g, grad_input=d_gates[3])
        self._add(0, d_gates, was.normal)
        d_sums = self._through_norm(d_gates * self.affine.gain, was.sums, was.moments)
        return d_sums, d_c * f

    def _add(self, place: int, gradient: Tensor, normal: Tensor) -> None:
        self.gradients[place].addcmul_(gradient, normal)  # of the gain
        self.gradients[place + 1].add_(gradient)  # of the shift

    def _through_norm(
        self, gradient: Tensor, before: Tensor, moments: list[Tensor]
    ) -> Tensor:
        only = [True, False, False]
        return normalise_backward(
            gradient, before, self.size, *moments, None, None, only
        )[0]

    def affine_gradients(self) -> list[Tensor]:
        """Of gain, shift, cell_gain and cell_shift."""
        return [d.sum(-2, keepdim=d.ndim == 3) for d in self.gradients]


class _Step(NamedTuple):
    """What one step of the sequence keeps for the way back."""

    h: Tensor
    last: Tensor
    source: Tensor
    z: Tensor
    d: Tensor
    main_h: Tensor
    main_part: Tensor


class _HyperSequence(torch.autograd.Function):
    """`hyper_sequence` as a node of the graph."""

    @staticmethod
    def forward(ctx: Any, dropout: float, delayed: bool, *tensors: Tensor) -> tuple:
        inputs = HyperInputs(*tensors)
        hyper_update = _Update(inputs.hyper_affine())
        update = _Update(inputs.affine(), dropout)
        h, c, hyper_h, hyper_c = inputs[2:6]
        width, tape, outputs = inputs.hyper_x.shape[2], [], []
        z_bias, hidden = inputs.padded_bias(), inputs.hidden_weight.t().contiguous()
        all_of_h = h.new_empty(len(inputs.hyper_x), len(h), hidden.shape[1])
        parts = zip(inputs.hyper_x, inputs.main_x, all_of_h, strict=True)
        for hyper_part, main_part, of_h in parts:
            torch.mm(h, hidden, out=of_h)
            last, sums = hyper_h, hyper_part + of_h[:, :width]
            sums = torch.addmm(sums, hyper_h, inputs.hyper_hidden_weight.t())
            hyper_h, hyper_c = hyper_update.forward(by_gate(sums), hyper_c)
            source = last if delayed else hyper_h
            z = torch.addmm(z_bias, source, inputs.z_weight.t())  # (B, 12 n_z)
            d = torch.bmm(by_gate(z, 12), inputs.weight)  # (12, B, H)
            main_h, main_part = by_gate(of_h[:, width:]), by_gate(main_part)
            tape.append(_Step(h, last, source, z, d, main_h, main_part))
            sums = (d[8:] + inputs.base).addcmul_(d[:4], main_h)
            h, c = update.forward(sums.addcmul_(d[4:8], main_part), c)
            outputs.append(h)
        ctx.save_for_backward(*tensors)
        ctx.settings, ctx.tape = (dropout, delayed), tape
        ctx.updates = hyper_update, update
        # what leaves is not what the tape holds
        return torch.stack(outputs), c.clone(), hyper_h.clone(), hyper_c.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = HyperInputs(*ctx.saved_tensors)  # an error where one was overwritten
        if torch.is_grad_enabled():  # the gradient may itself be differentiated
            return None, None, *_differentiable(ctx, inputs, gradients)
        kept = (ctx.tape, *ctx.updates, ctx.settings[1])
        return None, None, *_back(inputs, *kept, *gradients)


def _differentiable(
    ctx: Any, inputs: HyperInputs, gradients: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """The gradients by autograd through the plain loop."""
    dropout, delayed = ctx.settings
    if dropout:
        raise RecurrentError(
            "a HyperLSTM with recurrent dropout has no second derivative in training"
            " mode; call .eval() or set recurrent_dropout=0."
        )
    # each place has a name of its own, so that one tensor in two counts once in each
    named = HyperInputs(*(tensor.view_as(tensor) for tensor in inputs))
    wanted = [place for place, own in enumerate(named) if own.requires_grad]
    outputs = zip(plain_sequence(named, delayed), gradients, strict=True)
    reached = [pair for pair in outputs if pair[0].requires_grad]
    found = torch.autograd.grad(
        [output for output, _ in reached],
        [named[place] for place in wanted],
        [gradient for _, gradient in reached],
        create_graph=True,
        allow_unused=True,
    )
    of = dict(zip(wanted, found, strict=True))
    return [of.get(place) for place in range(len(inputs))]


def _back(
    inputs: HyperInputs,
    tape: list[_Step],
    hyper_update: _Update,
    update: _Update,
    delayed: bool,
    d_outputs: Tensor,
    d_c: Tensor,
    d_hyper_h: Tensor,
    d_hyper_c: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of all inputs, from those of what `hyper_sequence` returns."""
    hyper_update.start_back()
    update.start_back()
    steps, batch, size = d_outputs.shape
    width, d_weight = len(inputs.hyper_hidden_weight), torch.zeros_like(inputs.weight)
    d_of_h = d_outputs.new_empty(steps, batch, len(inputs.hidden_weight))
    d_main_x = d_outputs.new_empty(steps, batch, 4 * size)
    d_z = d_outputs.new_empty(steps, batch, len(inputs.z_weight))
    d_base, d_h = d_outputs.new_zeros(4, batch, size), torch.zeros_like(d_outputs[0])
    for t in reversed(range(steps)):
        was = tape[t]
        d_sums, d_c = update.backward(t, d_h + d_outputs[t], d_c)
        d_d = torch.cat((d_sums * was.main_h, d_sums * was.main_part, d_sums))
        torch.mul(d_sums, was.d[:4], out=by_gate(d_of_h[t, :, width:]))
        torch.mul(d_sums, was.d[4:8], out=by_gate(d_main_x[t]))
        d_base.add_(d_sums)
        d_weight.baddbmm_(by_gate(was.z, 12).transpose(1, 2), d_d)
        of_d = torch.bmm(inputs.weight, d_d.transpose(1, 2)).transpose(1, 2)
        by_gate(d_z[t], 12).copy_(of_d)
        of_z = d_z[t] @ inputs.z_weight
        of_hyper_h = d_hyper_h if delayed else d_hyper_h + of_z
        d_hyper_sums, d_hyper_c = hyper_update.backward(t, of_hyper_h, d_hyper_c)
        by_gate(d_of_h[t, :, :width]).copy_(d_hyper_sums)
        d_hyper_h = d_of_h[t, :, :width] @ inputs.hyper_hidden_weight
        if delayed:
            d_hyper_h.add_(of_z)
        d_h = d_of_h[t] @ inputs.hidden_weight
    states = (d_h, d_c, d_hyper_h, d_hyper_c)
    weights = _of_weights(inputs, tape, d_of_h, d_z)
    affine = *hyper_update.affine_gradients(), *update.affine_gradients()
    small = d_weight, d_base.sum(1, True)
    return d_of_h[..., :width], d_main_x, *states, *weights, *small, *affine


def _of_weights(
    inputs: HyperInputs, tape: list[_Step], d_of_h: Tensor, d_z: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of the four large weights, each one product over all steps."""
    width = len(inputs.hyper_hidden_weight)
    all_h = torch.cat([step.h for step in tape])
    all_last = torch.cat([step.last for step in tape])
    all_source = torch.cat([step.source for step in tape])
    flat, flat_z = d_of_h.flatten(0, 1), d_z.flatten(0, 1)
    return (
        flat.t() @ all_h,
        flat[:, :width].t() @ all_last,
        flat_z.t() @ all_source,
        flat_z[:, : len(inputs.z_bias)].sum(0),
    )
