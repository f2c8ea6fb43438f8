"""Second derivatives by way of the reference: differentiate what an operation means, twice, in plain PyTorch."""

import torch


def gradients_of_gradients(function, inputs, gradients, heads):
    """The gradients of Σ heads · ∂(Σ gradients · function(inputs)) / ∂inputs.

    inputs: tensors or None; gradients: one for each output of function; heads: one for each input, None where it does
    not matter. -> gradients with regard to gradients and with regard to inputs (None where there is none).
    """
    with torch.enable_grad():
        inputs = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
        gradients = [tensor.detach().requires_grad_() for tensor in gradients]
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        met = [(x, h) for x, h in zip(inputs, heads, strict=True) if x is not None and h is not None]
        first = torch.autograd.grad(outputs, [x for x, _ in met], gradients, create_graph=True, allow_unused=True)
        known = [(value, head) for value, (_, head) in zip(first, met, strict=True) if value is not None]
        values, heads = zip(*known, strict=True)
        leaves = [*gradients, *(x for x in inputs if x is not None)]
        second = iter(torch.autograd.grad(values, leaves, heads, allow_unused=True))
    of_gradients = [next(second) for _ in gradients]
    return of_gradients, [None if tensor is None else next(second) for tensor in inputs]


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
