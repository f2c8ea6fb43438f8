"""Statistics of labels: right on data whose answer is known, and as precise as the labels after any change of type."""

import numpy as np
import pytest
import torch

from mspt.data.batch import MoleculeBatch
from mspt.data.shardset import ShardSet
from mspt.errors import UserError
from mspt.objectives.statistics import Statistics
from tests.data.molecules import record, write_set

ENERGY = {1: -16.48, 6: -1035.57, 8: -2057.92}


def labelled(count=60, noise=0.0, missing=()):
    """Records whose target is the sum of ENERGY, an offset and noise."""
    rng, records = np.random.default_rng(0), []
    for i in range(count):
        numbers = rng.choice(list(ENERGY), rng.integers(2, 9)).astype(np.uint8)
        value = sum(ENERGY[z] for z in numbers.tolist()) + noise * rng.normal()
        records.append(
            record(f"mol-{i}", len(numbers), seed=i, numbers=numbers, targets={} if i in missing else {"u0": value})
        )
    return records


def fitted(folder, records, with_references):
    write_set(folder, records, block=7)
    statistics = Statistics()
    statistics.fit([ShardSet.open(folder)], "u0", with_references)
    return statistics


def test_references_of_linear_data_are_exact(tmp_path):
    records = labelled(missing=(0, 5))
    statistics = fitted(tmp_path / "set", records, with_references=True)
    for number, energy in ENERGY.items():
        assert statistics.references[number].item() == pytest.approx(energy, rel=1e-9)
    assert statistics.references.isfinite().sum() == len(ENERGY)
    batch = MoleculeBatch.from_records(records[1:5])
    np.testing.assert_allclose(statistics.baseline(batch), [r.targets["u0"] for r in records[1:5]], rtol=1e-9)
    assert abs(statistics.mean) < 1e-6


def test_an_element_that_no_label_has_is_not_known(tmp_path):
    """Not an energy of zero; without references every element is alike."""
    numbers = np.array([6, 1, 17], np.uint8)
    strange = [record("known", 3, numbers=np.array([6, 1, 8], np.uint8)), record("strange", 3, numbers=numbers)]
    batch = MoleculeBatch.from_records(strange)
    statistics = fitted(tmp_path / "set", labelled(), with_references=True)
    assert statistics.unknown(batch) == ("strange", "Cl")
    assert statistics.baseline(batch).isfinite().tolist() == [True, False]
    plain = fitted(tmp_path / "plain", labelled(), with_references=False)
    assert plain.unknown(batch) is None and plain.baseline(batch).isfinite().all()


def test_mean_and_deviation_of_what_is_left(tmp_path):
    records = labelled(noise=0.5)
    plain = fitted(tmp_path / "plain", records, with_references=False)
    values = np.array([r.targets["u0"] for r in records])
    assert plain.mean.item() == pytest.approx(values.mean(), rel=1e-12)
    assert plain.deviation.item() == pytest.approx(values.std(ddof=1), rel=1e-12)
    assert not plain.references.any()
    counts = np.array([[(r.numbers == z).sum() for z in ENERGY] for r in records])
    rest = values - counts @ np.linalg.lstsq(counts, values, rcond=None)[0]
    less = fitted(tmp_path / "less", records, with_references=True)
    assert less.deviation.item() == pytest.approx(rest.std(ddof=1), rel=1e-6)


def test_one_formula_and_one_value(tmp_path):
    """A trajectory: counts depend on each other, and the references are one of many right answers."""
    numbers = np.array([8, 1, 1], np.uint8)
    records = [record(f"f-{i}", 3, seed=i, numbers=numbers, targets={"u0": -2000.0}) for i in range(4)]
    statistics = fitted(tmp_path / "set", records, with_references=True)
    np.testing.assert_allclose(statistics.baseline(MoleculeBatch.from_records(records)), -2000.0, rtol=1e-12)
    assert statistics.deviation == 1  # rounding may not divide
    with pytest.raises(UserError, match="no record to train on has the target gap; targets there: u0"):
        statistics.fit([ShardSet.open(tmp_path / "set")], "gap", False)


def test_they_stay_precise_in_a_module_of_low_precision(tmp_path):
    statistics = fitted(tmp_path / "set", labelled(noise=0.5), with_references=True)
    before = {name: buffer.clone() for name, buffer in statistics.named_buffers()}
    holder = torch.nn.ModuleList([statistics, torch.nn.Linear(2, 2)]).bfloat16()
    assert holder[1].weight.dtype == torch.bfloat16
    assert all(torch.equal(buffer, before[name]) for name, buffer in statistics.named_buffers())
    assert holder.state_dict()["0.mean"].dtype == torch.float64
