"""Tables of the user's own columns: the same records from every form; a bad row is listed, a bad option explained."""

import argparse
import csv
import gzip
import itertools
import json

import numpy as np
import pytest

pytest.importorskip("rdkit")
pytest.importorskip("pyarrow")

import pyarrow as pa
from pyarrow import parquet
from rdkit import Chem

from mspt.chemistry.spectra import GRIDS, Grid
from mspt.errors import UserError
from shards.sources import qm9, table
from tests.data.molecules import assert_same
from tests.shards import curves
from tests.shards.curves import curve
from tests.shards.reading import read

HARTREE = 27.211386245988
# The abscissae of Alberts 2024.
ALBERTS = Grid(unit="cm^-1", start=400.0, step=3600 / 1799, length=1800)


@pytest.fixture(scope="module")
def molecules():
    return curves.molecules(10)


@pytest.fixture(scope="module")
def rows(molecules):
    """As in Alberts 2024, with a name beside."""
    return [
        {"name": record.key, "smiles": record.smiles, "ir_spectra": curve(record, "ir", ALBERTS, 2.0)}
        for record in molecules
    ]


def opened(path, *arguments):
    parser = argparse.ArgumentParser()
    table.add_arguments(parser)
    return table.open(parser.parse_args(["--from", str(path), *arguments]))


def write_csv(path, rows, text=json.dumps):
    """Lists become text."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            lists = {name: text(np.asarray(v).tolist()) for name, v in row.items() if isinstance(v, np.ndarray | list)}
            writer.writerow(row | lists)
    return path


def write_parquet(path, rows, **options):
    plain = [{name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in row.items()} for row in rows]
    parquet.write_table(pa.Table.from_pylist(plain), path, **options)
    return path


IR = ("--smiles", "smiles", "--ir", "ir_spectra", "--ir-grid", "400:4000:1800")


def test_every_form_gives_the_same_records(rows, molecules, tmp_path):
    """JSON, numbers between spaces and over several lines, gzip, Parquet in row groups of 4; chunks of any size."""
    sources = [
        opened(write_csv(tmp_path / "t.csv", rows), *IR),
        opened(write_csv(tmp_path / "t.csv.gz", rows, lambda v: "\n".join(map(repr, v))), *IR),
        opened(write_parquet(tmp_path / "t.parquet", rows, row_group_size=4), *IR),
    ]
    assert [source.total for source in sources] == [None, None, 10]
    first, rejects = read(sources[0], size=100)
    assert not rejects
    assert [r.key for r in first] == [f"t-{i:07d}" for i in range(10)]
    for record, molecule in zip(first, molecules, strict=True):
        assert record.smiles == Chem.CanonSmiles(molecule.smiles) and len(record.numbers) == len(molecule.numbers)
        np.testing.assert_allclose(record.spectra["ir"], curve(molecule, "ir", GRIDS["ir"], 2.0), atol=0.08)
        assert record.methods == {"ir": "not stated"}
    for source, size in itertools.product(sources, (1, 3, 4)):
        assert all(sum(piece[-1] for piece in chunk) <= size for chunk in source.chunks(size))
        again, rejects = read(source, size)
        assert not rejects
        for one, other in zip(again, first, strict=True):
            source_of_both = {"source": other.source}
            assert_same(type(one)(**vars(one) | source_of_both), other)


def test_alberts_2024(rows, tmp_path):
    """A folder of files, with columns that are none of ours; chunks go on from one file to the next."""
    more = [row | {"h_nmr_peaks": [1.0, 2.0], "molecular_formula": "C"} for row in rows]
    write_parquet(tmp_path / "chunk_0.parquet", more[:3])
    write_parquet(tmp_path / "chunk_1.parquet", more[3:])
    (tmp_path / "README.md").write_text("not a table")
    source = opened(tmp_path, "--preset", "alberts2024")
    assert source.total == 10 and [path.name for path in source.inputs] == ["chunk_0.parquet", "chunk_1.parquet"]
    assert next(source.chunks(4)) == [(0, 0, None, 3), (1, 0, None, 1)]
    records, rejects = read(source, size=4)
    assert not rejects
    assert [r.key for r in records][2:4] == ["alberts2024-chunk_0-0000002", "alberts2024-chunk_1-0000000"]
    assert (
        records[0].methods
        == source.provenance["methods"]
        == {"ir": "classical molecular dynamics (Alberts et al. 2024)"}
    )


def test_abscissae_in_a_column_and_other_units(molecules, tmp_path):
    """Each row with its own wavelengths in nm; IR in µm; a Raman spectrum that one row has not."""
    rows = []
    grid = GRIDS["uv_vis"]
    points = {name: np.arange(g.length) * g.step + g.start for name, g in GRIDS.items()}
    for number, record in enumerate(molecules[:3]):
        nm = np.arange(150 + number, 700.0)
        energies = 1e7 / nm / 8065.543937
        rows.append(
            {
                "id": 100 + number,
                "smiles": record.smiles,
                "nm": nm,
                "uv": np.interp(energies, points["uv_vis"], curve(record, "uv_vis", grid, 1.0)),
                "ir": curve(record, "ir", GRIDS["ir"], 1.0)[::-1],
                "raman": None if number == 1 else curve(record, "raman", GRIDS["raman"], 1.0),
                "micrometres": 1e4 / points["ir"][::-1],
            }
        )
    arguments = ["--smiles", "smiles", "--key", "id", "--method", "measured", "--raman", "raman"]
    arguments += ["--raman-grid", "500:4000:3501", "--uv-vis", "uv", "--uv-vis-grid", "nm", "--uv-vis-unit", "nm"]
    arguments += ["--ir", "ir", "--ir-grid", "micrometres", "--ir-unit", "µm"]
    for path in (write_parquet(tmp_path / "t.parquet", rows), write_csv(tmp_path / "t.csv", rows)):
        records, rejects = read(opened(path, *arguments))
        assert not rejects
        assert [(r.key, "raman" in r.spectra, "raman" in r.methods) for r in records] == [
            ("100", True, True),
            ("101", False, False),
            ("102", True, True),
        ]
        for record, molecule in zip(records, molecules, strict=False):
            np.testing.assert_allclose(record.spectra["ir"], curve(molecule, "ir", GRIDS["ir"], 1.0), atol=1e-3)
            wanted = curve(molecule, "uv_vis", grid, 1.0)
            seen = (points["uv_vis"] > 1.8) & (points["uv_vis"] < 8)
            np.testing.assert_allclose(record.spectra["uv_vis"][seen], wanted[seen], atol=0.01)
            assert not record.spectra["uv_vis"][points["uv_vis"] > 8.3].any()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_own_geometries_and_targets(tmp_path, suffix, flat):
    """QM9's first molecules, with the gap in Hartree as published; and an ion."""
    some = list(itertools.islice(qm9.molecules(), 5))
    rows = [
        {
            "id": m.key,
            "smiles": m.smiles,
            "z": m.numbers.astype(int),
            "xyz": m.positions.ravel() if flat else m.positions,
            "gap_ha": m.targets["gap"] / HARTREE,
        }
        for m in some
    ]
    rows.append({"id": "oh", "smiles": "[OH-]", "z": [8, 1], "xyz": [[0.0, 0, 0], [0, 0, 0.96]], "gap_ha": None})
    rows[-1]["xyz"] = np.ravel(rows[-1]["xyz"]).tolist() if flat else rows[-1]["xyz"]
    path = (write_csv if suffix == ".csv" else write_parquet)(tmp_path / f"t{suffix}", rows)
    source = opened(
        path,
        *(
            "--smiles",
            "smiles",
            "--key",
            "id",
            "--numbers",
            "z",
            "--positions",
            "xyz",
            "--targets",
            "gap=gap_ha:Hartree",
        ),
    )
    assert source.provenance["units"] == {"gap": "eV"}
    records, rejects = read(source)
    assert not rejects
    for record, molecule in zip(records, some, strict=False):
        assert (record.key, record.smiles, record.charge) == (molecule.key, molecule.smiles, 0)
        np.testing.assert_array_equal(record.numbers, molecule.numbers)
        np.testing.assert_array_equal(record.positions, molecule.positions.astype(np.float32))
        assert record.targets == {"gap": pytest.approx(molecule.targets["gap"], rel=1e-12)}
    assert (records[-1].charge, records[-1].targets) == (-1, {})


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_bad_rows_are_listed_and_the_others_stay(rows, tmp_path, suffix):
    good = rows[0] | {"name": "good", "gap": "1.5"}
    bad = [
        ({"name": ""}, "t-0000001", "key", "the column name is empty"),
        ({"name": "a", "smiles": ""}, "a", "smiles", "is empty"),
        ({"name": "b", "smiles": "not-one"}, "b", "smiles", "RDKit cannot read the SMILES 'not-one'"),
        (
            {"name": "c", "ir_spectra": good["ir_spectra"][1:]},
            "c",
            "spectra.ir",
            "(1799,) values for (1800,) abscissae",
        ),
        ({"name": "d", "ir_spectra": -good["ir_spectra"]}, "d", "spectra.ir", "negative intensity"),
        ({"name": "e", "ir_spectra": good["ir_spectra"] * np.nan}, "e", "spectra.ir", "not finite"),
        ({"name": "f", "gap": "wide"}, "f", "targets.gap", "'wide' is not a number"),
    ]
    content = [good, *(good | changes for changes, *_ in bad), good | {"name": "last", "ir_spectra": []}]
    path = (write_csv if suffix == ".csv" else write_parquet)(tmp_path / f"t{suffix}", content)
    if suffix == ".csv":
        text = path.read_text().splitlines(keepends=True)
        path.write_text("\ufeff" + "".join(text[:2]) + "\n" + "".join(text[2:]) + "g,C\n" + text[1].replace("[", "[x"))
        bad += [
            ({}, "t-0000009", "row", "not 4 fields, as the header has"),
            ({}, "good", "spectra.ir", "is no list of numbers"),
        ]
    records, rejects = read(opened(path, *IR, "--key", "name", "--targets", "gap=gap:eV"), size=4)
    assert [(r.key, set(r.spectra), r.targets) for r in records] == [
        ("good", {"ir"}, {"gap": 1.5}),
        ("last", set(), {"gap": 1.5}),
    ]
    assert [(error.key, error.field) for error in rejects] == [(key, field) for _, key, field, _ in bad]
    assert all(reason in error.reason for error, (*_, reason) in zip(rejects, bad, strict=True))


@pytest.mark.parametrize(
    ("numbers", "positions", "field", "reason"),
    [
        ([8, 1], [0.0, 0, 0], "positions", "3 coordinates for 2 atoms"),
        ([8, 1.5], [0.0, 0, 0, 0, 0, 1], "numbers", "[8.0, 1.5] are no atomic numbers"),
        ([264, 1], [0.0, 0, 0, 0, 0, 1], "numbers", "are no atomic numbers"),
        ([119, 1], [0.0, 0, 0, 0, 0, 1], "numbers", "119 is not an atomic number"),
        (None, [0.0, 0, 0], "positions", "3 coordinates for 0 atoms"),
        ("water", [0.0, 0, 0], "positions", "'water' is no list of numbers"),
    ],
)
def test_bad_geometries(tmp_path, numbers, positions, field, reason):
    path = write_csv(tmp_path / "t.csv", [{"z": numbers, "xyz": positions}])
    records, (reject,) = read(opened(path, "--numbers", "z", "--positions", "xyz"))
    assert not records and (reject.key, reject.field) == ("t-0000000", field) and reason in reject.reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--smiles is missing"),
        (("--numbers", "z"), "--numbers and --positions: one without the other"),
        (("--smiles", "SMILES"), r"t\.csv: --smiles SMILES: no such column; there are name, smiles, ir_spectra"),
        (("--smiles", "smiles", "--raman", "ir_spectra"), "--raman-grid is missing; give START:STOP:COUNT"),
        (("--smiles", "smiles", "--uv-vis", "uv", "--uv-vis-grid", "1:2:3"), r"--uv-vis uv: no such column"),
        (("--smiles", "smiles", "--ir", "ir_spectra", "--ir-grid", "x"), r"--ir-grid x: no such column"),
        ((*IR, "--targets", "gap=g"), r"t\.csv: --targets gap=g: no such column"),
    ],
)
def test_wrong_options(rows, tmp_path, arguments, message):
    path = write_csv(tmp_path / "t.csv", rows[:1])
    with pytest.raises(UserError, match=message) as error:
        opened(path, *arguments)
    assert "\n" not in str(error.value)


def test_files_that_are_broken_or_not_there(rows, tmp_path):
    with pytest.raises(UserError, match=r"no table \(\.csv, \.csv\.gz, \.parquet\) is there"):
        opened(tmp_path, *IR)
    (tmp_path / "t.parquet").write_bytes(write_parquet(tmp_path / "w.parquet", rows).read_bytes()[:-500])
    with pytest.raises(UserError, match=r"t\.parquet: is no Parquet file that can be read"):
        opened(tmp_path / "t.parquet", *IR)
    (tmp_path / "t.csv.gz").write_bytes(write_csv(tmp_path / "w.csv.gz", rows).read_bytes()[:-500])
    with pytest.raises(UserError, match=r"t\.csv\.gz: cannot be read beyond byte \d+ .*copy it again"):
        read(opened(tmp_path / "t.csv.gz", *IR))


def test_a_large_row_group_is_read_in_bounded_memory(rows, tmp_path):
    """58 MB in one row group, of which a few rows at the end are wanted."""
    values = np.random.default_rng(0).uniform(0, 1, (4000, 1800))
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 1800).cast(pa.list_(pa.float64()))
    content = pa.table({"smiles": ["C"] * 4000, "ir_spectra": column})
    parquet.write_table(content, tmp_path / "t.parquet", row_group_size=4000)
    assert parquet.ParquetFile(tmp_path / "t.parquet").metadata.num_row_groups == 1
    source = opened(tmp_path / "t.parquet", *IR)
    *_, last = source.chunks(1999)
    usual, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        records = list(source.read(last))
    finally:
        pa.set_memory_pool(usual)
    assert [record.key for record in records] == ["t-0003998", "t-0003999"]
    assert 0 < pool.max_memory() < values.nbytes / 2
    x = np.linspace(400, 4000, 1800)
    np.testing.assert_allclose(records[1].spectra["ir"], np.interp(np.arange(500, 4001), x, values[-1]), rtol=1e-5)
