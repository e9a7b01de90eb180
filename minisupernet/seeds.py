"""Randomness as a function of the step: what a seed and a step draw depends on nothing
else.
"""

import torch

__all__ = ["step_generator"]


def step_generator(
    seed: int, step: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The random numbers of one step of the run with this seed."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step + 1)
