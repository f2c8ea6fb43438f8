"""Pre-training of 3D molecular encoders on conformers and spectra."""

__version__ = "0.1.0"
