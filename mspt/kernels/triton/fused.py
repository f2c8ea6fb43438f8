"""Operations with kernels for their value and their gradient, as functions that PyTorch can differentiate."""

import torch

from mspt.kernels.second import gradients_of_gradients


def fused(forward, backward, meaning):
    """An operation on tensors with kernels for its value and its gradient, as a function that can be differentiated.

    forward(*tensors, *options) -> outputs (a tensor or a tuple) and a tuple of tensors kept for
    backward(gradients, tensors, kept, *options) -> a gradient for each tensor. meaning: forward in plain PyTorch, for
    the second derivative. Called as f(tensors, *options).
    """

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, count, outputs, options, *flat):
            gradients, tensors, kept = flat[:outputs], flat[outputs : outputs + count], flat[outputs + count :]
            ctx.save_for_backward(*gradients, *tensors)
            ctx.count, ctx.outputs, ctx.options = count, outputs, options
            return tuple(backward(gradients, tensors, kept, *options))

        @staticmethod
        def backward(ctx, *heads):
            gradients, tensors = ctx.saved_tensors[: ctx.outputs], ctx.saved_tensors[ctx.outputs :]
            of_gradients, of_tensors = gradients_of_gradients(
                lambda *inputs: meaning(*inputs, *ctx.options), tensors, gradients, heads
            )
            kept = len(ctx.needs_input_grad) - 3 - ctx.outputs - ctx.count
            return None, None, None, *of_gradients, *of_tensors, *[None] * kept

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, options, *tensors):
            outputs, kept = forward(*tensors, *options)
            ctx.save_for_backward(*tensors, *kept)
            ctx.count, ctx.options = len(tensors), options
            return outputs

        @staticmethod
        def backward(ctx, *gradients):
            gradients = [gradient.contiguous() for gradient in gradients]
            return None, *Backward.apply(ctx.count, len(gradients), ctx.options, *gradients, *ctx.saved_tensors)

    def operation(tensors, *options):
        return Forward.apply(options, *(tensor.contiguous() for tensor in tensors))

    return operation
