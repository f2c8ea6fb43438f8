"""Raw files -> shards, with one command.

    python -m shards.build computed --from DIR --out OUT --split 0.1
    python -m shards.build qm9 --count 20000 --out OUT --split 0.1

writes OUT/train and OUT/heldout (with --split; OUT itself without), OUT/rejects.jsonl and a summary. `--split` holds
out records by a hash of their key, the same ones from every set. OUT appears when all of it is there: after a kill,
give the same command again.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from mspt import files
from mspt.data import keyed
from mspt.data.schema import RejectedRecord, validate
from mspt.errors import UserError
from shards.sources import computed, qm9
from shards.writer import ShardSetWriter


def held_out(key, share):
    """Whether a record belongs to the held-out part: a fixed function of its key."""
    return keyed.word("split", key) % 1_000_000 < share * 1_000_000


def build(records, rejects, out, provenance, split=None, block=256, strict=False):
    """Write records (an iterable of Record and RejectedRecord) as shard sets -> name -> manifest, and the rejects.

    rejects: rows that the source has refused already. split: the share to hold out, or None. Raises UserError where
    out is there already, where a set would be empty, or with strict at the first record that is refused.
    """
    out, rejects, seen = Path(out), list(rejects), set()
    if split is not None and not 0 < split < 1:
        raise UserError(f"--split is {split}; give a share between 0 and 1, or leave it out to hold out nothing")
    if block < 1:
        raise UserError(f"--block is {block}; give 1 or more records a block")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; remove it or choose another --out")
    aside = out.with_name(f".{out.name}.partial")
    if aside.exists():  # left by a killed build
        shutil.rmtree(aside)
    names = ["train", "heldout"] if split else [""]
    writers = {name: ShardSetWriter(aside / name, provenance, block) for name in names}
    for record in records:
        try:
            if isinstance(record, RejectedRecord):
                raise record
            validate(record)
            if record.key in seen:
                raise RejectedRecord(record.key, "key", "is there twice")
        except RejectedRecord as error:
            if strict:
                raise UserError(f"{error}; leave --strict out to list it in rejects.jsonl instead") from error
            rejects.append({"key": error.key, "field": error.field, "reason": error.reason})
            continue
        seen.add(record.key)
        writers["heldout" if split and held_out(record.key, split) else names[0]].add(record)
    manifests = {name: writer.close() for name, writer in writers.items()}
    files.write(aside / "rejects.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejects))
    for name, manifest in manifests.items():
        if not manifest["records"]:
            raise UserError(
                f"{out / name}: no record is left for it, of {len(seen)} good and {len(rejects)} refused ones "
                f"({aside / 'rejects.jsonl'}); give more molecules or another --split"
            )
    os.replace(aside, out)
    return manifests, rejects


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sources = parser.add_subparsers(dest="source", required=True)
    for name, module in (("computed", computed), ("qm9", qm9)):
        source = sources.add_parser(name, help=module.HELP)
        module.add_arguments(source)
        source.set_defaults(open=module.open)
        source.add_argument("--out", required=True, type=Path)
        source.add_argument("--split", type=float, help="share to hold out")
        source.add_argument("--block", type=int, default=256, help="records a block")
        source.add_argument("--strict", action="store_true", help="stop at the first record that is refused")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    try:
        source = options.open(options)
        command = shlex.join(["python", "-m", "shards.build", *(arguments or sys.argv[1:])])
        provenance = {"command": command, **source.provenance}
        records = (record for chunk in source.chunks(options.block) for record in source.read(chunk))
        manifests, rejects = build(records, [], options.out, provenance, options.split, options.block, options.strict)
    except UserError as error:
        print(f"shards.build: error: {error}", file=sys.stderr)
        sys.exit(2)
    for name, manifest in manifests.items():
        size = sum(shard["bytes"] for shard in manifest["shards"]) / 1e6
        print(f"{options.out / name}: {manifest['records']} records, {manifest['atoms']} atoms, {size:.1f} MB")
    print(f"{len(rejects)} refused (rejects.jsonl), {time.monotonic() - begin:.1f} s")


if __name__ == "__main__":
    main()
