"""What encoders and heads build their layers from."""

from torch import nn

from mspt import kernels


class LentLinear(nn.Linear):
    """A linear layer that others apply: it gives copies of its weight and bias (None without), which stay when an
    engine that shards parameters takes the layer's own away.
    """

    def forward(self):
        return self.weight.clone(), None if self.bias is None else self.bias.clone()


class Linear(nn.Linear):
    """kernels.linear: [n, …, inputs] -> [n, …, outputs], or with heads [n, …, heads, outputs / heads]."""

    def __init__(self, inputs, outputs, bias=True, heads=None):
        super().__init__(inputs, outputs, bias)
        self.heads = heads

    def forward(self, x):
        result = kernels.linear(x, self.weight, self.bias, self.heads or 1)
        return result if self.heads else result.flatten(-2)


def linear(inputs, outputs, bias=True):
    """A linear layer with Xavier weights and zero biases."""
    layer = Linear(inputs, outputs, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
