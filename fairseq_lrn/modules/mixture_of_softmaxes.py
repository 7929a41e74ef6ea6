"""The mixture of softmaxes, an output layer for language models."""

import torch
import torch.nn as nn
from torch import Tensor

from .inputs import check_like


class MixtureOfSoftmaxes(nn.Module):
    """Mixture of softmaxes (Yang et al., ICLR 2018)::

    pi = softmax(x W)        h_k = tanh(x W_k + b_k)        p = sum over k of pi_k * softmax(output(h_k))

    Args:
        input_size: width of x
        num_softmaxes: K
        output_projection: ``nn.Linear`` from features, C wide, to scores of V words, the same for all k
    """

    def __init__(self, input_size: int, num_softmaxes: int, output_projection: nn.Linear) -> None:
        super().__init__()
        self.prior = nn.Linear(input_size, num_softmaxes, bias=False)
        self.latent = nn.Linear(input_size, num_softmaxes * output_projection.in_features)
        self.output_projection = output_projection

    def forward(self, input: Tensor) -> Tensor:
        """Return the words' log-probabilities (..., V), float32, of features (..., input_size).

        Raises:
            ValueError: ``input`` has another width or device
            TypeError: its dtype is wrong
        """
        check_like("input", input, self.prior.weight)
        if input.size(-1) != self.prior.in_features:
            raise ValueError(
                f"input must have shape (..., {self.prior.in_features}), got {list(input.shape)}"
            )
        log_prior = torch.log_softmax(self.prior(input), -1, dtype=torch.float32)
        latent = torch.tanh(self.latent(input)).unflatten(-1, (self.prior.out_features, -1))
        log_probs = torch.log_softmax(self.output_projection(latent), -1, dtype=torch.float32)
        return torch.logsumexp(log_prior.unsqueeze(-1) + log_probs, -2)
