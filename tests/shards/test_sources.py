"""Where molecules come from: QM9, lists of SMILES, and the folder of computed spectra."""

import argparse
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rdkit")

from mspt.data.schema import Lines, validate
from mspt.errors import UserError
from shards.sources import computed, qm9
from tests.shards.reading import read

HARTREE = 27.211386245988
# From the published files dsgdb9nsd_000001.xyz and dsgdb9nsd_000003.xyz (Ramakrishnan et al., 2014).
PUBLISHED = {
    "mu": (0.0, 1.8511, 1),
    "alpha": (13.21, 6.31, 1),
    "homo": (-0.3877, -0.2928, HARTREE),
    "lumo": (0.1171, 0.0687, HARTREE),
    "gap": (0.5048, 0.3615, HARTREE),
    "r2": (35.3641, 19.0002, 1),
    "zpve": (0.044749, 0.021375, HARTREE),
    "u0": (-40.47893, -76.404702, HARTREE),
    "u298": (-40.476062, -76.401867, HARTREE),
    "h298": (-40.475117, -76.400922, HARTREE),
    "g298": (-40.498597, -76.422349, HARTREE),
    "cv": (6.469, 6.002, 1),
}


@pytest.fixture(scope="module")
def first():
    return list(itertools.islice(qm9.molecules(), 300))


def test_targets_are_those_published(first):
    methane, water = first[0], first[2]
    assert set(methane.targets) == set(PUBLISHED) == set(qm9.TARGET_UNITS)
    for name, (of_methane, of_water, factor) in PUBLISHED.items():
        assert methane.targets[name] == pytest.approx(of_methane * factor, rel=1e-9), name
        assert water.targets[name] == pytest.approx(of_water * factor, rel=1e-9), name
        assert (qm9.TARGET_UNITS[name] == "eV") == (factor == HARTREE), name


def test_molecules_of_qm9(first):
    assert [m.key for m in first[:3]] == ["qm9-000001", "qm9-000002", "qm9-000003"]
    water = first[2]
    assert (water.smiles, water.numbers.tolist()) == ("O", [8, 1, 1])
    oxygen, *hydrogens = water.positions
    for hydrogen in hydrogens:
        assert np.linalg.norm(hydrogen - oxygen) == pytest.approx(0.962, abs=0.002)
    np.testing.assert_allclose(water.frequencies, [1671.4, 3803.6, 3907.7], atol=0.1)
    # The published zero-point energy is half a quantum of each mode.
    for molecule in first[:28]:
        zero_point = molecule.frequencies.sum() / 2 / 8065.544
        assert molecule.targets["zpve"] == pytest.approx(zero_point, abs=2e-4), molecule.key


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("['C','H']", ["C", "H"]),
        ("[[0.,-1.5],[2.,3.]]", [[0.0, -1.5], [2.0, 3.0]]),
        ("[7.E-6,-1.25E-05,10.]", [7e-6, -1.25e-5, 10.0]),
    ],
)
def test_odd_numbers_of_the_csv_are_read(text, value):
    assert qm9._list(text) == value


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60), st.integers(0, 9))
def test_a_smaller_choice_is_a_prefix_of_a_larger_one(n, a, b, seed):
    molecules = list(range(n))
    small, large = sorted((min(a, n), min(b, n)))
    chosen = qm9.choose(molecules, large, seed)
    assert len(set(chosen)) == large
    assert chosen[:small] == qm9.choose(molecules, small, seed)
    assert sorted(qm9.choose(molecules, n, seed)) == molecules


@pytest.fixture
def short(monkeypatch, tmp_path):
    """qm9pack's own three files, cut after 20 rows each."""
    for path in qm9.files():
        with path.open("rb") as file:
            (tmp_path / path.name).write_bytes(b"".join(itertools.islice(file, 21)))
    paths = [tmp_path / path.name for path in qm9.files()]
    monkeypatch.setattr(qm9, "files", lambda: paths)


@pytest.mark.parametrize("count", [None, 13])
def test_records_are_the_molecules_of_the_files(short, count):
    """The rows are found by their places, read in chunks that cross files, and are those of molecules()."""
    every = list(qm9.molecules())
    assert len(every) == 60
    chosen = every if count is None else sorted(qm9.choose(every, count, seed=3), key=lambda molecule: molecule.key)
    source = qm9.open(argparse.Namespace(count=count, seed=3))
    records, refused = read(source, size=7)
    assert not refused and source.total == len(chosen)
    assert [record.key for record in records] == [molecule.key for molecule in chosen]
    for record, molecule in zip(records, chosen, strict=True):
        np.testing.assert_array_equal(record.numbers, molecule.numbers)
        np.testing.assert_array_equal(record.positions, molecule.positions.astype(np.float32))
        assert (record.smiles, record.targets) == (molecule.smiles, molecule.targets)


@pytest.fixture(scope="module")
def smiles_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("smiles") / "some.smi"
    path.write_text("O water\n\nC\nnot-a-smiles broken\nN ammonia\n")
    return path


@pytest.fixture(scope="module")
def finished(smiles_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("computed") / "out"
    computed.main(["--molecules", str(smiles_file), "--out", str(out), "--processes", "1"])
    return out


def test_molecules_of_a_smiles_file(smiles_file):
    water, methane, broken, ammonia = computed.smiles_molecules(smiles_file)
    assert [water.key, methane.key, ammonia.key] == ["water", "some-000003", "ammonia"]
    assert [len(m.numbers) for m in (water, methane, ammonia)] == [3, 5, 4]
    assert np.linalg.norm(water.positions[0] - water.positions[1]) == pytest.approx(0.97, abs=0.03)
    key, reason = broken
    assert key == "broken"
    assert f"{smiles_file}:4" in reason
    assert "not-a-smiles" in reason
    again = next(iter(computed.smiles_molecules(smiles_file)))
    np.testing.assert_array_equal(water.positions, again.positions)


def test_names_of_several_words(tmp_path):
    path = tmp_path / "some.smi"
    path.write_text("CC(=O)O\tacetic acid \n  CC(=O)OC(C)=O\tacetic anhydride\n")
    assert [molecule.key for molecule in computed.smiles_molecules(path)] == ["acetic acid", "acetic anhydride"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"some\.smi: cannot be read \(.*No such file.*; give --molecules qm9, or a file of SMILES in UTF-8"),
        ("C méthane".encode("latin-1"), r"some\.smi: cannot be read \(.*decode"),
        (b"C one\n\nO two\nN one\n", r"some\.smi:4: the key 'one' is that of line 1; give each line its own"),
        (b"C some-000002\nO\n", r"some\.smi:2: the key 'some-000002' is that of line 1"),
    ],
)
def test_a_smiles_file_that_cannot_be_computed(tmp_path, content, reason):
    path = tmp_path / "some.smi"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=reason):
        computed.main(["--molecules", str(path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", [b'{"key": "water", "numbers": [8, 1\n', b"\xff\n"])
def test_a_line_of_results_that_is_no_json(finished, smiles_file, tmp_path, line):
    results = tmp_path / "results.jsonl"
    results.write_bytes((finished / "results.jsonl").read_bytes() + line)
    with pytest.raises(UserError, match=r"results\.jsonl:4: is no JSON \(.*; remove the line, and its molecule"):
        computed.open(argparse.Namespace(folder=tmp_path))
    with pytest.raises(SystemExit, match=r"results\.jsonl:4: is no JSON"):
        computed.main(["--molecules", str(smiles_file), "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('["water"]', "is no object of JSON"),
        ('{"reason": "broken"}', "lacks key"),
        ('{"key": "x", "method": {"ir": "GFN2-xTB"}}', "lacks ir, numbers, positions, seconds, smiles, targets"),
    ],
)
def test_a_line_of_results_that_is_no_row(finished, tmp_path, line, reason):
    (tmp_path / "results.jsonl").write_text((finished / "results.jsonl").read_text() + line + "\n")
    with pytest.raises(UserError, match=rf"results\.jsonl:4: {reason}; remove the line, and its molecule"):
        computed.open(argparse.Namespace(folder=tmp_path))


def test_ions_and_radicals_are_refused(tmp_path):
    """A zwitterion, and a salt with both of its ions, are neutral."""
    path = tmp_path / "some.smi"
    path.write_text("[NH4+] ammonium\n[CH3] methyl\n[NH3+]CC(=O)[O-] glycine\n[O-]C=O formate\n[Na+].[Cl-] salt\n")
    found = list(computed.smiles_molecules(path))
    assert [m[0] if isinstance(m, tuple) else m.key for m in found] == [
        "ammonium", "methyl", "glycine", "formate", "salt"
    ]  # fmt: skip
    assert {m[0]: m[1].partition(";")[0] for m in found if isinstance(m, tuple)} == {
        "ammonium": f"{path}:1: charge +1, 0 unpaired electrons",
        "methyl": f"{path}:2: charge +0, 1 unpaired electrons",
        "formate": f"{path}:4: charge -1, 0 unpaired electrons",
    }


def test_a_folder_of_results(finished):
    source = computed.open(argparse.Namespace(folder=finished))
    records, refused = read(source, size=2)
    assert [record.key for record in records] == ["ammonia", "some-000003", "water"]
    for record in records:
        validate(record)
        assert set(record.spectra) == set(record.methods) == {"uv_vis", "ir", "raman"}
        assert all(isinstance(lines, Lines) and len(lines.positions) for lines in record.spectra.values())
        assert all(lines.strengths.min() > computed.WEAKEST[name] for name, lines in record.spectra.items())
    assert [(error.key, error.field) for error in refused] == [("broken", "spectra")]
    assert source.provenance["methods"] == {"ir": "GFN2-xTB", "raman": "GFN2-xTB", "uv_vis": "TD-B3LYP/def2-SVP"}
    assert "SMILES" in source.provenance["source"]
    assert source.total == 4


def test_only_the_spectra_asked_for(finished, tmp_path):
    smiles_file, out, had = tmp_path / "water.smi", tmp_path / "out", tmp_path / "had.txt"
    smiles_file.write_text("N ammonia\nO water\n")
    had.write_text("ammonia\n")
    words = ["--molecules", str(smiles_file), "--out", str(out), "--processes", "1", "--spectra", "ir,raman"]
    computed.main([*words, "--exclude", str(had)])
    source = computed.open(argparse.Namespace(folder=out))
    ((water,), refused) = read(source, size=2)
    assert refused == []
    assert set(water.spectra) == set(water.methods) == set(source.provenance["methods"]) == {"ir", "raman"}
    assert set(source.provenance["cpu_seconds"]) == {"vibrations"}
    (with_all,) = [r for r in read(computed.open(argparse.Namespace(folder=finished)), size=4)[0] if r.key == "water"]
    for name, lines in water.spectra.items():
        np.testing.assert_array_equal(lines.strengths, with_all.spectra[name].strengths)


def test_a_spectrum_that_cannot_be_computed_is_refused(smiles_file, tmp_path):
    with pytest.raises(SystemExit, match="nmr is none of uv_vis, ir, raman"):
        computed.main(["--molecules", str(smiles_file), "--out", str(tmp_path), "--spectra", "ir,nmr"])
    with pytest.raises(
        SystemExit, match=r"nowhere.txt: cannot be read .* give --exclude a file with a key on each line"
    ):
        computed.main(["--molecules", str(smiles_file), "--out", str(tmp_path), "--exclude", "nowhere.txt"])


def test_a_torn_last_line_is_computed_again(finished, smiles_file, tmp_path, capsys):
    whole = (finished / "results.jsonl").read_bytes()
    kept = whole.splitlines(keepends=True)
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "results.jsonl").write_bytes(b"".join(kept[:2]) + kept[2][:-40])
    (torn / "rejects.jsonl").write_bytes((finished / "rejects.jsonl").read_bytes())
    assert [row["key"] for _, row in computed.placed_rows(torn / "results.jsonl")] == [
        json.loads(line)["key"] for line in kept[:2]
    ]
    assert (torn / "results.jsonl").read_bytes().endswith(kept[2][:-40])  # a reader leaves the file as it is

    computed.run(list(computed.smiles_molecules(smiles_file)), torn, processes=1)
    assert "3 molecules done, 1 to do" in capsys.readouterr().out
    again = (torn / "results.jsonl").read_bytes().splitlines(keepends=True)
    assert again[:2] == kept[:2]
    before, after = json.loads(kept[2]), json.loads(again[2])
    del before["seconds"], after["seconds"]
    assert after == before
    assert len(again) == 3
    assert (torn / "rejects.jsonl").read_bytes() == (finished / "rejects.jsonl").read_bytes()


def test_a_molecule_that_becomes_another_one_is_refused():
    """Hydrogen and fluorine 1.5 Å apart have no bond; relaxed they have."""
    apart = qm9.Molecule("apart", np.array([9, 1]), np.array([[0.0, 0, 0], [0, 0, 1.5]]), "", {})
    with pytest.raises(ValueError, match="bonds changed"):
        computed.compute(apart)
    assert computed._work(apart) == {"key": "apart", "smiles": "", "reason": "bonds changed while relaxing by GFN2-xTB"}


def test_bonds():
    numbers, positions = np.array([8, 1, 1]), np.array([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    assert computed.bonds(numbers, positions) == {(0, 1), (0, 2)}


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no results\.jsonl"):
        computed.open(argparse.Namespace(folder=tmp_path))
