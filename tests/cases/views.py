"""PyTorch tensors that do not begin where their memory does."""

import torch


def behind_three_others(y: torch.Tensor) -> torch.Tensor:
    """`y`, whose gradient is a view that begins 3 elements into its memory."""
    return torch.cat([y.new_zeros(3), y.reshape(-1)])[3:].reshape(y.shape)
