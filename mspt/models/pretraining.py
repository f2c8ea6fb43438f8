"""The network that is pre-trained, and one pass of it over a micro-batch."""

from functools import cached_property

import torch
from torch import nn

from mspt.models import encoders
from mspt.models.heads import forces
from mspt.models.specformer import SpecFormer, SpecFormerSettings
from mspt.settings import Settings


class NetworkSettings(Settings):
    """encoder: which 3D encoder. specformer: the spectrum encoder; null where no objective needs spectra.

    init: a run folder, a checkpoint or an exported encoder to start the weights from (stage 2 from stage 1).
    """

    encoder: encoders.EncoderSettings
    specformer: SpecFormerSettings | None = None
    init: str | None = None


class Network(nn.Module):
    """The 3D encoder and, where spectra take part, the SpecFormer. width: channels F of the encoder's scalars."""

    def __init__(self, settings):
        super().__init__()
        self.encoder = encoders.build(settings.encoder)
        self.width = settings.encoder.channels
        self.specformer = SpecFormer(settings.specformer, self.width) if settings.specformer else None


class View:
    """A micro-batch's structures at some positions [n, 3]: features are computed once, whoever asks first.

    batch: a broadened MoleculeBatch, clean. differentiable: forces are to be taken, so that features keep their graph
    down to the positions, in evaluation too. modes [m]: by what an encoder that sees bonds sees each molecule; None: by
    all there is.
    """

    def __init__(self, network, batch, positions, differentiable=False, modes=None):
        self.network, self.batch, self.modes = network, batch, modes
        self.positions = positions.detach().requires_grad_() if differentiable else positions

    @cached_property
    def structure(self):
        """The encoder's scalars [n, F] and vectors [n, 3, F] or None."""
        encoder, batch = self.network.encoder, self.batch
        more = encoders.beside(encoder, batch.bonds, self.modes)
        with torch.set_grad_enabled(torch.is_grad_enabled() or self.positions.requires_grad):
            return encoder(batch.numbers, self.positions, batch.ptr, **more)

    @cached_property
    def molecules(self):
        """Molecule vectors [m, F]: the sum over atoms of the encoder's scalars, in at least float32."""
        return self.batch.sum(self.structure[0])

    def energies_and_forces(self, head):
        """Energies [m], the sum over atoms of head(scalars) [n], and forces [n, 3] of a differentiable view.

        Where gradients are on, the forces have a graph of their own to be trained through.
        """
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            energies = self.batch.sum(head(self.structure[0]))
            return energies, forces(energies, self.positions, create_graph)


class Pass(View):
    """One pass of the network over one micro-batch.

    positions [n, 3] and patches (name -> [m, N, P]) are what the network gets to see: the objectives' `corrupt` sets
    noise and masks on them before any feature is computed. masked (name -> bool [m, N]) says which patches are hidden.
    """

    def __init__(self, network, batch):
        super().__init__(network, batch, batch.positions)
        self.patches = {}
        self.masked = {}
        if network.specformer is not None:
            self.patches = network.specformer.patches(batch.spectra)

    def view(self, positions, differentiable=False):
        """The same structures at other positions, for an objective that compares them."""
        return View(self.network, self.batch, positions, differentiable, self.modes)

    @cached_property
    def spectrum(self):
        """The SpecFormer's tokens (name -> [m, N, d]) and readout [m, F] of the masked spectra."""
        return self.network.specformer(self.patches, self.batch.present)

    @cached_property
    def reconstruction(self):
        """What the SpecFormer makes of every patch: name -> [m, N, P]."""
        return self.network.specformer.reconstruct(self.spectrum[0])

    def anchor(self):
        """Zero, with a gradient path to every output: a parameter without a gradient would stall the other ranks."""
        outputs = [output for output in self.structure if output is not None]
        if self.network.specformer is not None:
            outputs += [self.spectrum[1], *self.reconstruction.values()]
        return sum(output.float().sum() for output in outputs) * 0.0
