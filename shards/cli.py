"""The command line: shards build | verify | merge | convert | sources.

Exit codes: 0 done; 2 something that the user can fix, said in one line; 130 interrupted; 1 anything else.
"""

import argparse
import importlib
import os
import shlex
import sys
import time
from dataclasses import fields
from pathlib import Path

from mspt.data.shardset import MANIFEST
from mspt.errors import UserError
from shards import convert as convert_sets
from shards.build import Settings
from shards.build import build as build_set
from shards.merge import merge as merge_sets
from shards.verify import verify as verify_set

# The modules of shards/sources that read a raw format (shards/source.py); `shards build NAME` uses it.
SOURCES = (
    "qm9",
    "qm9_raw",
    "qm9s",
    "qm9s_processed",
    "pcqm4mv2",
    "md17",
    "geom",
    "sdf",
    "xyz",
    "jcamp_dx",
    "table",
    "computed",
)
# What a manifest's command leaves out, because the bytes do not depend on it.
ELSEWHERE, ELSEHOW = ("--out", "--part", "--processes"), ("--strict",)


def build(options):
    """Make shards of raw files; a killed build goes on when the same command is given again."""
    begin = time.monotonic()
    settings = Settings(**{each.name: getattr(options, each.name) for each in fields(Settings)})
    summary = build_set(
        options.open(options), options.out, settings, options.said, options.processes, options.part, options.strict
    )
    seconds = f"{time.monotonic() - begin:.1f} s"
    if summary is None:
        print(f"part {options.part} is done, {seconds}; when all are, the same command without --part finishes")
        return
    for part, manifest in summary.manifests.items():
        print(f"{options.out / part}: {_size(manifest)}")
    if options.exclude:
        print(f"{summary.excluded} left out by {options.exclude}")
    if summary.unknown:
        print(f"{summary.unknown} without a SMILES that RDKit reads, split by their key")
    if options.drop_duplicates:
        print(f"{summary.dropped} left out as another record's molecule (duplicates.jsonl)")
    elif summary.duplicates:
        leaking = f", {summary.leaking} of them in several parts" if options.split else ""
        print(f"{summary.duplicates} molecules in several records{leaking} (duplicates.jsonl)")
    print(f"{summary.refused.total()} refused (rejects.jsonl), {seconds}")
    for reason, count in summary.refused.most_common(5):
        print(f"  {count}  {reason}")


def verify(options):
    """Read all of the shard sets and compare them with their manifests."""
    for folder in options.folders:
        parts = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}")) if not (folder / MANIFEST).exists() else []
        for part in parts or [folder]:
            print(f"{part}: {_size(verify_set(part).manifest)}, as written", flush=True)


def merge(options):
    """Make one shard set of several, without copying where the file system can link."""
    command = shlex.join(["shards", "merge", *map(str, options.sets)])
    print(f"{options.out}: {_size(merge_sets(options.out, options.sets, command))}")


def convert(options):
    """Make a Zarr store of a shard set, for random access, or a shard set of a Zarr store."""
    convert_sets.main(options)


def sources(options):
    """List the raw formats that shards are built from."""
    for name in SOURCES:
        print(f"{name:<16} {_source(name).HELP}")


def _source(name):
    return importlib.import_module(f"shards.sources.{name}")


def _size(manifest):
    size = sum(shard["bytes"] for shard in manifest["shards"]) / 1e6
    return f"{manifest['records']} records, {manifest['atoms']} atoms, {size:.1f} MB"


def _said(arguments):
    """The command as a manifest names it: the same for the same bytes."""
    words, kept = iter(arguments), ["shards"]
    for word in words:
        if word in ELSEWHERE:
            next(words, None)
        elif word.partition("=")[0] not in (*ELSEWHERE, *ELSEHOW):
            kept.append(word)
    return shlex.join(kept)


def build_parser():
    parser = argparse.ArgumentParser(prog="shards", description="Raw files -> shards for mspt pretrain.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    each = commands.add_parser("build", help=build.__doc__).add_subparsers(required=True, metavar="SOURCE")
    for name in SOURCES:
        module = _source(name)
        command = each.add_parser(name, help=module.HELP, allow_abbrev=False)
        module.add_arguments(command)
        _add_build_arguments(command)
        command.set_defaults(run_command=build, open=module.open)
    command = commands.add_parser("verify", help=verify.__doc__)
    command.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a set, or a folder of train, heldout, …")
    command.set_defaults(run_command=verify)
    command = commands.add_parser("merge", help=merge.__doc__)
    command.add_argument("out", type=Path, help="the folder to make")
    command.add_argument("sets", nargs="+", type=Path, metavar="SET")
    command.set_defaults(run_command=merge)
    command = commands.add_parser("convert", help=convert.__doc__)
    convert_sets.add_arguments(command)
    command.set_defaults(run_command=convert)
    command = commands.add_parser("sources", help=sources.__doc__)
    command.set_defaults(run_command=sources)
    return parser


def _add_build_arguments(command):
    add, default = command.add_argument, Settings()
    add("--out", required=True, type=Path, help="the folder to make")
    add("--split", help="share to hold out, such as 0.1, or parts with their shares, such as val=0.05,test=0.05")
    add("--split-by", choices=["key", "scaffold"], default=default.split_by, help="what is not split (default: key)")
    add("--exclude", type=Path, metavar="FILE", help="keys to leave out, one a line, such as those of a test set")
    add("--limit", type=int, metavar="N", help="read the first N rows only (not of geom)")
    add("--shard", type=int, default=default.shard, help="rows a shard (default: %(default)s)")
    add("--block", type=int, default=default.block, help="records a block (default: %(default)s)")
    add("--no-inchikey", dest="inchikey", action="store_false", help="do not look which records are of one molecule")
    add("--drop-duplicates", action="store_true", help="keep only the first record of a molecule, by InChIKey")
    add("--strict", action="store_true", help="stop at the first record that is refused")
    # The cores of this job, which may be fewer than the machine's.
    add("--processes", type=int, default=len(os.sched_getaffinity(0)), help="(default: one a core)")
    add("--part", metavar="I/N", help="build only every N-th chunk, for jobs side by side; without it a build finishes")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(arguments)
    options.said = _said(arguments)
    try:
        options.run_command(options)
    except UserError as error:
        print(f"shards: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("shards: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
