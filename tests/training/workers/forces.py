"""Second derivatives under DeepSpeed: a loss on forces, computed inside the wrapped module, against plain torch."""

import tiny
import torch
from torch import nn

from mspt.training.engine import Engine, initialise


class Potential(nn.Module):
    """Energy of one particle an item; its forward calls torch.autograd.grad."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.out = nn.Linear(3, 17), nn.Linear(17, 17), nn.Linear(17, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.requires_grad_()
            h = torch.tanh(self.second(torch.tanh(self.first(x))))
            energy = self.out(h)[:, 0]
            (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy, -slope


class Matching(nn.Module):
    def __init__(self):
        super().__init__()
        self.potential = Potential()

    def forward(self, x):
        energy, force = self.potential(x)
        return (energy - x.detach().sin().sum(1)).square().sum() + (force + x.detach().cos()).square().sum()


def forces(run):
    """Compare the summed gradients of two micro-batches a rank with those of the global batch."""
    process = initialise()
    settings, _ = tiny.parse(run)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(3))
    plain = Matching()
    plain(x.clone()).backward()
    engine = Engine(Matching(), settings, tiny.SCHEDULE, 3, accumulation=2, takes_forces=True)
    own = x.view(process.world_size, 2, -1, 3)[process.rank]
    for step in range(2):
        for micro_batch in own:
            engine.backward(engine(micro_batch.clone()))
        if step == 0:
            found = engine.gradients()
            for name, parameter in plain.named_parameters():
                error = (found[name] - parameter.grad).norm() / parameter.grad.norm()
                assert error < 1e-5, (run, name, error)
        assert not engine.step().skipped
    print(f"{run} gives right forces")
