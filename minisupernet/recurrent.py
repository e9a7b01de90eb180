"""What the recurrent networks here share: the end of an LSTM step, and one loop over
steps with nn.LSTM's interface.

Also the baseline of chapter 4, an LSTM with layer normalisation.
"""

import inspect
from collections.abc import Iterable
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.errors import RecurrentError

__all__ = [
    "LSTMUpdate",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "Recurrent",
    "RecurrentCell",
    "State",
    "by_gate",
    "orthogonal_blocks",
]

State = tuple[Tensor, ...]  # each (B, size); the first is the output h


def orthogonal_blocks(blocks: int, rows: int, columns: int) -> Tensor:
    """A weight (blocks * rows, columns) in which each block of rows, one a gate, is a
    random orthogonal matrix.
    """
    return torch.cat(
        [nn.init.orthogonal_(torch.empty(rows, columns)) for _ in range(blocks)]
    )


def by_gate(sums: Tensor, gates: int = 4) -> Tensor:
    """(B, gates * size) to a view (gates, B, size)."""
    return sums.view(len(sums), gates, -1).transpose(0, 1)


def _check_sizes(*values: object) -> None:
    """Raise RecurrentError where one is no whole number from 1."""
    if not all(isinstance(value, Integral) and value >= 1 for value in values):
        raise RecurrentError(f"sizes must be whole numbers from 1, not {values}.")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise RecurrentError(f"{name} must be from 0 to below 1, not {value}.")


def _found(x: object) -> object:
    """What stands where a tensor should, in few words."""
    return tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__


def _check_dtypes(network: nn.Module, *tensors: Tensor) -> None:
    """RecurrentError for a tensor of another dtype than the weights', unless autocast
    converts both.
    """
    own, device = next(network.parameters()).dtype, tensors[0].device.type
    fitting = {own}
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        fitting |= {torch.float32, torch.bfloat16, torch.float16}
    if others := {tensor.dtype for tensor in tensors} - fitting:
        raise RecurrentError(
            f"inputs and state must be {own}, as the weights are, not {others.pop()};"
            " convert them, or the network, with .to()."
        )


class LSTMUpdate(nn.Module):
    """The end of an LSTM step: gates from their sums, then the new cell and output (Ha
    et al., eqs. 10 and 13).

    The gates come in the order i, f, o, g. With layer normalisation each gate's sums
    and the cell are normalised.

    Args:
        dropout: recurrent dropout on the candidate g, in training mode only.
        forget_bias: where the shift of the forget gate starts; it is trained. Without
            layer normalisation there is no shift, and whoever makes the sums has to add
            it.
    """

    def __init__(
        self,
        size: int,
        dropout: float = 0.0,
        forget_bias: float = 1.0,
        layer_norm: bool = True,
    ) -> None:
        super().__init__()
        _check_share("recurrent_dropout", dropout)
        self.size, self.dropout, self.layer_norm = size, dropout, layer_norm
        if layer_norm:
            self.gain = nn.Parameter(torch.ones(4, 1, size))
            self.shift = nn.Parameter(torch.zeros(4, 1, size))
            self.cell_norm = nn.LayerNorm(size)
            nn.init.constant_(self.shift[1], forget_bias)

    def forward(self, sums: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        y = sums  # (4, B, H)
        if self.layer_norm:
            y = self.gain * F.layer_norm(y, (self.size,)) + self.shift
        i, f, o = torch.sigmoid(y[:3]).unbind()  # (B, H) each
        g = F.dropout(torch.tanh(y[3]), self.dropout, self.training)
        c = f * c + i * g
        return o * torch.tanh(self.cell_norm(c) if self.layer_norm else c), c

    def affine(self) -> tuple[Tensor, ...]:
        """The parameters: gain and shift of the gates (4, 1, H), then of the cell
        (H,).
        """
        return self.gain, self.shift, self.cell_norm.weight, self.cell_norm.bias


class RecurrentCell(nn.Module):
    """One step of a recurrent network: x (B, input_size) and a state to the next state,
    whose first tensor is h.

    A cell defines `prepare`, the products that need only the input, done for all steps
    at once, and `step`, the rest.

    Args:
        sizes: widths of the tensors of the state, that of h first.
    """

    def __init__(self, input_size: int, *sizes: int) -> None:
        super().__init__()
        _check_sizes(input_size, *sizes)
        self.input_size, self.sizes = input_size, sizes

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """Inputs (..., input_size) to what `step` needs of them, with the same leading
        axes.
        """
        raise NotImplementedError

    def step(self, prepared: tuple[Tensor, ...], state: State) -> State:
        """One step, from what `prepare` made of its input and the state before it to
        the state after it.
        """
        raise NotImplementedError

    def run(self, prepared: tuple[Tensor, ...], state: State) -> tuple[Tensor, State]:
        """All steps, from what `prepare` made of inputs (T, B, input_size): outputs (T,
        B, H) and the last state.
        """
        outputs = []
        for parts in zip(*(part.unbind() for part in prepared), strict=True):
            state = self.step(parts, state)
            outputs.append(state[0])
        return torch.stack(outputs), state

    def forward(self, x: Tensor, state: State | None = None) -> State:
        fits = isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] == self.input_size
        if not fits or not len(x):
            raise RecurrentError(
                f"x must have shape (B, {self.input_size}) with B from 1, not"
                f" {_found(x)}."
            )
        state = self.check(state, x)
        _check_dtypes(self, x, *state)
        return self.step(self.prepare(x), state)

    def check(self, state: State | None, x: Tensor) -> State:
        """The state, zeros where it is None; RecurrentError where it does not fit the
        inputs (..., B, input_size).
        """
        shapes = [(x.shape[-2], size) for size in self.sizes]
        if state is None:
            return tuple(x.new_zeros(shape) for shape in shapes)
        if (found := _shapes(state)) != shapes:
            raise RecurrentError(
                f"the state must be tensors of shapes {shapes}, not {found}; None"
                " starts from zeros."
            )
        return state


def _shapes(state: Iterable[object]) -> list[object]:
    return [*map(_found, state)]


class Recurrent(nn.Module):
    """Cells stacked in layers and run over a sequence, in place of nn.LSTM.

    Inputs (T, B, input_size) to outputs (T, B, H) and the last state; with
    `batch_first` (B, T, ...) for both. Each tensor of a state has shape (layers, B,
    size); how many there are, and of which sizes, is the cell's to say. A state given
    back as the next call's goes on as one long sequence.

    Args:
        cell: the class of the cells; `settings` are its keywords.
        dropout: between layers, in training mode, as in nn.LSTM.
        bias, bidirectional, proj_size: nn.LSTM's; only their defaults can be had.

    Raises:
        RecurrentError: for what can't be had, for a packed sequence, and where an input
            or a state does not fit.
    """

    def __init__(
        self,
        cell: type[RecurrentCell],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: float | bool,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for option, given in (("bias", not bias), ("bidirectional", bidirectional)):
            if given:
                value = option != "bias"
                raise RecurrentError(f"{name} has no {option}={value}; leave it out.")
        if proj_size:
            raise RecurrentError(f"{name} has no projection; leave out proj_size.")
        _check_share("dropout", dropout)
        _check_sizes(input_size, hidden_size, num_layers)
        if dtype is not None and not dtype.is_floating_point:
            raise RecurrentError(f"dtype must be one of real floats, not {dtype}.")
        known = inspect.signature(cell).parameters
        if unknown := sorted(settings.keys() - known.keys()):
            raise RecurrentError(
                f"{name} has no {unknown[0]}; it takes nn.LSTM's arguments and"
                f" {', '.join(list(known)[2:])}."
            )
        widths = [input_size, *[hidden_size] * (num_layers - 1)]
        cells = [cell(width, hidden_size, **settings) for width in widths]
        self.cells = nn.ModuleList(cells).to(device, dtype)
        self.input_size, self.hidden_size = input_size, hidden_size
        self.num_layers, self.batch_first = num_layers, batch_first
        self.dropout = dropout

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        self._check(x, state)
        x = x.transpose(0, 1) if self.batch_first else x  # (T, B, input_size)
        last = []
        for layer, cell in enumerate(self.cells):
            if layer:
                x = F.dropout(x, self.dropout, self.training)
            own = None if state is None else tuple(tensor[layer] for tensor in state)
            x, now = cell.run(cell.prepare(x), cell.check(own, x))
            last.append(now)
        outputs = x.transpose(0, 1) if self.batch_first else x
        return outputs, tuple(map(torch.stack, zip(*last, strict=True)))

    def _check(self, x: Tensor, state: State | None) -> None:
        if isinstance(x, nn.utils.rnn.PackedSequence):
            raise RecurrentError(
                "packed sequences are not supported; pad them and mask the loss"
                " instead."
            )
        form = "(B, T, " if self.batch_first else "(T, B, "
        fits = isinstance(x, Tensor) and x.ndim == 3 and x.shape[2] == self.input_size
        if not fits or not x.numel():
            raise RecurrentError(
                f"x must have shape {form}{self.input_size}) with T and B from 1, not"
                f" {_found(x)}."
            )
        if state is not None:
            self._check_state(state, x.shape[0 if self.batch_first else 1])
        _check_dtypes(self, x, *(() if state is None else state))

    def _check_state(self, state: State, batch: int) -> None:
        shapes = [(self.num_layers, batch, size) for size in self.cells[0].sizes]
        if (found := _shapes(state)) != shapes:
            raise RecurrentError(
                f"the state must be {len(shapes)} tensors of shapes {shapes}, not"
                f" {found}; None starts from zeros."
            )


class LayerNormLSTMCell(RecurrentCell):
    """An LSTM step with layer normalisation; state (h, c), each (B, hidden_size). The
    arguments are `LSTMUpdate`'s.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        recurrent_dropout: float = 0.0,
        forget_bias: float = 1.0,
    ) -> None:
        super().__init__(input_size, hidden_size, hidden_size)
        self.input_weight = nn.Parameter(orthogonal_blocks(4, hidden_size, input_size))
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))
        self.hidden_weight = nn.Parameter(
            orthogonal_blocks(4, hidden_size, hidden_size)
        )
        self.update = LSTMUpdate(hidden_size, recurrent_dropout, forget_bias)

    def prepare(self, x: Tensor) -> tuple[Tensor]:
        """W_x x + b of all steps in one product."""
        return (F.linear(x, self.input_weight, self.bias),)

    def step(self, prepared: tuple[Tensor, ...], state: State) -> State:
        """From (W_x x + b,), (B, 4H), and the state (h, c) to the next state."""
        h, c = state
        sums = torch.addmm(prepared[0], h, self.hidden_weight.t())  # (B, 4H)
        return self.update(by_gate(sums), c)


class LayerNormLSTM(Recurrent):
    """`LayerNormLSTMCell` run over a sequence, with nn.LSTM's arguments; state (h, c).

    Further keywords are those of the cell.
    """

    def __init__(
        self, input_size: int, hidden_size: int, *arguments: int, **settings: float
    ) -> None:
        super().__init__(
            LayerNormLSTMCell, input_size, hidden_size, *arguments, **settings
        )
