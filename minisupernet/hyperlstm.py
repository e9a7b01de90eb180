"""Dynamic hypernetworks: a small recurrent network that rescales the weights of a
larger one at every step.

Ha, Dai and Le, "HyperNetworks", section 3.2 and appendix A.2. For each weight matrix W
of the main network the small one puts out a vector d, and diag(d) W is the matrix in
use at this step: each row of W, scaled.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.errors import RecurrentError
from minisupernet.fast.hyperlstm import HyperInputs, hyper_sequence
from minisupernet.recurrent import (
    LSTMUpdate,
    Recurrent,
    RecurrentCell,
    State,
    by_gate,
    orthogonal_blocks,
)

__all__ = ["HyperLSTM", "HyperLSTMCell", "HyperRNNCell", "HyperState", "ScalingHeads"]


class ScalingHeads(nn.Module):
    """From the small network's state to row scalings d_h and d_x and biases b, for each
    gate of the main network.

    Equations 7, 11 and 12: z_h = A h + a, d_h = D z_h, the same for x, and b = D z_b +
    b_0 with z_b = A h. All gates are computed together. At the start every scaling is
    `scale`, whatever the state, and every bias is b_0 (appendix A.2.3): A is 0 and a is
    1 for the scalings, so that each z is a vector of n_z ones, and D is scale / n_z;
    for the biases A is N(0, 0.01 squared) and D is 0. In this start the n_z numbers of
    one z are interchangeable, so they get equal gradients and stay equal: n_z of them
    do no more than one. A `spread` above 0 tells them apart.

    Args:
        gates: number of gates of the main network, 4 in an LSTM and 1 in a plain RNN.
        hyper_size, hidden_size: state sizes of the small network and of the main one.
        n_z: numbers in each z, the width of the bottleneck.
        scale: where every scaling starts.
        spread: standard deviation of A for the scalings at the start; 0 in the paper.
    """

    def __init__(
        self,
        gates: int,
        hyper_size: int,
        hidden_size: int,
        n_z: int = 4,
        *,
        scale: float = 0.1,
        spread: float = 0.0,
    ) -> None:
        super().__init__()
        if n_z < 1:
            raise RecurrentError(f"n_z must be a whole number from 1, not {n_z}.")
        self.gates, self.n_z = gates, n_z
        self.z_weight = nn.Parameter(
            torch.zeros(3 * gates * n_z, hyper_size)
        )  # A for z_h, z_x and z_b of all gates
        self.z_bias = nn.Parameter(torch.ones(2 * gates * n_z))  # a; z_b has none
        self.weight = nn.Parameter(torch.zeros(3 * gates, n_z, hidden_size))  # D
        self.base = nn.Parameter(torch.zeros(gates, 1, hidden_size))  # b_0
        nn.init.normal_(self.z_weight[: 2 * gates * n_z], std=spread)
        nn.init.normal_(self.z_weight[2 * gates * n_z :], std=0.01)
        nn.init.constant_(self.weight[: 2 * gates], scale / n_z)

    def forward(self, hyper_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = F.linear(
            hyper_h, self.z_weight, F.pad(self.z_bias, (0, self.gates * self.n_z))
        )  # (B, 3 gates n_z)
        d_h, d_x, b = torch.bmm(by_gate(z, 3 * self.gates), self.weight).split(
            self.gates
        )  # (gates, B, H) each
        return d_h, d_x, b + self.base


class _HyperCell(RecurrentCell):
    """What HyperRNN and HyperLSTM share: the weights of both networks and all sums that
    go into their gates.

    The small network sees [h; x], the main network's last output and the input. Its
    weights for h lie on top of the main network's, so that one product of h serves
    both.
    """

    def __init__(
        self,
        gates: int,
        input_size: int,
        sizes: tuple[int, ...],
        delayed: bool,
        heads: ScalingHeads,
    ):
        super().__init__(input_size, *sizes)
        hyper_size = sizes[-1]
        self.gates, self.delayed, self.split = (
            gates,
            delayed,
            [gates * hyper_size, gates * sizes[0]],
        )
        of_h, of_x = orthogonal_blocks(gates, hyper_size, sizes[0] + input_size).split(
            [sizes[0], input_size], dim=1
        )
        self.hyper_input_weight = nn.Parameter(of_x.contiguous())
        self.hyper_bias = nn.Parameter(torch.zeros(gates * hyper_size))
        self.hyper_hidden_weight = nn.Parameter(
            orthogonal_blocks(gates, hyper_size, hyper_size)
        )
        self.input_weight = nn.Parameter(orthogonal_blocks(gates, sizes[0], input_size))
        self.hidden_weight = nn.Parameter(
            torch.cat([of_h, orthogonal_blocks(gates, sizes[0], sizes[0])])
        )
        self.heads = heads

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What both networks need of the input, for all steps in two products."""
        return F.linear(x, self.hyper_input_weight, self.hyper_bias), F.linear(
            x, self.input_weight
        )

    def hyper_sums(
        self, hyper_x: Tensor, h: Tensor, hyper_h: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums of the small network's gates (gates, B, hyper_size), and W_h h of the
        main one (gates, B, H).
        """
        of_h, main_h = F.linear(h, self.hidden_weight).split(self.split, dim=1)
        sums = torch.addmm(
            hyper_x + of_h, hyper_h, self.hyper_hidden_weight.t()
        )  # (B, gates * hyper_size)
        return by_gate(sums, self.gates), by_gate(main_h, self.gates)

    def main_sums(self, hyper_h: Tensor, main_h: Tensor, main_x: Tensor) -> Tensor:
        """The sums of the main network's gates (gates, B, H): d_h * W_h h + d_x * W_x x
        + b.
        """
        d_h, d_x, b = self.heads(hyper_h)
        return d_h * main_h + d_x * by_gate(main_x, self.gates) + b


class HyperRNNCell(_HyperCell):
    """A plain RNN whose rows of weights are rescaled at every step by a smaller RNN (Ha
    et al., eqs. 6 to 8).

    h' = tanh(d_h * W_h h + d_x * W_x x + b), with d_h, d_x and b from `ScalingHeads`.
    State (h, hyper_h), of shapes (B, hidden_size) and (B, hyper_size).

    Args:
        n_z: numbers in each vector z between the small network's state and the
            scalings.
        delayed: make the scalings from the small network's last state, as equation 6 is
            printed, not from its new one.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        hyper_size: int = 32,
        n_z: int = 4,
        *,
        delayed: bool = False,
    ) -> None:
        heads = ScalingHeads(1, hyper_size, hidden_size, n_z)
        super().__init__(1, input_size, (hidden_size, hyper_size), delayed, heads)

    def step(self, prepared: tuple[Tensor, ...], state: State) -> State:
        """From what `prepare` made of one input and the state (h, hyper_h) to the next
        state.
        """
        (hyper_x, main_x), (h, last_hyper_h) = prepared, state
        sums, main_h = self.hyper_sums(hyper_x, h, last_hyper_h)
        hyper_h = torch.tanh(sums[0])
        return (
            torch.tanh(
                self.main_sums(
                    last_hyper_h if self.delayed else hyper_h, main_h, main_x
                )[0]
            ),
            hyper_h,
        )


class HyperState(NamedTuple):
    """The state of a HyperLSTM: h and c of the main LSTM (B, hidden_size), of the small
    one (B, hyper_size).
    """

    h: Tensor
    c: Tensor
    hyper_h: Tensor
    hyper_c: Tensor


class HyperLSTMCell(_HyperCell):
    """An LSTM step whose rows of weights are rescaled at every step by a smaller LSTM
    (Ha et al., eqs. 10 to 13).

    The interface is nn.LSTMCell's, with a `HyperState` for (h, c). The small LSTM has
    layer normalisation, sees [h; x] and makes, for each gate y of the main one, y =
    LN(d_h * W_h h + d_x * W_x x + b).

    Args:
        n_z: numbers in each vector z between the small LSTM's state and the scalings.
        recurrent_dropout: on the main LSTM's candidate, in training mode only.
        layer_norm: False gives the main LSTM of the paper's "HyperLSTM" rows, without
            layer normalisation.
        forget_bias: where the bias of both forget gates starts. The paper has none (0);
            its authors' code adds 1.
        delayed: make the scalings from the small LSTM's last state, as equation 11 is
            printed. The authors' code makes them from its new state, as here: so the
            weights depend on the input that they are applied to.
        spread: how far apart the n_z numbers of a z start, as in `ScalingHeads`; 0 in
            the paper.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        hyper_size: int = 32,
        n_z: int = 4,
        *,
        recurrent_dropout: float = 0.0,
        layer_norm: bool = True,
        forget_bias: float = 1.0,
        delayed: bool = False,
        spread: float = 0.0,
    ) -> None:
        heads = ScalingHeads(4, hyper_size, hidden_size, n_z, spread=spread)
        super().__init__(
            4,
            input_size,
            (hidden_size, hidden_size, hyper_size, hyper_size),
            delayed,
            heads,
        )
        self.hyper_update = LSTMUpdate(hyper_size, forget_bias=forget_bias)
        self.update = LSTMUpdate(
            hidden_size, recurrent_dropout, forget_bias, layer_norm
        )
        if not layer_norm:  # then b_0 is what shifts the gate
            nn.init.constant_(self.heads.base[1], forget_bias)

    def step(self, prepared: tuple[Tensor, ...], state: State) -> HyperState:
        """From what `prepare` made of one input and the state before it to the state
        after it.
        """
        (hyper_x, main_x), (h, c, last_hyper_h, hyper_c) = prepared, state
        sums, main_h = self.hyper_sums(hyper_x, h, last_hyper_h)
        hyper_h, hyper_c = self.hyper_update(sums, hyper_c)
        sums = self.main_sums(last_hyper_h if self.delayed else hyper_h, main_h, main_x)
        return HyperState(*self.update(sums, c), hyper_h, hyper_c)

    def run(
        self, prepared: tuple[Tensor, ...], state: State
    ) -> tuple[Tensor, HyperState]:
        """All steps: `step` in a loop, or with layer normalisation `hyper_sequence`,
        which is faster.
        """
        if not self.update.layer_norm:
            return super().run(prepared, state)
        heads, dropout = self.heads, self.update.dropout * self.training
        inputs = HyperInputs(
            *prepared,
            *state,
            self.hidden_weight,
            self.hyper_hidden_weight,
            *heads.parameters(),
            *self.hyper_update.affine(),
            *self.update.affine(),
        )
        outputs, *last = hyper_sequence(inputs, dropout, self.delayed)
        return outputs, HyperState(outputs[-1], *last)


class HyperLSTM(Recurrent):
    """`HyperLSTMCell` run over a sequence, with nn.LSTM's arguments and the keywords of
    the cell.

    What differs from nn.LSTM: the state is a `HyperState` of four tensors, (layers, B,
    size) each, so write `outputs, state = network(x)`, then `state.h` and `state.c`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, *arguments: int, **settings: float
    ) -> None:
        super().__init__(HyperLSTMCell, input_size, hidden_size, *arguments, **settings)

    def forward(
        self, x: Tensor, state: State | None = None
    ) -> tuple[Tensor, HyperState]:
        outputs, last = super().forward(x, state)
        return outputs, HyperState(*last)
