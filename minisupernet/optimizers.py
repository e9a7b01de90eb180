"""TensorFlow 1's RMSProp, which the original SuperNet was trained with."""

import torch
from torch import Tensor

__all__ = ["TensorFlowRMSprop"]


class TensorFlowRMSprop(torch.optim.Optimizer):
    """RMSProp by TensorFlow 1's rule, which the original SuperNet was trained with; not
    torch.optim.RMSprop's.

    ms <- decay ms + (1 - decay) g^2, starting at 1;  w <- w - lr g / sqrt(ms +
    epsilon), epsilon inside the root (`tf.train.RMSPropOptimizer`, momentum 0).

    A sparse gradient, as one-hot inputs give, is handled exactly: where a row had no
    gradient the dense rule moves no weight and only decays ms, so a row's missed decays
    are made up when it is next used.
    """

    def __init__(
        self, params, lr: float = 1e-4, decay: float = 0.9, epsilon: float = 1e-10
    ) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "epsilon": epsilon})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict) -> None:
        slots = self.state[parameter]
        if not slots:
            slots["mean_square"] = torch.ones_like(parameter)
            slots["steps"] = torch.zeros((), dtype=torch.int64)
            slots["seen"] = torch.zeros(
                parameter.shape[:1], dtype=torch.int64
            )  # step at which a row was last used
        slots["steps"] += 1
        if not parameter.grad.is_sparse:
            _rmsprop(parameter, slots["mean_square"], parameter.grad, group)
            return
        gradient = parameter.grad.coalesce()
        rows = gradient.indices()[0]
        gap = (
            slots["steps"] - slots["seen"][rows.cpu()] - 1
        )  # decays missed since the row's last use
        slots["seen"][rows.cpu()] = slots["steps"]
        missed = (group["decay"] ** gap.to(parameter.dtype)).to(parameter.device)
        values, mean_square = (
            parameter[rows],
            slots["mean_square"][rows]
            * missed.unflatten(0, (-1, *[1] * (parameter.ndim - 1))),
        )
        _rmsprop(values, mean_square, gradient.values(), group)
        parameter[rows], slots["mean_square"][rows] = values, mean_square


def _rmsprop(
    weights: Tensor, mean_square: Tensor, gradient: Tensor, group: dict
) -> None:
    """One step of the rule, in place."""
    mean_square.mul_(group["decay"]).addcmul_(
        gradient, gradient, value=1 - group["decay"]
    )
    weights.addcdiv_(
        gradient, (mean_square + group["epsilon"]).sqrt_(), value=-group["lr"]
    )
