"""`mspt embed` writes what the encoder gives by hand."""

import hashlib
import json

import numpy as np
import pytest
import safetensors.torch
import torch
import zarr

from mspt import __version__, cli
from mspt.data.batch import MoleculeBatch
from mspt.data.shardset import ShardSet
from mspt.data.zarr_set import ZarrSet
from mspt.errors import UserError
from mspt.models import encoders
from mspt.models.encoders import transformer_m
from mspt.models.encoders.torchmd_et import TINY
from mspt.training.export import ENCODER, export_encoder
from tests.data.molecules import plain, write_set
from tests.data.test_batch import bonded
from tests.end_to_end.runs import SHARDS


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of an exported one."""
    torch.manual_seed(0)
    weights = encoders.build(TINY).state_dict()
    folder = tmp_path_factory.mktemp("run") / "encoder"
    return export_encoder({ENCODER + name: weight for name, weight in weights.items()}, TINY, folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The Zarr twin of some real molecules."""
    folder = tmp_path_factory.mktemp("data") / "set.zarr"
    ZarrSet.write(folder, ShardSet.open(SHARDS).records(range(40)), {}, {})
    return folder


def embed(encoder, data, out, *more):
    cli.main(["embed", "--encoder", str(encoder), "--data", str(data), "--out", str(out), *more])
    return zarr.open_group(out, mode="r")


def by_hand(folder, records):
    """The scalars of each molecule, alone."""
    encoder = encoders.build(encoders.parse(json.loads((folder / "config.json").read_text())))
    encoder.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    with torch.no_grad():
        for record in records:
            numbers, positions = torch.tensor(record.numbers, dtype=torch.int64), torch.tensor(record.positions)
            yield encoder(numbers, positions, torch.tensor([0, len(numbers)]))[0].numpy()


@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_it_is_the_encoder_by_hand(tmp_path, encoder, data, pool, capsys):
    """In the order of the set, in several batches, with the atoms."""
    group = embed(encoder, data, tmp_path / "out.zarr", "--pool", pool, "--atoms", "--budget-atoms", "100")
    records = list(ZarrSet.open(data).records(range(40)))
    ptr, text, ends = group["ptr"][:], group["keys"][:].tobytes(), group["keys_ptr"][:]
    embeddings, atoms = group["embeddings"][:], group["atoms"][:]
    assert embeddings.shape == (40, 16) and embeddings.dtype == np.float32
    for i, (record, scalars) in enumerate(zip(records, by_hand(encoder, records), strict=True)):
        assert text[ends[i] : ends[i + 1]].decode() == record.key
        np.testing.assert_allclose(atoms[ptr[i] : ptr[i + 1]], scalars, rtol=1e-4, atol=1e-4)
        expected = scalars.sum(0) if pool == "sum" else scalars.mean(0)
        np.testing.assert_allclose(embeddings[i], expected, rtol=1e-4, atol=1e-4)
    assert group.attrs["pool"] == pool
    assert group.attrs["versions"] == {"mspt": __version__, "torch": torch.__version__}
    weights = (encoder / "model.safetensors").read_bytes()
    assert group.attrs["encoder"]["sha256"] == hashlib.sha256(weights).hexdigest()
    manifest = json.dumps(ZarrSet.open(data).manifest, sort_keys=True).encode()
    assert group.attrs["data"]["sha256"] == hashlib.sha256(manifest).hexdigest()
    assert capsys.readouterr().out == f"wrote 40 embeddings to {tmp_path / 'out.zarr'}\n"


def test_of_a_shard_set_without_atoms(tmp_path, encoder, data):
    shards, twin = (embed(encoder, d, tmp_path / f"{d.name}.out") for d in (SHARDS, data))
    assert "atoms" not in shards and "ptr" not in shards
    assert shards["embeddings"].shape == (223, 16)
    np.testing.assert_allclose(shards["embeddings"][:40], twin["embeddings"][:], rtol=1e-4, atol=1e-4)


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        embed(*arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1, said
    return said


def test_what_cannot_be_embedded(tmp_path, encoder, data, capsys):
    out = tmp_path / "out.zarr"
    said = refusal(capsys, encoder, data, out, "--budget-atoms", "10")
    assert "--budget-atoms is 10, but a molecule of" in said and "set it to that or more" in said
    said = refusal(capsys, encoder, tmp_path / "nowhere", out)
    assert "nowhere: no set of molecules there" in said
    said = refusal(capsys, tmp_path / "nowhere", data, out)
    assert "nowhere/config.json: is not there; write an encoder's folder with mspt checkpoint export" in said
    out.mkdir()
    assert "out.zarr: is there already" in refusal(capsys, encoder, data, out)
    out.rmdir()
    assert not list(tmp_path.iterdir())


def test_nothing_stays_of_embeddings_that_end_in_an_error(tmp_path, encoder):
    broken = ZarrSet.write(tmp_path / "set.zarr", plain([3, 4, 5]), {}, {}).folder
    shard = broken / "positions/c/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SystemExit):
        embed(encoder, broken, tmp_path / "out.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["set.zarr"]


def test_an_encoder_whose_files_do_not_fit(tmp_path, encoder):
    weights = safetensors.torch.load_file(encoder / "model.safetensors")
    named = {ENCODER + name: weight for name, weight in weights.items()}
    other = export_encoder(named, TINY.model_copy(update={"layers": 3}), tmp_path / "layers")
    with pytest.raises(UserError, match=r"model\.safetensors: does not fit config\.json \(.*Missing key") as error:
        encoders.load(other)
    assert "\n" not in str(error.value)
    (other / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"model\.safetensors: does not fit config\.json .*; export the encoder again"):
        encoders.load(other)
    (other / "config.json").write_text('{"name": "torchmd_et", "layer": 3}')
    with pytest.raises(UserError, match=r"config\.json: encoder settings: .*layer"):
        encoders.load(other)


def test_an_encoder_that_sees_bonds_gets_them(tmp_path):
    """From a set that has them of every other molecule, on either way of reading it."""
    made = [bonded(one, i) if i % 2 else one for i, one in enumerate(plain([3, 5, 4, 6]))]
    write_set(tmp_path / "set", made)
    ZarrSet.write(tmp_path / "set.zarr", made, {}, {})
    torch.manual_seed(0)
    network = encoders.build(transformer_m.TINY)
    weights = {ENCODER + name: weight for name, weight in network.state_dict().items()}
    folder = export_encoder(weights, transformer_m.TINY, tmp_path / "encoder")
    batch = MoleculeBatch.from_records(made)
    with torch.no_grad():
        seen = network(batch.numbers, batch.positions, batch.ptr, batch.bonds)[0].numpy()
        unseen = network(batch.numbers, batch.positions, batch.ptr)[0].numpy()
    assert np.abs(seen - unseen).max() > 1e-3
    for data in ("set", "set.zarr"):
        group = embed(folder, tmp_path / data, tmp_path / f"{data}-out", "--atoms", "--budget-atoms", "9")
        np.testing.assert_allclose(group["atoms"][:], seen, atol=1e-5)
