"""How alike two spectra are, by the scores that papers on predicted spectra report.

Legend: m pairs of spectra, L points of their grid. All scores are 1 for equal spectra, and none sees how high they are.
"""

import torch
from torch.nn.functional import conv1d, pad

from mspt.chemistry.spectra import GRIDS

# Standard deviation of the Gaussian by which both spectra are blurred before their information is compared, in the
# grid's unit (McGill et al., 2021: 10 cm^-1). A UV-Vis band is wide as it is.
BLUR = {"uv_vis": 0.0, "ir": 10.0, "raman": 10.0}
FLOOR = 1e-10  # of a spectrum that sums up to 1


def cosine(true, predicted):
    """Cosine of the angle between spectra [m, L] -> [m]; 0 for one that is zero throughout."""
    norms = true.norm(dim=1) * predicted.norm(dim=1)
    return (true * predicted).sum(1) / norms.clamp(min=torch.finfo(norms.dtype).tiny)


def pearson(true, predicted):
    """Correlation of spectra over the grid, [m, L] -> [m]; 0 for one that is constant."""
    return cosine(*(spectra - spectra.mean(1, keepdim=True) for spectra in (true, predicted)))


def sis(true, predicted, blur=0.0):
    """Spectral information similarity 1 / (1 + SID), SID = Σ p ln(p/q) + q ln(q/p) of spectra that sum up to 1 [m].

    true, predicted [m, L], not negative; blur: of both, in points of the grid (McGill et al., J. Chem. Inf. Model.
    2021, 61, 2594).
    """
    p, q = (_share(blurred(spectra, blur)) for spectra in (true, predicted))
    return 1 / (1 + ((p - q) * (p.log() - q.log())).sum(1))


def blurred(spectra, deviation):
    """Spectra [m, L] folded with a Gaussian, its standard deviation in points; their ends go on beyond the grid."""
    if deviation == 0:
        return spectra
    reach = round(4 * deviation)
    x = torch.arange(-reach, reach + 1, dtype=spectra.dtype, device=spectra.device)
    weights = torch.exp(-((x / deviation) ** 2) / 2)
    extended = pad(spectra[:, None], (reach, reach), mode="replicate")
    return conv1d(extended, (weights / weights.sum())[None, None])[:, 0]


def _share(spectra):
    total = spectra.sum(1, keepdim=True)
    return (spectra / total.clamp(min=torch.finfo(total.dtype).tiny)).clamp(min=FLOOR)


def scores(name, true, predicted):
    """All of them for spectra [m, L] of this name, in float64: cosine, pearson, sis -> [m]."""
    true, predicted = true.double(), predicted.double()
    blur = BLUR[name] / GRIDS[name].step
    return {
        "cosine": cosine(true, predicted),
        "pearson": pearson(true, predicted),
        "sis": sis(true, predicted, blur),
    }
