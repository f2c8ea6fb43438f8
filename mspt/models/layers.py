"""What encoders and heads build their layers from."""

from torch import nn


def linear(inputs, outputs, bias=True):
    """A linear layer with Xavier weights and zero biases."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
