"""Measured IR, Raman and UV-Vis spectra in JCAMP-DX files; the files of one molecule become one record.

A JCAMP-DX file names a substance, not its structure. The structure comes from, in this order: the table --molecules, by
the file's name or its CAS number; a .mol or .sdf of the same name beside it; its own label SMILES or InChI. The
geometry is RDKit's, and the key is made of the InChIKey: files join by it. A block of a file that says that it is of
another molecule than its file is refused; one that says nothing is of what the block before it is.
"""

import contextlib
import csv
import io
import re
import zlib
from pathlib import Path

import numpy as np

from mspt.chemistry.resample import to_grid
from mspt.chemistry.spectra import GRIDS
from mspt.data.schema import Record, RejectedRecord
from mspt.errors import UserError
from shards.molecules import embed, fields
from shards.source import Source

HELP = "a folder of JCAMP-DX files: measured IR, Raman and UV-Vis spectra"
SUFFIXES = (".jdx", ".dx", ".jcamp")
STRUCTURES = (".mol", ".sdf")
CAS = "CASREGISTRYNO"
# The labels that tell what a block is of.
IDENTITY = (CAS, "SMILES", "INCHI")

# What ##DATA TYPE says -> spectrum.
KINDS = {r"RAMAN": "raman", r"INFRARED|\b(FT-?)?IR\b": "ir", r"\bUV\b|ULTRAVIOLET|VISIBLE": "uv_vis"}
# What ##XUNITS says -> unit of chemistry.resample.
XUNITS = {
    r"1/CM|CM\W*-1|CM⁻¹|WAVENUMBER|RAMAN SHIFT": "cm^-1",
    r"MICROM|MICRON|\b[UΜ]M\b": "µm",  # the capital of µ is a Greek Μ
    r"NANOM|\bNM\b": "nm",
    r"\bEV\b|ELECTRON ?VOLT": "eV",
}
# A transmittance below this is stray light and noise: absorbance ends at 3.
DARKEST = 1e-3
# What ##YUNITS says -> what the record's values are; numbers that are proportional to absorption stay as they are.
YUNITS = {
    r"TRANSMI|%T|^T$": "absorbance from transmittance",
    r"LOG.*(EPSILON|\bE\b)": "molar absorptivity from its logarithm",
    r"^A$|^ABS|ABSORBANCE": "absorbance",
    r"EPSILON|MOLAR|ABSORPTIVITY|MICROMOL": "molar absorptivity",
    r"KUBELKA|^K-?M$": "Kubelka-Munk function",
    r"ARBITRARY|INTENSITY|COUNTS|^A\.?U\.?$": "arbitrary units",
}


class JcampDx(Source):
    """A chunk is a list of (key, SMILES, paths of its files), and (file, None, reason) where there is no structure."""

    def __init__(self, path, table):
        self.provenance = {
            "source": "JCAMP-DX files (RDKit conformers)",
            "units": {},
            "methods": dict.fromkeys(GRIDS, "measured; each record says in which unit"),
        }
        self.folder = path if path.is_dir() else path.parent
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        self.files = [file for file in found if file.suffix.lower() in SUFFIXES and file.is_file()]
        if not self.files:
            raise UserError(f"{path}: no JCAMP-DX file ({', '.join(SUFFIXES)}) is there; give one or a folder of them")
        self.table = {} if table is None else _read_table(table)
        structures = [path for file in self.files if (path := _structure(file))]
        self.inputs = self.files + structures + ([] if table is None else [table])

    def chunks(self, size):
        molecules = {}
        for file in self.files:
            try:
                smiles = self._smiles(file)
                key = _key(smiles)
            except ValueError as error:
                molecules[str(file)] = (self._name(file), None, str(error))
            else:
                molecules.setdefault(key, (key, smiles, []))[2].append(file)
        rows = list(molecules.values())
        for first in range(0, len(rows), size):
            yield rows[first : first + size]

    def read(self, chunk):
        for key, smiles, files in chunk:
            if smiles is None:
                yield RejectedRecord(key, "smiles", files)
            else:
                yield from self._read(key, smiles, files)

    def _name(self, file):
        return str(file.relative_to(self.folder))

    def _smiles(self, file):
        """The SMILES of a file's molecule. Raises ValueError, with the reason, where nothing tells it."""
        from rdkit import Chem

        labels = _labels(_text(file))
        if known := self.table.get(file.stem) or self._by_cas(labels):
            return known
        if structure := _structure(file):
            molecule = Chem.MolFromMolFile(str(structure))
            if molecule is None:
                raise ValueError(f"RDKit cannot read {structure.name}")
            return Chem.MolToSmiles(molecule)
        if written := _written(labels):
            return written
        raise ValueError(
            f"the structure is not known: neither {file.stem!r} nor the CAS number {labels.get(CAS, '')!r} is in "
            f"--molecules, and there is no {file.stem}.mol, {file.stem}.sdf, ##SMILES= or ##INCHI="
        )

    def _by_cas(self, labels):
        """The SMILES that the table has for the CAS number of labels, "" where it has none."""
        cas = _plain_cas(labels.get(CAS, ""))
        return cas and self.table.get(cas, "")

    def _substances(self, text, blocks):
        """What the labels of a file say that it is of, and what each of its blocks.

        A block that has only the file's CAS number is of what the file is; one that says nothing, of what the one
        before it is.
        """
        whole = _labels(text)
        found = [self._substance(whole)]
        for labels in map(_labels, blocks):
            said = {name: labels[name] for name in IDENTITY if name in labels}
            found.append(self._substance(whole if said == {CAS: whole.get(CAS)} else said) or found[-1])
        return found

    def _substance(self, labels):
        """The key of the molecule that labels tell, or a label that tells none; "" where no label is there."""
        try:
            smiles = self._by_cas(labels) or _written(labels)
            return _key(smiles) if smiles else _plain_cas(labels.get(CAS, ""))
        except ValueError:
            return [labels[name] for name in IDENTITY if name in labels][-1]

    def _read(self, key, smiles, files):
        """The files of a molecule -> a RejectedRecord for each bad spectrum, and one Record of the good ones."""
        spectra, methods, origin = {}, {}, {}
        for file in files:
            text = _text(file)
            blocks = list(_blocks(text)) or [""]
            substances = self._substances(text, blocks)
            several = len({*substances} - {""}) > 1
            for block, substance in zip(blocks, substances[1:], strict=True):
                field = "spectra"
                try:
                    labels = _labels(block)
                    name = _known("DATATYPE", labels, KINDS)
                    field = f"spectra.{name}"
                    # A name or table may correct what a file says throughout, but not make one of two substances.
                    if several and substance != key:
                        raise ValueError(
                            f"the block is of {substance}, its file of {key}; give each substance a file of its own"
                        )
                    values, unit = _spectrum(name, labels, block)
                    if name in spectra:
                        raise ValueError(f"{key} has one already, of {origin[name]}")
                except ValueError as error:
                    yield RejectedRecord(self._name(file), field, str(error))
                else:
                    spectra[name], methods[name], origin[name] = values, f"measured, {unit}", self._name(file)
        if not spectra:
            return
        try:
            molecule = embed(smiles, zlib.crc32(key.encode()))
        except ValueError as error:
            yield RejectedRecord(key, "positions", str(error))
        else:
            source = self.provenance["source"]
            yield Record(key, spectra=spectra, methods=methods, source=source, **fields(molecule))


def add_arguments(parser):
    parser.add_argument("--from", dest="path", required=True, type=Path, help="a folder of JCAMP-DX files, or one")
    parser.add_argument(
        "--molecules", type=Path, help="CSV with the columns key (name of a file without its suffix, or CAS) and smiles"
    )


def open(options):
    return JcampDx(options.path, options.molecules)


def _read_table(path):
    """The CSV of --molecules -> SMILES by name and by CAS number."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give --molecules a CSV in UTF-8") from None
    rows = csv.DictReader(io.StringIO(text))
    if not {"key", "smiles"} <= set(rows.fieldnames or ()):
        columns = ", ".join(rows.fieldnames or ()) or "none"
        raise UserError(f"{path}: the columns are {columns}; --molecules wants key and smiles")
    table = {}
    for row in rows:
        key, smiles = (row["key"] or "").strip(), (row["smiles"] or "").strip()
        table[_plain_cas(key) or key] = table[key] = smiles
    return table


def _plain_cas(text):
    """A CAS number as 64-17-5, however it is written; "" where it is none."""
    match = re.fullmatch(r"0*(\d{2,7})-?(\d\d)-?(\d)", text.strip())
    return "-".join(match.groups()) if match else ""


def _structure(file):
    return next((path for suffix in STRUCTURES if (path := file.with_suffix(suffix)).exists()), None)


def _written(labels):
    """The SMILES of the labels SMILES or INCHI, "" where neither is there. Raises ValueError where RDKit reads none."""
    from rdkit import Chem

    if "SMILES" in labels or "INCHI" not in labels:
        return labels.get("SMILES", "")
    molecule = Chem.MolFromInchi("InChI=" + labels["INCHI"].removeprefix("InChI="))
    if molecule is None:
        raise ValueError(f"RDKit cannot read the InChI {labels['INCHI']!r}")
    return Chem.MolToSmiles(molecule)


def _key(smiles):
    """The key of a molecule, of its InChIKey. Raises ValueError where RDKit makes none of the SMILES."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():  # InChI warns of each stereo centre that is left open
        molecule = Chem.MolFromSmiles(smiles)
        inchikey = "" if molecule is None else Chem.MolToInchiKey(molecule)
    if not inchikey:
        raise ValueError(f"RDKit makes no InChIKey of the SMILES {smiles!r}")
    return f"jcamp-{inchikey}"


def _text(file):
    """What a file holds, without its comments ($$ to the end of a line)."""
    data = file.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:  # instruments write names and µ in it
        text = data.decode("latin-1")
    return re.sub(r"\$\$.*", "", text.replace("\r\n", "\n").replace("\r", "\n"))


def _labels(text):
    """##NAME=value -> the first line of the first value of each NAME; NAME in capitals, letters and digits alone.

    Of IDENTITY all lines of the value, joined. A NAME that has no value there is left out.
    """
    labels = {}
    for found in re.finditer(r"^##([^=\n]*)=(.*)", text, re.MULTILINE):
        name, value = re.sub(r"[^A-Z0-9]", "", found[1].upper()), found[2].strip()
        if name in IDENTITY:
            lines = text[found.start(2) :].partition("\n##")[0].split("\n")
            value = "".join(line.strip() for line in lines)
        if value:
            labels.setdefault(name, value)
    return labels


def _blocks(text):
    """Yield every spectrum's block of a file: one, several inside a LINK, or several end to end."""
    for block in re.split(r"^(?=##\s*TITLE\s*=)", text, flags=re.MULTILINE | re.IGNORECASE):
        block = re.split(r"^##\s*END\s*=", block, maxsplit=1, flags=re.MULTILINE | re.IGNORECASE)[0]
        labels = _labels(block)
        if labels and labels.get("DATATYPE", "").upper() != "LINK":
            yield block


def _known(label, labels, table):
    """What the first pattern of a table that a label's value matches stands for; ValueError where none does."""
    value = labels.get(label, "")
    for pattern, meaning in table.items():
        if re.search(pattern, value.upper()):
            return meaning
    raise ValueError(f"##{label} is {value!r}, of which no IR, Raman or UV-Vis absorption follows")


def _spectrum(name, labels, block):
    """A block -> values on the grid of name, and their unit. Raises ValueError with the reason where there are none."""
    unit, ordinate = _known("XUNITS", labels, XUNITS), _known("YUNITS", labels, YUNITS)
    x, y = _points(labels, block)
    if ordinate == "absorbance from transmittance":
        # A file that says TRANSMITTANCE and goes beyond 2 means per cent.
        percent = re.search("%|PER ?CENT", labels["YUNITS"].upper()) or y.max() > 2
        y = -np.log10(np.maximum(y / 100 if percent else y, DARKEST))
    elif ordinate == "molar absorptivity from its logarithm":
        y = 10.0**y
    return to_grid(name, x, y, unit), ordinate


def _points(labels, block):
    """Abscissae and ordinates of a block, by the package jcamp. Raises ValueError with the reason where it has none."""
    import jcamp

    if not {"XYDATA", "XYPOINTS"} & set(labels):
        raise ValueError("neither ##XYDATA= nor ##XYPOINTS= is there: no points of one spectrum")
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):  # it prints what its checks of abscissae and differences find
            content = jcamp.read(_plain(block))
    except Exception as error:  # it raises whatever it stumbles on, and a bare Exception of its own
        raise ValueError(f"jcamp cannot read it: {error!r}") from None
    x, y = content["x"], content["y"]
    if said.getvalue():
        raise ValueError(said.getvalue().splitlines()[0])
    if len(y) == 0 or len(y) != content.get("npoints"):  # a decimal comma makes two numbers of one
        raise ValueError(f"{len(y)} points are there where ##NPOINTS is {labels.get('NPOINTS', 'missing')}")
    return x, y


def _plain(block):
    """Yield the lines of a block in forms that jcamp 1.3 reads rightly.

    It knows (X++(Y..Y)) only when it is written just so. Of data in that form it reads neither a count of duplicates
    above 9, nor duplicates of a value that is no difference, nor a space before a difference.
    """
    data = False
    for line in block.splitlines(keepends=True):
        if line.startswith("##"):
            data = re.match(r"##\s*XYDATA\s*=\s*\(X\+\+\s*\(Y\.\.Y\)\)", line, re.IGNORECASE)
            yield "##XYDATA=(X++(Y..Y))\n" if data else line
        elif data:
            line = re.sub(r"([\s+\-@%A-Ra-r][\d.]*)([S-Zs])(\d{0,5})", _repeat, line)
            yield re.sub(r"[ \t]+(?=[%J-Rj-r])", "", line)
        else:
            yield line


def _repeat(match):
    """A value with its count of duplicates, whose first digit is one of S to Z and s -> the value as often."""
    value, first, rest = match.groups()
    return value * int(str("STUVWXYZs".index(first) + 1) + rest)
