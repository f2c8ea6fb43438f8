"""3D encoders, one file a published model.

An encoder maps (numbers [n], positions [n, 3] Å, ptr [m + 1]) to scalars [n, F] and vectors [n, 3, F] or None; it
knows nothing of spectra, objectives or training. A new one is a file with a settings class and a module, and a line
in ENCODERS.
"""

from mspt.models.encoders.torchmd_et import TorchMDET, TorchMDETSettings

# The settings of any encoder; its `name` says which.
EncoderSettings = TorchMDETSettings
ENCODERS = {"torchmd_et": (TorchMDETSettings, TorchMDET)}


def build(settings):
    """The encoder that settings describe."""
    return ENCODERS[settings.name][1](settings)


def parse(tree):
    """Settings from a dict such as an exported config.json holds."""
    return ENCODERS[tree["name"]][0].model_validate(tree)
