"""The same molecules in our format and in those of others, and the way that each is read in training.

A side writes Records to a folder and reads them back as shuffled ragged batches: numbers int64 [n], positions float32
[n, 3], ptr int64 [m + 1], per molecule its record and, where there are any, the spectra [m, L] with present [m, 3]. The
others store what a batch carries and nothing else; our shards hold the whole records, with keys, SMILES, bonds and
targets. Files are of 64 MB where a format lets us choose.
"""

import importlib.util
import io
import itertools
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import webdataset

from mspt.chemistry.spectra import GRIDS, LINE_SHAPES, broaden
from mspt.data import block as blocks
from mspt.data.packing import Budget
from mspt.data.shardset import ShardSet
from mspt.data.stream import DataSettings, Stream
from shards.writer import ShardSetWriter

ROOT = Path(__file__).parent.parent
PER_ATOM = ("numbers", "positions")
FILE_BYTES = 64_000_000


def with_spectra(count):
    """So many of the bundled molecules, again and again under other keys, their spectra as float16 on the grids."""
    return _numbered("qm9-spectra", count, _on_grids)


def without_spectra(count):
    """So many of the bundled conformers."""
    return _numbered("qm9-geometries", count, lambda record: record)


def _numbered(name, count, change):
    source = ShardSet.open(ROOT / "shards/bundled" / name / "train")
    records = map(change, source.records(range(min(count, len(source)))))
    repeated = itertools.islice(itertools.cycle(records), count)
    return [replace(record, key=f"{number:08d}") for number, record in enumerate(repeated)]


def _on_grids(record):
    spectra = {}
    for name, lines in record.spectra.items():
        positions, strengths = (torch.tensor(values) for values in (lines.positions, lines.strengths))
        values = broaden(positions, strengths, torch.tensor([0, len(positions)]), GRIDS[name], LINE_SHAPES[name])
        spectra[name] = values[0].numpy().astype(np.float16)
    return replace(record, spectra=spectra)


def sample(record):
    """A Record as the dict of arrays that the others store; its key is a number."""
    arrays = {
        "record": np.array([int(record.key)], np.int64),
        "numbers": record.numbers,
        "positions": record.positions,
    }
    if record.spectra:
        arrays |= {name: record.spectra[name] for name in GRIDS}
        arrays["present"] = np.array([name in record.spectra for name in GRIDS])
    return arrays


def collate(samples):
    """Dicts of arrays, one a molecule -> a ragged batch, a dict of tensors."""
    batch = {"ptr": blocks.ptr_of([len(s["numbers"]) for s in samples])}
    for name in samples[0]:
        values = np.concatenate([s[name] for s in samples])
        batch[name] = values if name in PER_ATOM else values.reshape(len(samples), -1)
    batch["numbers"] = batch["numbers"].astype(np.int64)
    return {name: torch.from_numpy(values) for name, values in batch.items()}


class _Ragged:
    """A side whose batches have a ptr."""

    @staticmethod
    def count(batch):
        """The molecules of a batch."""
        return len(batch.ptr) - 1


class Mspt(_Ragged):
    """Our shard sets, by the Stream of a trainer with no loader processes."""

    @staticmethod
    def write(records, folder):
        writer = ShardSetWriter(folder, {"source": "benchmarks/loader.py"})
        for record in records:
            writer.add(record)
        writer.close()

    def __init__(self, folder, molecules):
        shardset = ShardSet.open(folder)
        budget = Budget(molecules=molecules, atoms=molecules * shardset.manifest["largest"])
        self.stream = Stream([shardset], DataSettings(train=str(folder), lanes=1, budget=budget), seed=0)

    def batches(self, epoch):
        for (batch,) in self.stream.batches(epoch, 0, self.stream.steps(epoch)):
            yield batch

    @staticmethod
    def plain(batch):
        values = {"record": torch.tensor([[int(key)] for key in batch.keys]), "numbers": batch.numbers}
        values |= {"positions": batch.positions, "ptr": batch.ptr} | batch.spectra
        if batch.spectra:
            values["present"] = torch.stack([batch.present[name] for name in GRIDS], 1)
        return values


class _Dicts:
    """A side whose batches are the dicts of collate."""

    @staticmethod
    def count(batch):
        return len(batch["ptr"]) - 1

    @staticmethod
    def plain(batch):
        return batch


class _WebDataset(_Dicts):
    """A tar of one member a molecule, read through a shuffle buffer as WebDataset's documents have it."""

    def __init__(self, folder, molecules):
        urls = sorted(map(str, Path(folder).glob("*.tar")))
        data = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode()
        # dict: what np.load gives would read an array anew whenever it is asked for it.
        data = data.batched(molecules, lambda samples: collate([dict(s[self.kind]) for s in samples]))
        self.loader = webdataset.WebLoader(data, batch_size=None, num_workers=0)

    def batches(self, epoch):
        yield from self.loader

    @classmethod
    def write(cls, records, folder):
        Path(folder).mkdir(parents=True)
        pattern = str(Path(folder) / "%05d.tar")
        with webdataset.ShardWriter(pattern, maxsize=FILE_BYTES, verbose=0) as writer:
            for record in records:
                writer.write({"__key__": record.key, cls.kind: cls.encode(sample(record))})


class WebDatasetNpz(_WebDataset):
    kind = "npz"

    @staticmethod
    def encode(arrays):
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()


class WebDatasetPickle(_WebDataset):
    kind, encode = "pkl", staticmethod(pickle.dumps)


class PyG(_Ragged):
    """InMemoryDataset and the DataLoader of torch_geometric; all is in memory before the clock starts."""

    @staticmethod
    def write(records, folder):
        from torch_geometric.data import Data, InMemoryDataset

        def data(record):
            arrays = {name: torch.from_numpy(np.array(values)) for name, values in sample(record).items()}
            whole = {name: values[None] for name, values in arrays.items() if name not in PER_ATOM}
            return Data(z=arrays["numbers"].long(), pos=arrays["positions"], **whole)

        Path(folder).mkdir(parents=True)
        InMemoryDataset.save([data(record) for record in records], str(Path(folder) / "data.pt"))

    def __init__(self, folder, molecules):
        from torch_geometric.data import InMemoryDataset
        from torch_geometric.loader import DataLoader

        dataset = InMemoryDataset()
        dataset.load(str(Path(folder) / "data.pt"))
        self.loader = DataLoader(dataset, molecules, shuffle=True, num_workers=0)

    def batches(self, epoch):
        yield from self.loader

    @staticmethod
    def plain(batch):
        values = batch.to_dict()
        del values["batch"]
        return values | {"numbers": values.pop("z"), "positions": values.pop("pos")}


class Mosaic(_Dicts):
    """MDS shards with columns of arrays, by StreamingDataset and its loader."""

    def __init__(self, folder, molecules):
        streaming = import_streaming()
        streaming.base.util.clean_stale_shared_memory()
        # One canonical node for the one process: with more, samples are repeated to make their shares even.
        dataset = streaming.StreamingDataset(
            local=str(folder), shuffle=True, batch_size=molecules, num_canonical_nodes=1
        )
        self.loader = streaming.StreamingDataLoader(dataset, batch_size=molecules, collate_fn=collate, num_workers=0)

    def batches(self, epoch):
        yield from self.loader

    @staticmethod
    def write(records, folder):
        records = iter(records)
        first = next(records)

        def column(name, values):
            shape = "" if name in PER_ATOM else ":" + ",".join(map(str, values.shape))
            return f"ndarray:{values.dtype}{shape}"

        columns = {
            # Their arrays know no bool.
            name: "ndarray:uint8:3" if name == "present" else column(name, values)
            for name, values in sample(first).items()
        }
        with import_streaming().MDSWriter(out=str(folder), columns=columns, size_limit=FILE_BYTES) as writer:
            for record in itertools.chain([first], records):
                arrays = sample(record)
                if "present" in arrays:
                    arrays["present"] = arrays["present"].astype(np.uint8)
                writer.write(arrays)


def import_streaming():
    """The package of mosaicml-streaming.

    It imports torchvision for its data sets of images. PyPI's build of that does not load beside a CPU build of torch:
    it stops at two operators of its compiled part, which is not there. Declared, they let it load; nothing calls them.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    import streaming

    return streaming


class LitData(_Dicts):
    """Chunks made by optimize, each molecule a dict of arrays, by StreamingDataset and its loader."""

    def __init__(self, folder, molecules):
        import litdata

        dataset = litdata.StreamingDataset(str(folder), shuffle=True)
        self.loader = litdata.StreamingDataLoader(
            dataset, batch_size=molecules, shuffle=True, collate_fn=collate, num_workers=0
        )

    def batches(self, epoch):
        yield from self.loader

    @staticmethod
    def write(records, folder):
        import litdata

        def samples(_):
            yield from map(sample, records)

        # Forked, it needs no copy of the records.
        litdata.optimize(
            samples,
            inputs=[0],
            output_dir=str(folder),
            chunk_bytes=FILE_BYTES,
            num_workers=1,
            start_method="fork",
            verbose=False,
        )


class Limit:
    """All files of our shard set, read in pieces of a block's size into one buffer, and copied once to another."""

    write = Mspt.write

    def __init__(self, folder, molecules):
        shardset = ShardSet.open(folder)
        self.files = [Path(shardset.folder, shard["file"]) for shard in shardset.manifest["shards"]]
        self.read, self.copied = (np.empty(int(shardset.size.max()), np.uint8) for _ in range(2))
        self.molecule_bytes = sum(path.stat().st_size for path in self.files) / len(shardset)

    def batches(self, epoch):
        for path in self.files:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(self.read):
                    self.copied[:count] = self.read[:count]
                    yield count

    def count(self, batch):
        return batch / self.molecule_bytes


SIDES = {
    "mspt": Mspt,
    "webdataset_npz": WebDatasetNpz,
    "webdataset_pickle": WebDatasetPickle,
    "pyg": PyG,
    "mosaic": Mosaic,
    "litdata": LitData,
    "limit": Limit,
}
PACKAGES = {"pyg": "torch_geometric", "mosaic": "streaming", "litdata": "litdata"}


def missing():
    """side -> the module that it needs and that is not installed."""
    return {side: module for side, module in PACKAGES.items() if importlib.util.find_spec(module) is None}
