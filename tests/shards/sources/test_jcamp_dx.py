"""JCAMP-DX: what goes into a file of any layout comes out on the grid; what is no spectrum is listed with a reason."""

import argparse

import numpy as np
import pytest
import torch

pytest.importorskip("rdkit")
pytest.importorskip("jcamp")

from rdkit import Chem

from mspt.chemistry.spectra import GRIDS, Grid
from mspt.errors import UserError
from shards.sources import jcamp_dx
from tests.shards import curves
from tests.shards.curves import curve
from tests.shards.reading import read

KINDS = {"ir": "INFRARED SPECTRUM", "raman": "RAMAN SPECTRUM", "uv_vis": "UV/VIS SPECTRUM"}
EV_CM = 8065.543937


@pytest.fixture(scope="module")
def molecules():
    return curves.molecules(12)


# 450 to 4000 cm^-1, one point each 0.9643013 as an FT-IR instrument gives it.
FTIR = Grid(unit="cm^-1", start=450.0, step=0.9643013, length=3682)


def sampled(record, name, height=1.5):
    return FTIR.points(dtype=torch.float64).numpy(), curve(record, name, FTIR, height)


def affn(x, y):
    """Integers y in lines of 8, each after the abscissa of its first."""
    return "\n".join(f"{x[i]:.4f} " + " ".join(map(str, y[i : i + 8])) for i in range(0, len(y), 8))


def xy(x, y):
    return "\n".join(f"{a:.5f}, {b}" for a, b in zip(x, y, strict=True))


def pseudo(number, digits):
    """An integer with its first digit and sign as one letter: digits are those of 0 to 9, then of -1 to -9."""
    first, rest = str(abs(number))[0], str(abs(number))[1:]
    return digits[int(first) + (9 if number < 0 else 0)] + rest


def difdup(x, y):
    """Lines of up to 40 values as differences, duplicates counted; each repeats the last value of the line before."""
    lines = []
    for start in range(0, len(y), 40):
        first = max(start - 1, 0)
        tokens = [f"{x[first]:.4f}", pseudo(y[first], "@ABCDEFGHIabcdefghi")]
        counted = []
        for difference in np.diff(y[first : start + 40]):
            if counted and counted[-1][0] == difference:
                counted[-1][1] += 1
            else:
                counted.append([int(difference), 1])
        for difference, count in counted:
            tokens.append(pseudo(difference, "%JKLMNOPQRjklmnopqr"))
            tokens.append(pseudo(count, " STUVWXYZs") if count > 1 else "")
        lines.append("".join(tokens))
    return "\n".join(lines)


def block(name, x, y, xunits="1/CM", yunits="ABSORBANCE", form=affn, yfactor=1e-4, **labels):
    """One block of a file; labels replace the usual ones or, where None, take them away."""
    usual = {
        "TITLE": "a substance",
        "JCAMP-DX": "4.24",
        "DATA TYPE": KINDS.get(name, name),
        "ORIGIN": "here",
        "XUNITS": xunits,
        "YUNITS": yunits,
        "XFACTOR": "1.0",
        "YFACTOR": repr(yfactor),
        "FIRSTX": repr(float(x[0])),
        "LASTX": repr(float(x[-1])),
        "NPOINTS": str(len(x)),
        "FIRSTY": repr(float(y[0])),
    } | {key.replace("_", " "): value for key, value in labels.items()}
    head = "".join(f"##{key}={value}\n" for key, value in usual.items() if value is not None)
    kind = "##XYPOINTS=(XY..XY)" if form is xy else "##XYDATA=(X++(Y..Y))"
    values = np.rint(np.asarray(y) / yfactor).astype(int)
    return f"{head}{kind}\n{form(x, values)}\n##END=\n"


def opened(path, molecules=None):
    return jcamp_dx.open(argparse.Namespace(path=path, molecules=molecules))


def only(folder, text, molecules=None):
    """The one record of a file."""
    (folder / "one.jdx").write_text(text, encoding="utf-8")
    records, rejects = read(opened(folder, molecules))
    assert not rejects
    (record,) = records
    return record


@pytest.mark.parametrize("form", [affn, difdup, xy])
@pytest.mark.parametrize("yunits", ["ABSORBANCE", "TRANSMITTANCE", "% Transmittance", "LOGARITHM EPSILON"])
def test_ordinates_and_forms(molecules, tmp_path, form, yunits):
    """A real spectrum, descending as instruments write it, with flat stretches that DIFDUP counts beyond 9."""
    record = molecules[0]
    x, y = sampled(record, "ir")
    wanted = curve(record, "ir", GRIDS["ir"], 1.5)
    y[y < 0.01] = 0  # flat, so that duplicates are many
    written, factor = {
        "ABSORBANCE": (y, 1e-4),
        "TRANSMITTANCE": (10**-y, 1e-5),
        "% Transmittance": (100 * 10**-y, 1e-3),
        "LOGARITHM EPSILON": (np.log10(y + 1e-3), 1e-4),
    }[yunits]
    text = block("ir", x[::-1], written[::-1], yunits=yunits, form=form, yfactor=factor, SMILES=record.smiles)
    assert form is not difdup or yunits == "LOGARITHM EPSILON" or any(letter + "0" in text for letter in "STUVW")
    found = only(tmp_path, text)
    np.testing.assert_allclose(found.spectra["ir"], wanted, atol=0.035)
    assert np.corrcoef(found.spectra["ir"], wanted)[0, 1] > 0.999
    assert found.methods["ir"].startswith("measured, ") and "provenance" not in found.methods


@pytest.mark.parametrize(
    ("xunits", "there"),
    [("MICROMETERS", lambda x: 1e4 / x), ("µm", lambda x: 1e4 / x), ("NANOMETERS", lambda x: 1e7 / x)],
)
def test_abscissae_of_the_infrared(molecules, tmp_path, xunits, there):
    """Evenly spaced over the wavelength, so that the wavenumbers are not."""
    record = molecules[1]
    x, y = sampled(record, "ir", height=0.8)
    even = np.linspace(there(x[-1]), there(x[0]), 12_000)
    written = np.interp(there(even), x, y)
    found = only(tmp_path, block("ir", even, written, xunits=xunits, SMILES=record.smiles))
    np.testing.assert_allclose(found.spectra["ir"], curve(record, "ir", GRIDS["ir"], 0.8), atol=0.02)


def test_ultraviolet_in_nanometres(molecules, tmp_path):
    """Measured from 150 to 800 nm; a band stays at its energy, and what was not measured is 0."""
    record = molecules[2]
    grid = GRIDS["uv_vis"]
    x, at = np.arange(150, 800.5, 0.5), grid.points(dtype=torch.float64).numpy()
    whole = curve(record, "uv_vis", grid, 1.5)
    text = block("uv_vis", x, np.interp(1e7 / x / EV_CM, at, whole), xunits="Wavelength (nm)", SMILES=record.smiles)
    found = only(tmp_path, text).spectra["uv_vis"]
    measured = (at >= 1e7 / 800 / EV_CM) & (at <= 1e7 / 150 / EV_CM)
    np.testing.assert_allclose(found[measured], whole[measured], atol=0.01)
    outside = (at < 1e7 / 800 / EV_CM - 0.02) | (at > 1e7 / 150 / EV_CM + 0.02)
    assert not found[outside].any()


def test_files_of_one_molecule_join(molecules, tmp_path):
    """Its IR is known by the file's name, its Raman by the CAS number, its UV-Vis by a .mol file beside it."""
    one, other = molecules[3], molecules[4]
    x, y = sampled(one, "ir")
    (tmp_path / "a-ir.jdx").write_text(block("ir", x, y))
    (tmp_path / "deeper").mkdir()
    _, counts = sampled(one, "raman", height=9000.0)
    text = block("raman", x, counts, yunits="ARBITRARY UNITS", yfactor=1, CAS_REGISTRY_NO="0000064-17-5")
    (tmp_path / "deeper" / "b.DX").write_text(text)
    nm = np.arange(200, 700.0)
    (tmp_path / "c.jcamp").write_text(block("uv_vis", nm, np.exp(-(((nm - 260) / 20) ** 2)), xunits="NM"))
    Chem.MolToMolFile(Chem.MolFromSmiles(one.smiles), str(tmp_path / "c.mol"))
    (tmp_path / "d.jdx").write_text(block("ir", x, y, SMILES=other.smiles))
    (tmp_path / "notes.txt").write_text("not a spectrum")
    table = tmp_path / "table.csv"
    table.write_text(f"key,smiles\na-ir,{one.smiles}\n64-17-5,{Chem.MolToSmiles(Chem.MolFromSmiles(one.smiles))}\n")

    source = opened(tmp_path, table)
    assert {path.name for path in source.inputs} == {"a-ir.jdx", "b.DX", "c.jcamp", "c.mol", "d.jdx", "table.csv"}
    records, rejects = read(source, size=1)
    assert not rejects
    joined, single = records
    key = Chem.MolToInchiKey(Chem.MolFromSmiles(one.smiles))
    assert (joined.key, set(joined.spectra)) == (f"jcamp-{key}", {"ir", "raman", "uv_vis"})
    assert joined.methods["raman"] == "measured, arbitrary units" and joined.methods["ir"] == "measured, absorbance"
    assert joined.spectra["raman"].max() == pytest.approx(9000, rel=0.02)  # the numbers stay as they are
    assert (single.smiles, set(single.spectra)) == (Chem.CanonSmiles(other.smiles), {"ir"})
    assert sorted(joined.numbers) == sorted(one.numbers) and joined.positions.shape == (len(one.numbers), 3)
    again, _ = read(opened(tmp_path, table), size=5)
    np.testing.assert_array_equal(again[0].positions, joined.positions)


@pytest.mark.parametrize("link", [True, False])
def test_several_blocks_in_a_file(molecules, tmp_path, link):
    """Inside a LINK or end to end; the structure may stand in one of them, and comments anywhere."""
    record = molecules[5]
    x, y = sampled(record, "ir")
    blocks = block("ir", x, y, XUNITS="1/CM $$ as always", form=difdup, SMILES=record.smiles)
    blocks += block("raman", x, y / 2).replace("##END=", "$$ that was all\n##END=")
    text = f"##TITLE=both\n##DATA TYPE=LINK\n##BLOCKS=3\n{blocks}##END=\n" if link else blocks
    found = only(tmp_path, text.replace("\n", "\r\n"))
    np.testing.assert_allclose(found.spectra["ir"], 2 * found.spectra["raman"], atol=3e-4)


X = np.arange(450, 4001.0)
Y = 1 / (1 + ((X - 1700) / 20) ** 2)
ETHANOL, ACETONE, BENZENE = "CCO", "CC(C)=O", "c1ccccc1"


def key(smiles):
    return f"jcamp-{Chem.MolToInchiKey(Chem.MolFromSmiles(smiles))}"


@pytest.mark.parametrize("link", [True, False])
@pytest.mark.parametrize(
    ("owns", "kept", "refused"),
    [
        # The last block says nothing: it is of what the one before it is.
        ([{"SMILES": "CO"}, {"SMILES": "CCCO"}, {}], {"ir"}, [key("CCCO")] * 2),
        ([{}, {"SMILES": "CO"}, {"$INCHI": "InChI=1S/CH4O/c1-2/h2H,1H3"}], {"ir", "raman", "uv_vis"}, []),
        (
            [{"CAS REGISTRY NO": "64-17-5"}, {"CAS REGISTRY NO": "67-64-1"}, {"CAS REGISTRY NO": "71-43-2"}],
            {"ir"},
            [key(ACETONE), "71-43-2"],  # which is not in the table
        ),
        (
            [{"CAS REGISTRY NO": "67-56-1", "SMILES": "CO"}, {"CAS REGISTRY NO": "67-56-1"}, {"SMILES": "not-one"}],
            {"ir", "raman"},
            ["not-one"],
        ),
    ],
)
def test_a_block_of_another_molecule_is_refused(tmp_path, link, owns, kept, refused):
    (tmp_path / "table.csv").write_text(f"key,smiles\n64-17-5,{ETHANOL}\n67-64-1,{ACETONE}\n")
    nm = np.arange(200, 700.0)
    text = block("ir", X, Y, **owns[0]) + block("raman", X, Y, **owns[1])
    text += block("uv_vis", nm, np.exp(-(((nm - 260) / 20) ** 2)), xunits="NM", **owns[2])
    (tmp_path / "a.jdx").write_text(f"##TITLE=t\n##DATA TYPE=LINK\n##BLOCKS=4\n{text}##END=\n" if link else text)
    (record,), rejects = read(opened(tmp_path, tmp_path / "table.csv"))
    assert set(record.spectra) == kept
    assert {reject.field for reject in rejects} == {"spectra.ir", "spectra.raman", "spectra.uv_vis"} - {
        f"spectra.{name}" for name in kept
    }
    for reject, substance in zip(rejects, refused, strict=True):
        assert f"the block is of {substance}, its file of {record.key}; give each" in reject.reason


def test_a_link_that_names_another_molecule_than_its_block(tmp_path):
    blocks = block("raman", X, Y) + block("ir", X, Y, SMILES="CCCO")
    text = f"##TITLE=both\n##DATA TYPE=LINK\n##SMILES=CO\n{blocks}##END=\n"
    (tmp_path / "a.jdx").write_text(text)
    (record,), (reject,) = read(opened(tmp_path))
    assert (record.key, set(record.spectra), reject.field) == (key("CO"), {"raman"}, "spectra.ir")


def test_a_name_corrects_the_labels_of_a_file_but_not_of_several_substances(tmp_path):
    """The table says what a file is of, whatever its labels say; where they say two things only its own stays."""
    (tmp_path / "one.jdx").write_text(block("ir", X, Y, SMILES="CO"))
    (tmp_path / "two.jdx").write_text(block("ir", X, Y, SMILES="CO") + block("raman", X, Y, SMILES=BENZENE))
    (tmp_path / "table.csv").write_text(f"key,smiles\none,{ETHANOL}\ntwo,{BENZENE}\n")
    records, (reject,) = read(opened(tmp_path, tmp_path / "table.csv"))
    assert [(r.key, set(r.spectra)) for r in records] == [(key(ETHANOL), {"ir"}), (key(BENZENE), {"raman"})]
    assert (reject.key, reject.field) == ("two.jdx", "spectra.ir")


@pytest.mark.parametrize(
    "labels",
    [
        {"SMILES": "CCCCCC\nCCCCO"},
        {"SMILES": "\nCCCCCCCCCCO\n"},
        {"$InChI": "InChI=1S/C10H22O/c1-2-3-4-5-\n6-7-8-9-10-11/h11H,2-10H2,1H3"},
        {"CAS REGISTRY NO": "112-\n  30-1"},
    ],
)
def test_labels_of_several_lines(tmp_path, labels):
    (tmp_path / "table.csv").write_text("key,smiles\n112-30-1,CCCCCCCCCCO\n")
    assert only(tmp_path, block("ir", X, Y, **labels), tmp_path / "table.csv").key == key("CCCCCCCCCCO")


def test_structures_by_inchi_and_sdf(molecules, tmp_path):
    first, second = (Chem.MolFromSmiles(molecules[i].smiles) for i in (6, 7))
    x, y = sampled(molecules[6], "ir")
    (tmp_path / "a.jdx").write_text(block("ir", x, y, **{"$INCHI": Chem.MolToInchi(first)}))
    (tmp_path / "b.jdx").write_text(block("ir", x, y))
    with Chem.SDWriter(str(tmp_path / "b.sdf")) as writer:
        writer.write(second)
    records, rejects = read(opened(tmp_path))
    assert not rejects
    assert [r.key for r in records] == [f"jcamp-{Chem.MolToInchiKey(molecule)}" for molecule in (first, second)]


GOOD = block("ir", X, Y, SMILES="O")


@pytest.mark.parametrize(
    ("text", "field", "reason"),
    [
        (block("NMR SPECTRUM", X, Y, SMILES="O"), "spectra", "##DATATYPE is 'NMR SPECTRUM'"),
        (block("ir", X, Y, yunits="REFLECTANCE", SMILES="O"), "spectra.ir", "##YUNITS is 'REFLECTANCE'"),
        (block("ir", X, Y, xunits="SECONDS", SMILES="O"), "spectra.ir", "##XUNITS is 'SECONDS'"),
        (block("ir", X, Y, SMILES="O", YUNITS=None), "spectra.ir", "##YUNITS is ''"),
        (block("ir", X, Y, SMILES="O", FIRSTX=None), "spectra.ir", "KeyError('firstx')"),
        (block("ir", X, Y, SMILES="O", NPOINTS="3000"), "spectra.ir", "X-Check failed"),
        (block("ir", X, Y, SMILES="O", form=xy, NPOINTS="3000"), "spectra.ir", "3551 points are there where ##NPOINTS"),
        (GOOD.replace("1698.0000 ", "1698.0000 ? "), "spectra.ir", "Unknown character (?)"),
        ("".join(GOOD.splitlines(keepends=True)[:200]), "spectra.ir", "Mismatch of array lengths"),
        (GOOD.split("##XYDATA")[0] + "##END=\n", "spectra.ir", "neither ##XYDATA= nor ##XYPOINTS="),
        (GOOD.replace("XYDATA=(X++(Y..Y))", "PEAK TABLE=(XY..XY)"), "spectra.ir", "neither ##XYDATA="),
        (block("ir", X, Y, SMILES="O", form=difdup).replace("\n1689.0000", "\n1689.0000A0A"), "spectra.ir", "Check"),
        (block("ir", X, Y - 0.2, SMILES="O"), "spectra.ir", "negative intensity"),
        (block("ir", X[X > 2000], Y[X > 2000], SMILES="O"), "spectra.ir", "cover 57% of the grid"),
        (block("raman", X, Y, xunits="NANOMETERS", SMILES="O"), "spectra.raman", "wavelength of the laser"),
        # Comma decimals: jcamp takes the comma for a separator; the counts give it away.
        (block("ir", X, Y, SMILES="O").replace(".0000 ", ",0 "), "spectra.ir", "Mismatch of array lengths"),
        (block("ir", X, Y, SMILES="O", form=xy).replace(".00000, ", ",0 0,"), "spectra.ir", "points are there where"),
        ("##SMILES=O\n", "spectra", "##DATATYPE is ''"),
        (GOOD.replace("##SMILES=O\n", ""), "smiles", "the structure is not known: neither 'bad' nor the CAS number ''"),
        (GOOD.replace("##SMILES=O", "##SMILES=not-one"), "smiles", "no InChIKey of the SMILES 'not-one'"),
        (GOOD.replace("##SMILES=O", "##INCHI=1S/not-one"), "smiles", "cannot read the InChI '1S/not-one'"),
        (GOOD.replace("##SMILES=O", "##SMILES=" + "C1" * 2 + "C12" * 2), "smiles", "no InChIKey"),
        (GOOD, "spectra.ir", "jcamp-XLYOFNOQVPJJNP-UHFFFAOYSA-N has one already, of a.jdx"),
    ],
)
def test_bad_files_are_listed_and_the_others_stay(tmp_path, capsys, text, field, reason):
    """Beside a good spectrum of water."""
    (tmp_path / "a.jdx").write_text(GOOD)
    (tmp_path / "bad.jdx").write_text(text)
    records, rejects = read(opened(tmp_path))
    assert [record.key for record in records] == ["jcamp-XLYOFNOQVPJJNP-UHFFFAOYSA-N"]
    np.testing.assert_allclose(records[0].spectra["ir"], Y[50:], atol=1e-4)
    (reject,) = rejects
    assert (reject.key, reject.field) == ("bad.jdx", field) and reason in reject.reason
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("raw", "read_as"), [("100AJ%T2JS", [1, 2, *[2] * 22, 3]), ("100A2TB1U% J", [12, 12, *[21] * 4, 22])]
)
def test_forms_that_the_package_misreads(raw, read_as):
    """Counts of duplicates above 9, duplicates of a value, a space before a difference; by hand after the standard."""
    head = f"##TITLE=t\n##FIRSTX=100\n##LASTX={99 + len(read_as)}\n##NPOINTS={len(read_as)}\n##XYDATA= (X++(Y..Y))\n"
    x, y = jcamp_dx._points({"XYDATA": ""}, head + raw + "\n")
    assert (x.tolist(), y.tolist()) == (list(range(100, 100 + len(read_as))), read_as)


def test_a_row_without_cas_number_in_the_table_is_no_wildcard(tmp_path):
    """A file of which nothing is known does not get the structure of a row that has no CAS number."""
    (tmp_path / "unknown.jdx").write_text(block("ir", X, Y))
    (tmp_path / "table.csv").write_text("key,smiles\nwater,O\n")
    records, rejects = read(opened(tmp_path, tmp_path / "table.csv"))
    assert not records and rejects[0].field == "smiles"


def test_what_the_user_can_put_right(tmp_path):
    with pytest.raises(UserError, match=r"no JCAMP-DX file \(\.jdx, \.dx, \.jcamp\) is there"):
        opened(tmp_path)
    with pytest.raises(UserError, match="no JCAMP-DX file"):
        opened(tmp_path / "missing.jdx")
    (tmp_path / "a.jdx").write_text(GOOD)
    with pytest.raises(UserError, match=r"table\.csv: cannot be read \(.*No such file"):
        opened(tmp_path / "a.jdx", tmp_path / "table.csv")
    (tmp_path / "table.csv").write_text("name,smiles\nwater,O\n")
    with pytest.raises(UserError, match=r"table\.csv: the columns are name, smiles; --molecules wants key and smiles"):
        opened(tmp_path / "a.jdx", tmp_path / "table.csv")
