"""The command line: mspt pretrain | embed | checkpoint | doctor.

Exit codes: 0 done; 2 something that the user can fix, said in one line; 1 anything else.
"""

import argparse
import os
import platform
import sys
import traceback

from mspt.errors import UserError


def pretrain(options):
    """Train by a configuration, or go on where its run folder stands."""
    from mspt import config
    from mspt.training import trainer

    loaded = config.load(options.config, options.overrides)
    trainer.pretrain(loaded, config.dump(loaded))


def embed(options):
    """Write the embeddings of a set's molecules by an exported encoder."""
    from mspt.downstream import embed

    count = embed.embed(options.encoder, options.data, options.out, options.pool, options.atoms, options.budget_atoms)
    print(f"wrote {count} embeddings to {options.out}")


def export(options):
    """Write the encoder of a run's newest checkpoint as safetensors and JSON."""
    from mspt.training import export

    print(f"wrote {export.export_run(options.run, options.out)}")


def import_encoder(options):
    """Write the encoder of a checkpoint of TorchMD-Net as safetensors and JSON."""
    from mspt.training import export

    print(f"wrote {export.import_torchmd_net(options.file, options.out)}")


def doctor(options):
    """Say which kernels run on this machine, and why."""
    import torch

    from mspt import __version__
    from mspt.kernels import selection

    print(f"mspt {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print("\n".join(selection.report()))


def build_parser():
    parser = argparse.ArgumentParser(
        prog="mspt", description="Pre-train 3D molecular encoders on conformers and spectra."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pretrain", help=pretrain.__doc__)
    command.add_argument("--config", required=True, help="a YAML file, such as configs/quickstart.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.steps=50 run.dir=runs/try")
    command.set_defaults(run_command=pretrain)
    embedding = commands.add_parser("embed", help=embed.__doc__)
    embedding.add_argument("--encoder", required=True, help="a folder of model.safetensors and config.json")
    embedding.add_argument("--data", required=True, help="a shard set or its Zarr twin")
    embedding.add_argument("--out", required=True, help="the Zarr store to write")
    embedding.add_argument("--pool", choices=["sum", "mean"], default="sum", help="over atoms (default: %(default)s)")
    embedding.add_argument("--atoms", action="store_true", help="write every atom's scalars too")
    embedding.add_argument(
        "--budget-atoms", type=int, default=8192, help="atoms that are embedded together (default: %(default)s)"
    )
    embedding.set_defaults(run_command=embed)
    checkpoint = commands.add_parser("checkpoint", help="work with a run's checkpoints")
    actions = checkpoint.add_subparsers(dest="action", required=True)
    action = actions.add_parser("export", help=export.__doc__)
    action.add_argument("run", help="a run folder")
    action.add_argument("out", help="the folder to write model.safetensors and config.json to")
    action.set_defaults(run_command=export)
    other = actions.add_parser("import", help=import_encoder.__doc__)
    other.add_argument("file", help="a .ckpt of TorchMD-Net, Coord or MolSpectra, or a state dict")
    other.add_argument("out", help="the folder to write model.safetensors and config.json to; model.init takes it")
    other.set_defaults(run_command=import_encoder)
    check = commands.add_parser("doctor", help=doctor.__doc__)
    check.set_defaults(run_command=doctor)
    for each in (command, embedding, action, other, check):
        each.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(arguments=None):
    options = build_parser().parse_args(arguments)
    try:
        options.run_command(options)
        _leave(0)
    except UserError as error:
        if options.debug:
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        print(f"mspt: error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr, flush=True)
        _leave(2)
        sys.exit(2)
    except KeyboardInterrupt:
        print("mspt: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _leave(code):
    """End a rank of several at once, without the interpreter's clean-up.

    After an error the others may wait in a collective that this one will not join; and gloo's threads now and then
    abort a process that is done ("terminate called without an active exception").
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
