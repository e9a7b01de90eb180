"""A HyperLSTM layer over a whole sequence as one node of the graph, with its gradient
written by hand.

It computes what `HyperLSTMCell.step` in a loop computes, and a test compares the two.
Autograd would record some sixty small operations a step, and add one step's gradient of
every weight to the last's. Here a step back is thirty operations, and the gradient of
each large weight is one product over all steps at the end.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minisupernet.recurrent import by_gate

__all__ = ["hyper_sequence"]

EPSILON = 1e-5  # in the variance, as in nn.LayerNorm
normalise = torch.native_layer_norm
normalise_backward = torch.ops.aten.native_layer_norm_backward.default
sigmoid_backward_into = torch.ops.aten.sigmoid_backward.grad_input
tanh_backward = torch.ops.aten.tanh_backward.default
tanh_backward_into = torch.ops.aten.tanh_backward.grad_input


class _Update:
    """`LSTMUpdate` with layer normalisation, forwards and backwards through the steps
    of a sequence.
    """

    def __init__(
        self,
        gain: Tensor,
        shift: Tensor,
        cell_gain: Tensor,
        cell_shift: Tensor,
        dropout: float = 0.0,
    ):
        self.affine, self.dropout, self.size = (
            (gain, shift, cell_gain, cell_shift),
            dropout,
            cell_gain.shape,
        )
        self.tape: list[tuple] = []  # what each step back needs

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
        self.tape.append(
            (
                sums,
                c,
                normal,
                gates,
                new_c,
                cell_normal,
                cell,
                keep,
                *moments,
                *cell_moments,
            )
        )
        return o * cell, new_c

    def start_back(self) -> None:
        """Set the gradients to zero; they are summed over the steps first, and over the
        batch at the end.
        """
        gates, cell = self.tape[0][3], self.tape[0][4]
        self.gradients = [torch.zeros_like(like) for like in (gates, gates, cell, cell)]

    def backward(self, t: int, d_h: Tensor, d_c: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of (h, c) after step t to those of its sums and of the cell before
        it.
        """
        sums, c, normal, gates, new_c, cell_normal, cell, keep, *moments = self.tape[t]
        (i, f, o, g), (gain, _, cell_gain, _) = gates.unbind(), self.affine
        d_cell = tanh_backward(d_h * o, cell)
        self._add(2, d_cell, cell_normal)
        d_c = self._through_norm(d_cell * cell_gain, new_c, moments[2:]).add_(d_c)
        kept = d_c if keep is None else d_c * keep
        d_gates = torch.stack((kept * g, d_c * c, d_h * cell, kept * i))
        sigmoid_backward_into(d_gates[:3], gates[:3], grad_input=d_gates[:3])
        tanh_backward_into(d_gates[3], g, grad_input=d_gates[3])
        self._add(0, d_gates, normal)
        return self._through_norm(d_gates * gain, sums, moments[:2]), d_c * f

    def _add(self, place: int, gradient: Tensor, normal: Tensor) -> None:
        self.gradients[place].addcmul_(gradient, normal)  # of the gain
        self.gradients[place + 1].add_(gradient)  # of the shift

    def _through_norm(
        self, gradient: Tensor, before: Tensor, moments: list[Tensor]
    ) -> Tensor:
        return normalise_backward(
            gradient, before, self.size, *moments, None, None, [True, False, False]
        )[0]

    def affine_gradients(self) -> list[Tensor]:
        """Of gain, shift, cell_gain and cell_shift."""
        return [d.sum(-2, keepdim=d.ndim == 3) for d in self.gradients]


def hyper_sequence(
    *arguments: Tensor | float | bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a whole sequence of a HyperLSTM layer with layer normalisation.

    Args:
        arguments: what `prepare` makes, hyper_x (T, B, 4 hyper_size) and main_x (T, B,
            4 H); the state h, c, hyper_h, hyper_c; the weights, named as in
            `HyperLSTMCell`, and the affine parameters of the small and of the main
            network; the recurrent dropout; whether the scalings are delayed.

    Returns:
        h of all steps (T, B, H), then c, hyper_h and hyper_c after the last.
    """
    return _HyperSequence.apply(*arguments)


class _HyperSequence(torch.autograd.Function):
    """`hyper_sequence` as a node of the graph."""

    @staticmethod
    def forward(
        ctx,
        hyper_x,
        main_x,
        h,
        c,
        hyper_h,
        hyper_c,
        hidden_weight,
        hyper_hidden_weight,
        z_weight,
        z_bias,
        weight,
        base,
        *rest,
    ):
        hyper_update, update = _Update(*rest[:4]), _Update(*rest[4:8], dropout=rest[8])
        ctx.delayed = rest[9]
        width, tape, outputs = hyper_x.shape[2], [], []
        z_bias = F.pad(z_bias, (0, len(z_weight) - len(z_bias)))
        hidden_weight_t = hidden_weight.t().contiguous()
        all_of_h = h.new_empty(len(hyper_x), len(h), len(hidden_weight))
        for hyper_part, main_part, of_h in zip(hyper_x, main_x, all_of_h, strict=True):
            torch.mm(h, hidden_weight_t, out=of_h)
            last = hyper_h
            sums = torch.addmm(
                hyper_part + of_h[:, :width], hyper_h, hyper_hidden_weight.t()
            )
            hyper_h, hyper_c = hyper_update.forward(by_gate(sums), hyper_c)
            source = last if ctx.delayed else hyper_h
            z = torch.addmm(z_bias, source, z_weight.t())  # (B, 12 n_z)
            d = torch.bmm(by_gate(z, 12), weight)  # (12, B, H)
            main_h, main_part = by_gate(of_h[:, width:]), by_gate(main_part)
            tape.append((h, last, source, z, d, main_h, main_part))
            h, c = update.forward(
                (d[8:] + base).addcmul_(d[:4], main_h).addcmul_(d[4:8], main_part), c
            )
            outputs.append(h)
        ctx.save_for_backward(hidden_weight, hyper_hidden_weight, z_weight, weight)
        ctx.tape, ctx.updates = tape, (hyper_update, update)
        return (
            torch.stack(outputs),
            c.clone(),
            hyper_h.clone(),
            hyper_c.clone(),
        )  # not what the tape holds

    @staticmethod
    @once_differentiable
    def backward(ctx, d_outputs, d_c, d_hyper_h, d_hyper_c):
        hidden_weight, hyper_hidden_weight, z_weight, weight = ctx.saved_tensors
        hyper_update, update = ctx.updates
        hyper_update.start_back()
        update.start_back()
        steps, batch, size = d_outputs.shape
        width, d_weight = len(hyper_hidden_weight), torch.zeros_like(weight)
        d_of_h = d_outputs.new_empty(steps, batch, len(hidden_weight))
        d_main_x = d_outputs.new_empty(steps, batch, 4 * size)
        d_z = d_outputs.new_empty(steps, batch, len(z_weight))
        d_base, d_h = (
            d_outputs.new_zeros(4, batch, size),
            torch.zeros_like(d_outputs[0]),
        )
        for t in reversed(range(steps)):
            h, last, source, z, d, main_h, main_part = ctx.tape[t]
            d_sums, d_c = update.backward(t, d_h + d_outputs[t], d_c)
            d_d = torch.cat((d_sums * main_h, d_sums * main_part, d_sums))  # (12, B, H)
            torch.mul(d_sums, d[:4], out=by_gate(d_of_h[t, :, width:]))
            torch.mul(d_sums, d[4:8], out=by_gate(d_main_x[t]))
            d_base.add_(d_sums)
            d_weight.baddbmm_(by_gate(z, 12).transpose(1, 2), d_d)
            by_gate(d_z[t], 12).copy_(
                torch.bmm(weight, d_d.transpose(1, 2)).transpose(1, 2)
            )
            of_z = d_z[t] @ z_weight
            of_hyper_h = d_hyper_h if ctx.delayed else d_hyper_h + of_z
            d_hyper_sums, d_hyper_c = hyper_update.backward(t, of_hyper_h, d_hyper_c)
            by_gate(d_of_h[t, :, :width]).copy_(d_hyper_sums)
            d_hyper_h = d_of_h[t, :, :width] @ hyper_hidden_weight
            if ctx.delayed:
                d_hyper_h.add_(of_z)
            d_h = d_of_h[t] @ hidden_weight
        all_h, all_last, all_source = (
            torch.cat([step[n] for step in ctx.tape]) for n in range(3)
        )
        flat, flat_z = d_of_h.flatten(0, 1), d_z.flatten(0, 1)
        return (
            d_of_h[..., :width],
            d_main_x,
            d_h,
            d_c,
            d_hyper_h,
            d_hyper_c,
            flat.t() @ all_h,
            flat[:, :width].t() @ all_last,
            flat_z.t() @ all_source,
            flat_z[:, : 2 * len(z_weight) // 3].sum(0),
            d_weight,
            d_base.sum(1, True),
            *hyper_update.affine_gradients(),
            *update.affine_gradients(),
            None,
            None,
        )
