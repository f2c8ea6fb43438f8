"""Embeddings of a set's molecules by an exported encoder, as a Zarr v3 store.

Names in a store of N molecules with n atoms in all, in the order of the set, F channels:

    keys, keys_ptr [N + 1]      UTF-8 text end to end
    embeddings [N, F]           sum or mean over a molecule's atoms of the encoder's scalars, float32
    atoms [n, F], ptr [N + 1]   the scalars themselves, float32; absent unless asked for

Attributes: kind ("embeddings"), encoder, data (their paths and sha256), records, pool, versions and arrays.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import mspt
from mspt import files
from mspt.data.batch import Bonds
from mspt.data.block import ptr_of
from mspt.data.opening import open_set, sequential
from mspt.data.packing import Budget
from mspt.data.store import sha256
from mspt.data.zarr_arrays import StoreWriter
from mspt.errors import UserError
from mspt.models import encoders

KIND = "embeddings"


@torch.no_grad()
def vectors(network, molecules, pool="sum", budget_atoms=8192, targets=()):
    """Yield a set's MoleculeBatches in order, and of each the vectors [m, F] and the atoms' scalars [n, F].

    network: an encoder, which goes to the GPU if there is one. targets: names of those that the batches carry. The
    rest is as embed takes it. Raises UserError where a molecule is over the budget.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device).eval()
    largest = molecules.manifest["largest"]
    if largest > budget_atoms:
        raise UserError(
            f"--budget-atoms is {budget_atoms}, but a molecule of {molecules.folder} has {largest}; set it to that or "
            "more"
        )
    with tqdm(total=len(molecules), unit="molecule", disable=None) as bar:
        # A molecule has an atom or more, so that atoms alone are what binds.
        for batch in sequential(molecules, Budget(molecules=budget_atoms, atoms=budget_atoms), targets):
            ptr, bonds = batch.ptr.to(device), batch.bonds
            bonds = bonds and Bonds(*(part.to(device) for part in bonds))
            more = encoders.beside(network, bonds)
            scalars = network(batch.numbers.to(device), batch.positions.to(device), ptr, **more)[0]
            yield batch, torch.segment_reduce(scalars, pool, lengths=ptr.diff()), scalars
            bar.update(len(batch.keys))


def embed(encoder, data, out, pool="sum", atoms=False, budget_atoms=8192):
    """Write the embeddings of a set as out, which is there when it is whole -> how many.

    encoder: folder of an exported one. data: folder of a shard set or of its Zarr twin. pool: sum or mean. atoms: write
    the atoms' scalars too. budget_atoms: atoms that go through the encoder together. Runs on the GPU if there is one.
    Raises UserError where encoder or data cannot be read, a molecule is over the budget or out is there already.
    """
    network, molecules = encoders.load(encoder), open_set(data)
    with files.new_folder(out) as aside:
        store = StoreWriter(aside)
        for batch, pooled, scalars in vectors(network, molecules, pool, budget_atoms):
            texts = [key.encode() for key in batch.keys]
            arrays = {"keys": np.frombuffer(b"".join(texts), np.uint8), "embeddings": pooled.cpu().numpy()}
            ptrs = {"keys_ptr": ptr_of([len(text) for text in texts])}
            if atoms:
                arrays["atoms"], ptrs["ptr"] = scalars.cpu().numpy(), batch.ptr.numpy()
            for name, values in arrays.items():
                store.column(name, values).extend(values)
            for name, values in ptrs.items():
                store.column(name, values).extend_ptr(values)
        store.close(
            {
                "kind": KIND,
                "encoder": {"path": str(encoder), "sha256": sha256(Path(encoder) / "model.safetensors")},
                "data": {"path": str(data), "sha256": _digest(molecules.manifest)},
                "records": len(molecules),
                "pool": pool,
                "versions": {"mspt": mspt.__version__, "torch": torch.__version__},
            }
        )
    return len(molecules)


def _digest(manifest):
    """SHA-256 of what a set says of itself, wherever it lies."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
