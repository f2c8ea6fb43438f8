"""What is said of a shard set is what its records say, counted anew here."""

import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from mspt.chemistry.elements import SYMBOLS
from mspt.chemistry.spectra import GRIDS, LINE_SHAPES
from mspt.data import look
from mspt.data.describe import describe, info
from mspt.data.schema import Lines
from mspt.data.shardset import ShardSet
from mspt.errors import UserError
from shards import molecules
from tests.data.molecules import plain, record, write_set
from tests.data.real import BUNDLED, write_everything

DOCUMENTATION = BUNDLED.parents[2] / "docs" / "data.md"


@pytest.fixture(scope="module")
def bundled():
    return ShardSet.open(BUNDLED / "heldout")


@pytest.fixture(scope="module")
def records(bundled):
    return list(bundled.records(range(len(bundled))))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A ShardSet, and its records as they were before they were written."""
    folder = tmp_path_factory.mktemp("everything") / "set"
    records = write_everything(folder)
    return ShardSet.open(folder), records


def test_a_path_as_a_shell_completes_it(monkeypatch):
    monkeypatch.chdir(BUNDLED)
    for path in ("heldout/", "./heldout", BUNDLED / "heldout"):
        assert len(look.open_one(path)) == len(ShardSet.open(BUNDLED / "heldout"))
    with pytest.raises(UserError, match=r"is no shard set but holds .*heldout.*train; give one of them"):
        look.open_one(f"{BUNDLED}/")


def lorentzian(spectrum, grid, width):
    x = grid.start + grid.step * np.arange(grid.length)
    distances = x[:, None] - spectrum.positions.astype(float)
    return (spectrum.strengths * (width / 2 / math.pi) / (distances**2 + (width / 2) ** 2)).sum(1)


def test_everything_is_read_where_the_blocks_are_few(bundled, records):
    said = describe(bundled)
    assert said["sample"] == {"blocks": 7, "records": 223}
    atoms = [len(r.numbers) for r in records]
    assert (said["records"], said["atoms"]) == (len(records), sum(atoms))
    assert said["bytes"] == sum(file.stat().st_size for file in Path(bundled.folder).glob("*.tar"))
    assert said["bytes_per_record"] == said["bytes"] / 223
    assert (said["sizes"]["min"], said["sizes"]["max"]) == (min(atoms), max(atoms))
    assert said["sizes"]["mean"] == pytest.approx(np.mean(atoms))
    for name, share in (("median", 0.5), ("p95", 0.95)):
        assert said["sizes"][name] == np.quantile(atoms, share, method="inverted_cdf")
    for low, high, count in said["sizes"]["histogram"]:
        assert count == sum(low <= n <= high for n in atoms)
    assert sum(count for *_, count in said["sizes"]["histogram"]) == 223
    elements = Counter(SYMBOLS[z] for r in records for z in r.numbers)
    assert {symbol: e["atoms"] for symbol, e in said["elements"].items()} == elements
    assert list(said["elements"]) == [symbol for symbol, _ in elements.most_common()]
    assert said["elements"]["O"]["share"] == pytest.approx(elements["O"] / sum(atoms))
    assert said["has"] == {"smiles": 223, "bonds": 0, "forces": 0, "charge": 0}
    for name, target in said["targets"].items():
        values = [r.targets[name] for r in records]
        expected = {"mean": np.mean(values), "std": np.std(values), "min": min(values), "max": max(values)}
        assert target["read"] == pytest.approx({"records": 223, **expected})
    assert said["targets"].keys() == records[0].targets.keys()
    assert said["provenance"] == bundled.manifest["provenance"]


def test_spectra_of_lines(bundled, records):
    said = describe(bundled)["spectra"]
    assert said.keys() == set(GRIDS)
    for name, spectrum in said.items():
        lines = [r.spectra[name] for r in records]
        assert (spectrum["records"], spectrum["read"]["lines"], spectrum["read"]["values"]) == (223, 223, 0)
        assert spectrum["lines_per_record"] == pytest.approx(np.mean([len(s.positions) for s in lines]), abs=0.05)
        assert spectrum["mean_total"] == pytest.approx(np.mean([s.strengths.sum(dtype=float) for s in lines]))
        for part in ("positions", "strengths"):
            together = np.concatenate([getattr(s, part) for s in lines])
            assert spectrum["read"][f"line_{part}"] == [together.min(), together.max()]
        assert spectrum["read"]["range"] is None
    mean = np.mean([lorentzian(r.spectra["ir"], GRIDS["ir"], LINE_SHAPES["ir"].width) for r in records], axis=0)
    position, height = said["ir"]["read"]["mean_bands"][0]
    assert (position, height) == (500 + mean.argmax(), pytest.approx(mean.max(), rel=1e-4))
    assert said["ir"]["unit"] == "km/mol per cm⁻¹"


def test_a_sample_is_evenly_spread_and_says_so(bundled, records):
    said = describe(bundled, 3)
    assert look.sample(bundled, 3).tolist() == [0, 3, 6]
    chosen = [r for i, r in enumerate(records) if i // 32 in (0, 3, 6)]
    assert said["sample"] == {"blocks": 3, "records": len(chosen)}
    assert said["targets"]["gap"]["read"]["mean"] == pytest.approx(np.mean([r.targets["gap"] for r in chosen]))
    assert said["records"] == 223
    text = info(said)
    assert f"3 of 7 blocks, evenly spread: {len(chosen)} of 223 records" in text
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    with pytest.raises(UserError, match="--blocks is 0; give 1 or more"):
        describe(bundled, 0)


def test_what_only_some_records_have(everything):
    shardset, records = everything
    said = describe(shardset)
    assert said["has"] == {"smiles": 6, "bonds": 5, "forces": 2, "charge": 1}
    counts = {name: (s["records"], s["read"]["values"], s["read"]["lines"]) for name, s in said["spectra"].items()}
    assert counts == {"uv_vis": (1, 0, 1), "ir": (3, 2, 1), "raman": (5, 0, 5)}
    values = [r.spectra["ir"] for r in (records[0], records[2])]
    assert said["spectra"]["ir"]["read"]["range"] == [min(v.min() for v in values), max(v.max() for v in values)]
    energies = [records[0].targets["energy"], records[2].targets["energy"]]
    expected = {"mean": np.mean(energies), "std": np.std(energies), "min": min(energies), "max": max(energies)}
    assert said["targets"]["energy"]["read"] == pytest.approx({"records": 2, **expected})
    text = info(said)
    assert re.search(r"with forces +2\n +charged +1\n", text)
    assert "ir: 3 records (50.0%)" in text and "read: 2 as values, 1 as lines" in text
    assert "\ntargets (of the records read)\n" in text and "energy (unit not stated)" in text


def test_units_are_those_that_the_build_named():
    said = describe(ShardSet.open(BUNDLED.parent / "qm9-geometries" / "heldout"), 1)
    assert {name: said["targets"][name]["unit"] for name in ("alpha", "gap")} == {"alpha": "a0^3", "gap": "eV"}
    assert "alpha (a0^3)" in info(said)


def test_a_set_without_spectra_and_targets(tmp_path):
    write_set(tmp_path / "set", plain([1, 1, 1]))
    text = info(describe(ShardSet.open(tmp_path / "set")))
    assert "\nno spectra\n" in text and "\nno targets\n" in text
    assert re.search(r"sizes \(atoms\): min 1, median 1, mean 1.0, 95 % 1, max 1\n +1  3  █{40}\n", text)


def test_sizes_are_counted_a_piece_at_a_time(bundled, monkeypatch):
    monkeypatch.setattr(look, "_ATOMS_AT_ONCE", 10)
    np.testing.assert_array_equal(look.sizes(bundled), np.bincount(bundled.atoms))


def test_bands_are_the_highest_maxima_apart_from_each_other():
    grid, values = GRIDS["uv_vis"], np.zeros(GRIDS["uv_vis"].length)
    values[[100, 103, 300, 700]] = [5, 4, 3, 7]
    values[500] = 0.001
    # 103 is part of the band at 100; 500 is noise; 700 is the end of the grid.
    assert look.bands(values, grid, 9) == [(15.0, 7), (3.0, 5), (7.0, 3)]
    assert look.bands(values, grid, 1) == [(15.0, 7)]
    assert look.bands(np.zeros(grid.length), grid, 5) == []


def test_a_record_is_found_by_its_key_or_its_number(bundled, records):
    for number in (0, 31, 32, 100, 222):
        assert look.find(bundled, records[number].key) == number
        assert look.find(bundled, str(number)) == number
    with pytest.raises(UserError, match="no record 223; the numbers are 0 to 222"):
        look.find(bundled, "223")


def test_an_unknown_key_names_the_nearest(bundled, records):
    key = records[50].key
    for wrong in (key.replace("qm9", "qm8"), key.replace("-0", "-"), key + "0"):
        with pytest.raises(UserError) as error:
            look.find(bundled, wrong)
        assert repr(wrong) in str(error.value) and key in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"such as {records[0].key}, or a number from 0 to 222"):
        look.find(bundled, "?????")


def test_digits_are_a_key_first_where_keys_are_digits(tmp_path):
    write_set(tmp_path / "set", [record("7", seed=0), record("0", seed=1), record("3", seed=2)], block=2)
    shardset = ShardSet.open(tmp_path / "set")
    assert [look.find(shardset, text) for text in ("7", "0", "3", "1")] == [0, 1, 2, 1]


def test_a_key_is_not_taken_for_another_of_the_same_word(bundled, records, monkeypatch):
    monkeypatch.setattr(look.keyed, "word", lambda key: int(bundled.block(1)["words"][0]))
    with pytest.raises(UserError, match="no record has the key"):
        look.find(bundled, records[0].key)
    assert look.find(bundled, records[32].key) == 32


def test_show_says_all_of_a_record(everything):
    shardset, records = everything
    one = records[0]
    text = look.show(shardset, 0)
    assert text.startswith("record 0 of 6: qm9-020497\n  formula  C5H5N3\n")
    for part in (one.smiles, "13 atoms (positions Å, forces eV/Å)", f"{one.targets['energy']:.6g}", one.source):
        assert part in text
    assert "\nuv_vis: not in this record\n" in text
    rows = [line.split() for line in text.splitlines() if re.match(r"  \d+ +[A-Z][a-z]? +-?\d+\.\d{4}", line)]
    assert [row[1] for row in rows] == [SYMBOLS[z] for z in one.numbers]
    numbers = np.array([row[2:] for row in rows], float)
    np.testing.assert_allclose(numbers, np.hstack([one.positions, one.forces]), atol=5.1e-5)
    written = re.findall(r"[A-Z][a-z]?(\d+)([-=#:~])[A-Z][a-z]?(\d+)", text)
    signs = {1: "-", 2: "=", 3: "#", 4: ":"}
    assert [(int(i), int(j)) for i, _, j in written] == [tuple(pair) for pair in one.bonds]
    assert [sign for _, sign, _ in written] == [signs[code] for code in one.bond_types]
    assert {"-", "#", ":"} <= {sign for _, sign, _ in written}
    low, high = one.spectra["ir"].min(), one.spectra["ir"].max()
    assert f"ir: 3501 values (float16), GFN2-xTB; {low:.4g} to {high:.4g}; the highest bands" in text
    cation = look.show(shardset, 5)
    assert "charge   1\n" in cation and "no targets" in cation and "forces" not in cation
    assert "source   not stated" in cation and "ir: not in this record" in cation


def test_show_gives_the_strongest_lines(bundled, records):
    text = look.show(bundled, 17)
    assert "no bonds in this record" in text
    section = text[text.index("\nraman: ") :].splitlines()
    lines = records[17].spectra["raman"]
    strongest = sorted(zip(lines.strengths, lines.positions, strict=True), reverse=True)[:10]
    assert section[1] == f"raman: {len(lines.positions)} lines, GFN2-xTB; the strongest"
    assert section[2].split() == ["cm⁻¹", "Å⁴/amu"]
    assert [row.split() for row in section[3:]] == [[f"{x:.4f}", f"{y:.4g}"] for y, x in strongest]


def test_a_spectrum_that_shows_nothing(tmp_path):
    nothing = Lines(np.zeros(0, np.float32), np.zeros(0, np.float32))
    write_set(tmp_path / "set", [record(spectra={"uv_vis": nothing})])
    shardset = ShardSet.open(tmp_path / "set")
    assert "uv_vis: 0 lines, method not stated\n" in look.show(shardset, 0)
    assert describe(shardset)["spectra"]["uv_vis"]["read"]["line_positions"] is None


def test_codes_of_bonds_are_those_that_sources_write():
    assert {name: look.BONDS[code] for name, code in molecules.BOND_TYPES.items()} == {
        "SINGLE": "-",
        "DOUBLE": "=",
        "TRIPLE": "#",
        "AROMATIC": ":",
    }


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([8, 1, 1], "H2O"), ([7, 6, 1, 8, 1], "CH2NO"), ([17, 11], "ClNa"), ([6], "C"), ([6, 17, 17, 35], "CBrCl2")],
)
def test_formulas_are_in_hills_order(numbers, expected):
    assert look.formula(numbers) == expected


def test_xyz_is_read_by_others(records, tmp_path):
    ase = pytest.importorskip("ase.io")
    (tmp_path / "one.xyz").write_text(look.xyz(records[3]) + "\n")
    atoms = ase.read(tmp_path / "one.xyz")
    np.testing.assert_array_equal(atoms.numbers, records[3].numbers)
    np.testing.assert_allclose(atoms.positions, records[3].positions, atol=1e-6)


def test_a_folder_of_sets_means_them_all_or_none(bundled):
    assert [folder.name for folder in look.sets(BUNDLED)] == ["heldout", "train"]
    assert look.sets(Path(bundled.folder)) == [Path(bundled.folder)]
    with pytest.raises(UserError, match=r"qm9-spectra: is no shard set but holds .*heldout, .*train; give one of them"):
        look.open_one(BUNDLED)
    with pytest.raises(UserError, match=r"bundled/manifest\.json: not there, so .* is no shard set"):
        look.open_one(BUNDLED.parent)


def test_verify_reads_everything(bundled, tmp_path):
    size = describe(bundled)["bytes"]
    assert f"1 shards, 7 blocks, 223 records, {size:,} bytes" in look.verify(Path(bundled.folder))
    told = []
    bundled.verify(told.append)
    assert sum(told) == size + bundled.size.sum()
    copy = shutil.copytree(Path(bundled.folder), tmp_path / "set")
    data = bytearray((copy / "shard-00000.tar").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "shard-00000.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00000\.tar: is damaged"):
        look.verify(copy)


def test_the_lines_in_the_documentation_read_a_shard(bundled, records, monkeypatch):
    """Plain webdataset and safetensors, as docs/data.md has it."""
    text = DOCUMENTATION.read_text()
    [code] = [c for c in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "webdataset" in c]
    assert "DIR" in code and "mspt" not in code
    load, seen = safetensors.numpy.load, []
    monkeypatch.setattr(safetensors.numpy, "load", lambda data: seen.append(load(data)) or seen[-1])
    exec(code.replace("DIR", str(Path(bundled.folder))), {})
    assert len(seen) == 7
    keys, numbers, positions = (
        np.concatenate([block[name] for block in seen]) for name in ("keys", "numbers", "positions")
    )
    assert keys.tobytes().decode() == "".join(r.key for r in records)
    np.testing.assert_array_equal(numbers, np.concatenate([r.numbers for r in records]))
    np.testing.assert_array_equal(positions, np.concatenate([r.positions for r in records]))
    lines = np.concatenate([block["spectra/ir/positions"] for block in seen])
    np.testing.assert_array_equal(lines, np.concatenate([r.spectra["ir"].positions for r in records]))
    assert [len(block["ptr"]) - 1 for block in seen] == bundled.block_records.tolist()


def test_a_damaged_block_is_named(everything, tmp_path):
    copy = ShardSet.open(shutil.copytree(everything[0].folder, tmp_path / "set"))
    data = bytearray((Path(copy.folder) / "shard-00000.tar").read_bytes())
    data[int(copy.offset[1]) + 200] ^= 1
    (Path(copy.folder) / "shard-00000.tar").write_bytes(data)
    for action in (describe, lambda s: look.find(s, "nothing"), lambda s: look.show(s, len(s) - 1)):
        with pytest.raises(UserError, match=r"shard-00000\.tar: block 1 is damaged"):
            action(copy)
