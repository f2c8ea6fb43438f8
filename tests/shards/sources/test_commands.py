"""Every source by its command: raw files of the true layout become a set that is whole, and nothing is refused."""

import csv
import gzip

import numpy as np
import pytest

pytest.importorskip("rdkit")

from rdkit import Chem

from mspt.data.shardset import ShardSet
from shards import cli
from tests.shards import curves
from tests.shards.sources import (
    qm9s_files,
    test_geom,
    test_jcamp_dx,
    test_md17,
    test_qm9_raw,
    test_qm9s,
    test_qm9s_processed,
    test_table,
)
from tests.shards.sources.fixtures import geometries, with_bonds

COUNT = 12


def sdf(folder, name):
    """The first molecules of QM9 as an SDF."""
    path = folder / name
    path.write_text("".join(Chem.MolToMolBlock(with_bonds(m)) + "$$$$\n" for m in geometries(COUNT)))
    return path


def qm9_raw(folder):
    molecules = geometries(COUNT)
    (folder / "gdb9.sdf").write_text("".join(map(test_qm9_raw.entry, molecules)))
    with (folder / "gdb9.sdf.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, test_qm9_raw.row(molecules[0]))
        writer.writeheader()
        writer.writerows(map(test_qm9_raw.row, molecules))
    (folder / "uncharacterized.txt").write_text("Index of compounds\n\n  9000  CCO  CCO  CCO  0.1\n")
    return ["--from", folder]


def qm9s(folder):
    test_qm9s.write(folder, qm9s_files.molecules(COUNT))
    return ["--from", folder]


def qm9s_processed(folder):
    test_qm9s_processed.write(folder / "data_with_uv_ir_raman.pt", qm9s_files.molecules(COUNT))
    return ["--from", folder / "data_with_uv_ir_raman.pt"]


def pcqm4mv2(folder):
    rows = [f"{i},{Chem.MolToSmiles(Chem.RemoveHs(with_bonds(m)))},{4 + i}" for i, m in enumerate(geometries(COUNT))]
    (folder / "data.csv.gz").write_bytes(gzip.compress("\n".join(["idx,smiles,homolumogap", *rows, ""]).encode()))
    return ["--from", sdf(folder, "pcqm4m-v2-train.sdf")]


def md17(folder):
    molecule, rng = geometries(2)[1], np.random.default_rng(0)
    moved = rng.normal(0, 0.05, (test_md17.FRAMES, len(molecule.numbers), 3))
    trajectory = (molecule.numbers, molecule.positions + moved, -35_000 + (moved**2).sum((1, 2)), -2 * moved)
    return ["--from", test_md17.write(folder / "rmd17_ammonia.npz", trajectory)]


def geom(folder):
    pytest.importorskip("msgpack")
    made = {smiles: [test_geom.embed(smiles, seed) for seed in range(3)] for smiles in ("CCO", "CC(=O)OC", "CCN")}
    ensembles = {smiles: [(m, test_geom._energy(m)) for m in molecules] for smiles, molecules in made.items()}
    test_geom.write_crude(folder / "drugs_crude.msgpack", test_geom.crude(ensembles))
    return ["--from", folder]


def xyz(folder):
    (folder / "some.xyz").write_text("".join(Chem.MolToXYZBlock(with_bonds(m)) for m in geometries(COUNT)))
    return ["--from", folder / "some.xyz"]


def jcamp_dx(folder):
    for i, record in enumerate(curves.molecules(COUNT)):
        for name in ("ir", "raman"):
            text = test_jcamp_dx.block(name, *test_jcamp_dx.sampled(record, name), SMILES=record.smiles)
            (folder / f"{i}-{name}.jdx").write_text(text)
    return ["--from", folder]


def table(folder):
    rows = [
        {"smiles": record.smiles, "ir_spectra": curves.curve(record, "ir", test_table.ALBERTS, 2.0)}
        for record in curves.molecules(COUNT)
    ]
    test_table.write_parquet(folder / "ir.parquet", rows)
    return ["--from", folder, "--preset", "alberts2024"]


SOURCES = {
    "qm9": lambda folder: ["--count", COUNT],
    "qm9_raw": qm9_raw,
    "qm9s": qm9s,
    "qm9s_processed": qm9s_processed,
    "pcqm4mv2": pcqm4mv2,
    "md17": md17,
    "geom": geom,
    "sdf": lambda folder: ["--from", sdf(folder, "some.sdf")],
    "xyz": xyz,
    "jcamp_dx": jcamp_dx,
    "table": table,
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_command_builds_a_set(name, tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    arguments = ["build", name, *SOURCES[name](raw), "--out", out, "--shard", 4, "--processes", 1, "--no-inchikey"]
    cli.main(list(map(str, arguments)))
    assert "0 refused" in capsys.readouterr().out
    cli.main(["verify", str(out)])
    shardset = ShardSet.open(out)
    assert len(shardset) >= 7 and shardset.manifest["provenance"]["source"]


def test_every_source_is_there():
    assert set(SOURCES) | {"computed"} == set(cli.SOURCES)  # computed: tests/shards/test_sources.py
