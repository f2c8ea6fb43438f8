"""GEOM: conformers of drug-like molecules and of QM9 (Axelrod and Gomez-Bombarelli, Sci. Data 9, 185, 2022).

Read are *_crude.msgpack and the pickles of rdkit_folder; *_featurized.msgpack have no coordinates. The published files
list molecules, and a molecule's conformers, in an order of their own: a key counts both, so it is the same whenever
the same files are given, however many conformers are taken.
"""

import io
from pathlib import Path

import numpy as np

from mspt.chemistry.units import HARTREE_EV
from mspt.data.schema import Record, RejectedRecord
from mspt.errors import UserError
from shards import molecules, pickles
from shards.columns import KCAL_MOL_EV
from shards.source import Source

HELP = "GEOM: *_crude.msgpack, or rdkit_folder with --trust-pickle"
SOURCE = "GEOM (CREST conformers, GFN2-xTB, doi:10.7910/DVN/JNGTDF)"
# Target -> (GEOM's field, factor to the unit in TARGET_UNITS).
TARGETS = {
    "energy": ("totalenergy", HARTREE_EV),
    "relative_energy": ("relativeenergy", KCAL_MOL_EV),
    "boltzmann_weight": ("boltzmannweight", 1.0),
}
TARGET_UNITS = {"energy": "eV", "relative_energy": "eV", "boltzmann_weight": "1"}
# So many has a molecule of GEOM on average.
CONFORMERS = 82


def add_arguments(parser):
    parser.add_argument(
        "--from", dest="path", type=Path, required=True, help="a .msgpack or .pickle file, or a folder of either"
    )
    parser.add_argument("--conformers", type=int, help="so many of each molecule, the lowest in energy (default: all)")
    pickles.add_argument(parser)


def open(options):
    return GEOM(options.path, options.conformers, options.trust_pickle)


class GEOM(Source):
    uncounted = (
        "only reading tells how many conformers a molecule has; "
        "give --conformers N for fewer of each, or --from a file with fewer molecules"
    )

    def __init__(self, path, conformers, trusted):
        if conformers is not None and conformers < 1:
            raise UserError(f"--conformers {conformers}: must be at least 1")
        self.conformers, self.trusted = conformers, trusted
        self.inputs = _files(path)
        self.provenance = {"source": SOURCE, "units": TARGET_UNITS, "methods": {}}
        first = next(self._places(), None)
        if first is None:
            raise UserError(f"{self.inputs[0]}: holds no molecule")
        self._molecule(*first)  # refuses a file of another kind before anything is built

    def chunks(self, size):
        """Chunks of whole molecules that have size conformers on average."""
        count = max(1, size // min(CONFORMERS, self.conformers or CONFORMERS))
        chunk = []
        for number, place in enumerate(self._places()):
            chunk.append((number, place))
            if len(chunk) == count:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def molecule(self, key):
        return key.rpartition("-")[0]

    def _places(self):
        """Yield (file, first byte, bytes) of every molecule; a pickle is one, and the bytes do not matter."""
        for file in self.inputs:
            if file.suffix == ".msgpack":
                for start, length in _messages(file):
                    yield file, start, length
            else:
                yield file, 0, 0

    def _molecule(self, file, start, length):
        """SMILES and the dict of a molecule. Raises UserError where they cannot be read or hold no conformers."""
        if file.suffix == ".msgpack":
            import msgpack

            with file.open("rb") as stream:
                stream.seek(start)
                unpacker = msgpack.Unpacker(io.BytesIO(stream.read(length)), max_buffer_size=0)
            smiles, molecule = unpacker.unpack(), unpacker.unpack()
        else:
            molecule = pickles.load(file, self.trusted)
            smiles = molecule.get("smiles", "") if isinstance(molecule, dict) else ""
        conformers = molecule.get("conformers") if isinstance(molecule, dict) else None
        if not isinstance(conformers, list) or not all(isinstance(conformer, dict) for conformer in conformers):
            raise UserError(f"{file}: {smiles} has no conformers; give GEOM's *_crude.msgpack or rdkit_folder")
        return smiles, molecule

    def read(self, chunk):
        for number, place in chunk:
            key = f"geom-{number:06d}"
            try:
                smiles, molecule = self._molecule(*place)
            except (UserError, ValueError) as error:
                yield RejectedRecord(key, "conformers", str(error))
                continue
            conformers = molecule["conformers"]
            # They are not always in the order of their energy.
            order = sorted(range(len(conformers)), key=lambda i: conformers[i].get("totalenergy", np.inf))
            for i in order[: self.conformers]:
                yield _record(f"{key}-{i:04d}", smiles, molecule, conformers[i])


def _files(path):
    """The files to read, in the order of their names."""
    if path.is_file():
        if path.suffix not in (".msgpack", ".pickle"):
            raise UserError(f"{path}: neither .msgpack nor .pickle; unpack an archive first")
        return [path]
    batches = sorted(file for file in path.rglob("*.msgpack") if not file.name.endswith("_featurized.msgpack"))
    single = sorted(path.rglob("*.pickle"))
    if bool(batches) == bool(single):
        found = "both .msgpack and .pickle files" if single else "neither a *_crude.msgpack nor a .pickle file"
        raise UserError(f"{path}: has {found}; --from wants a folder of one kind, or a file")
    return batches or single


def _messages(file):
    """Yield where each molecule of a msgpack file begins and how long it is, without reading what is in it.

    A message maps the SMILES of some 1000 molecules to what is known of them. Raises UserError where the file is cut
    short or something else.
    """
    import msgpack

    with file.open("rb") as stream:
        unpacker = msgpack.Unpacker(stream, max_buffer_size=0)
        try:
            while unpacker.tell() < file.stat().st_size:
                for _ in range(unpacker.read_map_header()):
                    start = unpacker.tell()
                    unpacker.skip()
                    unpacker.skip()
                    yield start, unpacker.tell() - start
        except (msgpack.UnpackException, ValueError) as error:
            raise UserError(
                f"{file}: byte {unpacker.tell()}: {error}; is the file of GEOM, and is it whole?"
            ) from error


def _record(key, smiles, molecule, conformer):
    """A conformer's Record, or the RejectedRecord that says why there is none."""
    try:
        if "rd_mol" in conformer:
            fields = molecules.fields(conformer["rd_mol"])
        else:
            fields = {
                "numbers": np.array([int(z) for z, *_ in conformer["xyz"]], np.uint8),
                "positions": np.array([position for _, *position in conformer["xyz"]], np.float32),
                "charge": int(molecule.get("charge", 0)),
            }
        targets = {
            name: float(conformer[field]) * factor for name, (field, factor) in TARGETS.items() if field in conformer
        }
    except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        return RejectedRecord(key, "conformers", f"{type(error).__name__}: {error}")
    return Record(key=key, targets=targets, source=SOURCE, **fields | {"smiles": smiles})
