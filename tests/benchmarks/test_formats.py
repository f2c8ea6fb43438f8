"""What the loader's benchmark compares: every format gives back the molecules it was given, each once, shuffled."""

import numpy as np
import pytest
import torch

from benchmarks import formats
from mspt.chemistry.spectra import GRIDS

COUNT, BATCH = 75, 16


@pytest.mark.parametrize("build", [formats.with_spectra, formats.without_spectra])
@pytest.mark.parametrize("side", [side for side in formats.SIDES if side != "limit"])
def test_every_molecule_once_as_it_was(side, build, tmp_path):
    if side in formats.missing():
        pytest.skip(f"{formats.missing()[side]} is not installed")
    records = build(COUNT)
    formats.SIDES[side].write(records, tmp_path / "set")
    reader = formats.SIDES[side](tmp_path / "set", BATCH)
    for epoch in range(2):
        seen = []
        for batch in reader.batches(epoch):
            plain = reader.plain(batch)
            seen += plain["record"].flatten().tolist()
            assert reader.count(batch) == len(plain["record"]) <= BATCH
            assert_same(plain, formats.collate([formats.sample(records[i]) for i in plain["record"].flatten()]))
        assert sorted(seen) == list(range(COUNT)) != seen


def assert_same(batch, expected):
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        # MDS has no bool.
        own = batch[name].bool() if name == "present" else batch[name]
        assert own.dtype == values.dtype, name
        torch.testing.assert_close(own, values, rtol=0, atol=0, msg=name)


def test_spectra_fit_into_half_precision():
    for record in formats.with_spectra(20):
        assert record.spectra.keys() == GRIDS.keys()
        assert all(np.isfinite(values).all() and values.any() for values in record.spectra.values())


def test_limit_reads_all_bytes(tmp_path):
    formats.Mspt.write(formats.without_spectra(COUNT), tmp_path)
    reader = formats.Limit(tmp_path, BATCH)
    read = list(reader.batches(0))
    assert sum(read) == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert sum(map(reader.count, read)) == pytest.approx(COUNT)
