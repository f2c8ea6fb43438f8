"""The command line: mspt pretrain | finetune | reproduce | data | checkpoint | doctor, and what is done with a trained
network.

Exit codes: 0 done; 2 something that the user can fix, said in one line; 75 a signal ended the run, the same command
goes on; 69 a rank hung, the same command may be started again; 1 anything else.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from mspt.commands import downstream
from mspt.commands.arguments import at_least
from mspt.errors import UserError
from mspt.files import FULL
from mspt.training import interruption


def pretrain(options):
    """Train by a configuration, or go on where its run folder stands."""
    with interruption.listening():
        from mspt import config

        _train(config.load(options.config, options.overrides))


def finetune(options):
    """Learn a property or forces from labels, and go on as pretrain does."""
    with interruption.listening():
        from mspt import config

        loaded = config.load(options.config, options.overrides)
        if loaded.objectives.property is None and loaded.objectives.forces is None:
            raise UserError(f"{options.config}: nothing to learn from labels; set objectives.property or .forces")
        _train(loaded)


def _train(loaded):
    from mspt import config
    from mspt.training import trainer

    trainer.pretrain(loaded, config.dump(loaded))


def evaluate(options):
    """Measure fine-tuned models on what their runs hold out, or on a set, and the spread over several of them."""
    from mspt.training import scores

    found = {folder: scores.score(folder, options.data) for folder in options.runs}
    if options.json:
        print(json.dumps({"runs": found, "spread": scores.spread(found)}, indent=1, ensure_ascii=False))
    else:
        print(scores.table(found))


def predict(options):
    """Write what a fine-tuned model predicts for the molecules of a set, as a CSV or with forces as extended XYZ."""
    from mspt.downstream import predictor

    count, units = predictor.predict(options.run, options.data, options.out, options.budget_atoms)
    said = ", ".join(f"{name} in {unit}" for name, unit in units.items())
    print(f"wrote {count} predictions to {options.out}: {said}")


def info(options):
    """Say what is in a shard set: sizes, elements, spectra, targets, where it comes from."""
    from mspt.data import describe, look
    from mspt.data.shardset import ShardSet

    found = [describe.describe(ShardSet.open(folder), options.blocks) for folder in look.sets(options.folder)]
    if options.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print("\n\n".join(map(describe.info, found)))


def show(options):
    """Show one record of a shard set, by its key or its number."""
    from mspt.data import look

    shardset = look.open_one(options.folder)
    number = look.find(shardset, options.record)
    print(look.xyz(next(shardset.records([number]))) if options.xyz else look.show(shardset, number))


def plot(options):
    """Draw one record of a shard set, or without one the set as a whole."""
    from mspt.data import look, plot

    plot.check_png(options.out)
    shardset = look.open_one(options.folder)
    if options.record is None:
        figure = plot.overview(shardset)
    else:
        figure = plot.record(shardset, look.find(shardset, options.record))
    plot.save(figure, options.out)
    print(f"wrote {options.out}")


def verify(options):
    """Read every byte of a shard set and say whether it is whole."""
    from mspt.data import look

    for folder in look.sets(options.folder):
        print(look.verify(folder))


def embed(options):
    """Write the embeddings of a set's molecules by an exported encoder."""
    from mspt.downstream import embed

    count = embed.embed(options.encoder, options.data, options.out, options.pool, options.atoms, options.budget_atoms)
    print(f"wrote {count} embeddings to {options.out}")


def export(options):
    """Write the encoder of a run's newest checkpoint as safetensors and JSON."""
    from mspt.training import export

    _check_new(options.out)
    print(f"wrote {export.export_run(options.run, options.out)}")


def import_encoder(options):
    """Write the encoder of a checkpoint of TorchMD-Net as safetensors and JSON."""
    from mspt.training import export

    _check_new(options.out)
    print(f"wrote {export.import_torchmd_net(options.file, options.out)}")


def reproduce(options):
    """Run the rows of a paper's table that are not run yet, and print it beside the published numbers."""
    from mspt import reproduce

    if options.figure:  # matplotlib takes its time
        from mspt import curves
        from mspt.data import plot

        plot.check_png(options.figure, "--figure")
    only = {name: getattr(options, name) for name in ("rows", "targets", "labels", "seeds")}
    out = options.out or Path("runs") / f"{options.table}-{options.scale}"
    plan = reproduce.Plan(Path("configs") / f"{options.table}.yaml", options.scale, options.data, out, only)
    if options.dry_run:
        print("\n".join(shlex.join(run.command(options.processes)) for run in plan.runs if not run.done))
        return
    failed = {}
    if options.show:
        plan.check_found()
        print(plan.text())
    else:
        failed = plan.perform(options.jobs, options.processes)
        print(plan.text())
        print(f"\nnumbers: {plan.save()}")
    if options.figure:
        plot.save(curves.learning_curves(plan), options.figure)
        print(f"curves:  {options.figure}")
    if failed:
        raise UserError("; ".join(f"{folder}: {why}" for folder, why in failed.items()))


def doctor(options):
    """Say which kernels run on this machine, and why."""
    import torch

    from mspt import __version__
    from mspt.kernels import selection

    print(f"mspt {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print("\n".join(selection.report()))


def _check_new(out):
    if Path(out).exists():
        raise UserError(f"{out}: is there already; remove it or choose another name")


def _numbers(text):
    return tuple(map(int, text.split(",")))


def build_parser():
    parser = argparse.ArgumentParser(
        prog="mspt", description="Pre-train 3D molecular encoders on conformers and spectra."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pretrain", help=pretrain.__doc__)
    command.add_argument("--config", required=True, help="a YAML file, such as configs/quickstart.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.steps=50 run.dir=runs/try")
    command.set_defaults(run_command=pretrain)
    tuning = commands.add_parser("finetune", help=finetune.__doc__)
    tuning.add_argument("--config", required=True, help="a YAML file, such as configs/quickstart-finetune.yaml")
    tuning.add_argument("overrides", nargs="*", metavar="key=value", help="such as objectives.property.target=gap")
    tuning.set_defaults(run_command=finetune)
    scoring = commands.add_parser("evaluate", help=evaluate.__doc__)
    scoring.add_argument("runs", nargs="+", metavar="RUN", help="a run folder of mspt finetune, or the model/ in it")
    scoring.add_argument("--data", help="a shard set with labels (default: what the run's configuration holds out)")
    scoring.add_argument("--json", action="store_true", help="the same as JSON")
    scoring.set_defaults(run_command=evaluate)
    prediction = commands.add_parser("predict", help=predict.__doc__)
    prediction.add_argument("run", help="a run folder of mspt finetune, or the model/ in it")
    prediction.add_argument("--data", required=True, help="a shard set or its Zarr twin")
    prediction.add_argument("--out", required=True, metavar="FILE.csv|FILE.xyz", help="what to write")
    prediction.add_argument(
        "--budget-atoms",
        type=at_least(1),
        default=8192,
        help="atoms that are predicted together (default: %(default)s)",
    )
    prediction.set_defaults(run_command=predict)
    data = commands.add_parser("data", help="look at a shard set")
    looks = data.add_subparsers(dest="action", required=True)
    one_or_more = "a shard set, or a folder of them"
    record = "a key, or a number from 0; a key is looked for by reading the set, about a second a gigabyte"
    about = looks.add_parser("info", help=info.__doc__)
    about.add_argument("folder", metavar="DIR", help=one_or_more)
    about.add_argument("--blocks", type=int, default=16, help="how many to read, evenly spread (default: %(default)s)")
    about.add_argument("--json", action="store_true", help="the same as JSON, a list of one or more sets")
    about.set_defaults(run_command=info)
    single = looks.add_parser("show", help=show.__doc__)
    single.add_argument("folder", metavar="DIR", help="a shard set")
    single.add_argument("record", metavar="KEY|NUMBER", help=record)
    single.add_argument("--xyz", action="store_true", help="only its atoms, in the XYZ format")
    single.set_defaults(run_command=show)
    picture = looks.add_parser("plot", help=plot.__doc__)
    picture.add_argument("folder", metavar="DIR", help="a shard set")
    picture.add_argument("record", nargs="?", metavar="KEY|NUMBER", help=record)
    picture.add_argument("--out", required=True, type=Path, metavar="FILE.png", help="the picture to write")
    picture.set_defaults(run_command=plot)
    whole = looks.add_parser("verify", help=verify.__doc__)
    whole.add_argument("folder", metavar="DIR", help=one_or_more)
    whole.set_defaults(run_command=verify)
    embedding = commands.add_parser("embed", help=embed.__doc__)
    embedding.add_argument("--encoder", required=True, help="a folder of model.safetensors and config.json")
    embedding.add_argument("--data", required=True, help="a shard set or its Zarr twin")
    embedding.add_argument("--out", required=True, help="the Zarr store to write")
    embedding.add_argument("--pool", choices=["sum", "mean"], default="sum", help="over atoms (default: %(default)s)")
    embedding.add_argument("--atoms", action="store_true", help="write every atom's scalars too")
    embedding.add_argument(
        "--budget-atoms", type=at_least(1), default=8192, help="atoms that are embedded together (default: %(default)s)"
    )
    embedding.set_defaults(run_command=embed)
    studies = downstream.add(commands)
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
    table = commands.add_parser("reproduce", help=reproduce.__doc__)
    table.add_argument("table", help="a table of configs/, such as table1 or table2")
    table.add_argument("--data", default="data", metavar="DIR", help="folder of the shard sets (default: %(default)s)")
    table.add_argument("--scale", default="full", help="a file of configs/scales, such as small (default: %(default)s)")
    table.add_argument("--out", type=Path, metavar="DIR", help="folder of its runs (default: runs/TABLE-SCALE)")
    table.add_argument("--rows", type=downstream.names, metavar="A,B", help="such as coord,molspectra (default: all)")
    table.add_argument("--targets", type=downstream.names, metavar="A,B", help="such as homo,gap (default: all)")
    table.add_argument("--labels", type=_numbers, metavar="N,M", help="such as 1000 (default: all of the scale)")
    table.add_argument("--seeds", type=_numbers, metavar="N,M", help="(default: all of the scale)")
    table.add_argument("--jobs", type=at_least(1), default=1, help="runs at a time (default: %(default)s)")
    table.add_argument("--processes", type=at_least(1), default=1, help="ranks of each run (default: %(default)s)")
    table.add_argument("--figure", type=Path, metavar="PNG", help="draw learning curves of what is done")
    shown = table.add_mutually_exclusive_group()
    shown.add_argument("--show", action="store_true", help="run nothing, print what there is")
    shown.add_argument("--dry-run", action="store_true", help="print the commands of the runs that are not done")
    table.set_defaults(run_command=reproduce)
    check = commands.add_parser("doctor", help=doctor.__doc__)
    check.set_defaults(run_command=doctor)
    tuned = (tuning, scoring, prediction)
    rest = (action, other, table, check)
    for each in (command, *tuned, about, single, picture, whole, embedding, *studies, *rest):
        each.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(arguments=None):
    options = build_parser().parse_args(arguments)
    try:
        _run(options)
        _leave(0)
    except UserError as error:
        if options.debug:
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        print(f"mspt: error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr, flush=True)
        _end_early(2)
    except interruption.Preempted as ended:
        if os.environ.get("RANK", "0") == "0":
            print(f"mspt: {ended}", file=sys.stderr, flush=True)
        _end_early(interruption.EXIT_CODE)
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("mspt: interrupted", file=sys.stderr)
        sys.exit(130)


def _run(options):
    try:
        options.run_command(options)
    except OSError as error:
        if error.errno not in FULL:
            raise
        at = f"{error.filename}: " if error.filename else ""
        raise UserError(
            f"{at}{error.strerror}; make room and give the command again: a run goes on from its last checkpoint"
        ) from error


def _end_early(code):
    """Leave with this code, and tell launch/job.sh, unless another rank has: SLURM may kill this one for its sake."""
    if file := os.environ.get("MSPT_ENDED"):
        with suppress(OSError), open(file, "x") as ended:  # another rank was first, or the disk is full
            ended.write(str(code))
    _leave(code)
    sys.exit(code)


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
