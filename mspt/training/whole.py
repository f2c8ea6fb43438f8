"""A module that ZeRO 3 gathers whole, so that its forward may differentiate: energies by positions, for forces.

ZeRO 3 gathers a submodule's weights before its forward and again before its backward pass, by hooks that
torch.autograd.grad inside a forward pass would set off too. A leaf, in DeepSpeed's terms, is a module without such
hooks inside: its weights are gathered, and its gradients reduced, all together. DeepSpeed reduces them when the
gradient of the leaf's inputs is there, be those of all weights there or not.
"""

import torch
from torch import nn


class Whole(nn.Module):
    """module, whose forward returns a loss or a tuple with the loss first, as a leaf of ZeRO 3."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, origin, *args, **kwargs):
        """origin: any tensor that requires a gradient; it gets a zero, as the last thing in the backward pass."""
        outputs = self.module(*args, **kwargs)
        loss, *rest = outputs if isinstance(outputs, tuple) else (outputs,)
        if not (isinstance(loss, torch.Tensor) and loss.requires_grad):
            return outputs
        loss = _AllAtOnce.apply(origin, [loss])
        return (loss, *rest) if isinstance(outputs, tuple) else loss


class _AllAtOnce(torch.autograd.Function):
    """The loss, whose backward pass runs to its end, gradients of all weights included, before origin has its own."""

    @staticmethod
    def forward(ctx, origin, held):
        ctx.held, ctx.origin = held, torch.zeros_like(origin)
        return held[0].detach()

    @staticmethod
    def backward(ctx, gradient):
        torch.autograd.backward(ctx.held.pop(), gradient)
        return ctx.origin, None
