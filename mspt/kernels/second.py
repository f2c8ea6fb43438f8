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


def register_second(name, meaning, results, tensors):
    """Give operator NAME, which is the gradient of a function, a gradient of its own.

    NAME(*gradients of the results, *tensors, *rest) -> gradients of the tensors. meaning(*tensors, *rest): the
    function in plain PyTorch. results, tensors: how many of each. A gradient that NAME leaves empty has none.
    """
    count = results + tensors

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:count])
        ctx.rest = inputs[count:]

    def backward(ctx, *heads):
        gradients, tensors = ctx.saved_tensors[:results], ctx.saved_tensors[results:]
        heads = [head if head.shape == x.shape else None for head, x in zip(heads, tensors, strict=True)]
        found = gradients_of_gradients(lambda *given: meaning(*given, *ctx.rest), tensors, gradients, heads)
        return *found[0], *found[1], *[None] * len(ctx.rest)

    torch.library.register_autograd(f"mspt::{name}", backward, setup_context=keep)
