"""A molecule's trajectory by GFN2-xTB, as an .npz of rMD17's layout: real forces where rMD17 itself is not at hand.

python -m shards.quantum.dynamics --smiles 'CC(=O)Oc1ccccc1C(=O)O' --frames 2000 --out gfn2_aspirin.npz
shards build md17 --from gfn2_aspirin.npz --out data/rmd17-aspirin --no-inchikey
"""

import argparse
import io
import time
from pathlib import Path

import numpy as np

from mspt import files
from mspt.chemistry.units import AMU_ELECTRON_MASS, BOHR_ANGSTROM, FEMTOSECOND, HARTREE_KCAL_MOL, KELVIN_HARTREE
from mspt.errors import UserError
from shards.molecules import embed, refuse_ions_and_radicals
from shards.quantum.vibrations import masses
from shards.quantum.xtb import METHOD, XTB, model_hessian, relax

STEP = 0.5  # fs, as rMD17's


def trajectory(calculator, mass, positions, rng, temperature=500.0, friction=0.01, step=STEP):
    """Langevin dynamics in BAOAB splitting (Leimkuhler & Matthews, 2013) -> positions, energy, gradient and velocities
    after each step, without end, in atomic units.

    calculator: positions [n, 3] -> energy, gradient [n, 3] and more. mass: [n] electron masses. positions: [n, 3] bohr.
    temperature: K; velocities begin at it. friction: per fs; 0 keeps the energy. step: fs.
    """
    step, mass, heat = step * FEMTOSECOND, mass[:, None], temperature * KELVIN_HARTREE
    kept = np.exp(-friction / FEMTOSECOND * step)
    velocities = rng.normal(size=positions.shape) * np.sqrt(heat / mass)
    gradient = calculator(positions)[1]
    while True:
        velocities = velocities - 0.5 * step * gradient / mass
        positions = positions + 0.5 * step * velocities
        velocities = kept * velocities + np.sqrt((1 - kept**2) * heat / mass) * rng.normal(size=positions.shape)
        positions = positions + 0.5 * step * velocities
        energy, gradient, *_ = calculator(positions)
        velocities = velocities - 0.5 * step * gradient / mass
        yield positions, energy, gradient, velocities


def sample(smiles, frames, every=20, settle=2000, temperature=500.0, seed=0, say=lambda frame: None):
    """The arrays of an rMD17 file: every so many steps a frame, after some steps to settle.

    Units: Å, kcal/mol, kcal/mol/Å. say: called with the number of frames so far. Raises UserError where the molecule
    cannot be made in 3D, is charged or has unpaired electrons, or falls apart: a distance of over three times that of
    its minimum tells.
    """
    try:
        molecule = embed(smiles, seed)
        refuse_ions_and_radicals(molecule)
    except ValueError as error:
        raise UserError(f"--smiles: {error}") from error
    numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()])
    given = molecule.GetConformer().GetPositions()
    calculator = XTB(numbers)
    x, _ = relax(calculator, given / BOHR_ANGSTROM, model_hessian(numbers, given))
    widest, kept = 3 * _extent(x), []
    steps = trajectory(calculator, masses(numbers) * AMU_ELECTRON_MASS, x, np.random.default_rng(seed), temperature)
    for number, (positions, energy, gradient, _) in enumerate(steps, 1 - settle):
        if number > 0 and number % every == 0:
            if _extent(positions) > widest:
                raise UserError(f"--temperature {temperature:g}: {smiles} has fallen apart; choose a lower one")
            kept.append((positions * BOHR_ANGSTROM, energy * HARTREE_KCAL_MOL, -gradient))
            say(len(kept))
            if len(kept) == frames:
                break
    coords, energies, forces = (np.array(values) for values in zip(*kept, strict=True))
    forces = forces * (HARTREE_KCAL_MOL / BOHR_ANGSTROM)
    return {
        "nuclear_charges": numbers.astype(np.uint8),
        "coords": coords,
        "energies": energies,
        "forces": forces,
        "theory": np.array(METHOD),
    }


def _extent(positions):
    return np.linalg.norm(positions[:, None] - positions, axis=-1).max()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smiles", required=True)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--every", type=int, default=20, help=f"steps of {STEP} fs between frames")
    parser.add_argument("--temperature", type=float, default=500.0, help="K; rMD17's is 500")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args(arguments)
    begin = time.monotonic()

    def say(frame):
        if frame % 100 == 0:
            print(f"{frame}/{options.frames} frames, {time.monotonic() - begin:.0f} s", flush=True)

    try:
        arrays = sample(
            options.smiles, options.frames, options.every, temperature=options.temperature, seed=options.seed, say=say
        )
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    files.write(options.out, packed.getvalue())


if __name__ == "__main__":
    main()
