"""What has been learnt: mspt probe."""

import json

from mspt.errors import UserError


def probe(options):
    """Say what a linear model reads off an encoder's frozen embeddings."""
    from mspt.downstream import probe

    if (options.encoder is None) == (options.embeddings is None):
        raise UserError("give either --encoder, a folder, or --embeddings, the stores of --train and of --test")
    result = probe.probe(
        options.train,
        options.test,
        options.targets,
        options.encoder,
        options.embeddings,
        options.pool,
        options.labels,
        options.seed,
    )
    print(json.dumps(result, indent=1) if options.json else probe.report(result))


def names(text):
    """Names with commas between them, as a list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def add(commands):
    """Add the parsers -> list of them."""
    a_set = "a shard set or its Zarr twin"
    command = commands.add_parser("probe", help=probe.__doc__)
    command.add_argument("--encoder", metavar="DIR", help="a folder of model.safetensors and config.json")
    command.add_argument(
        "--embeddings", nargs=2, metavar=("TRAIN", "TEST"), help="in its place: stores of both sets by mspt embed"
    )
    command.add_argument("--train", required=True, metavar="SET", help=f"{a_set}, to fit on")
    command.add_argument("--test", required=True, metavar="SET", help=f"{a_set}, to measure on")
    command.add_argument("--targets", required=True, type=names, metavar="NAME,…", help="such as homo,lumo,gap")
    command.add_argument("--labels", type=int, metavar="N", help="fit on so many molecules, drawn at random")
    command.add_argument("--pool", choices=["sum", "mean"], default="sum", help="over atoms (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of that draw and of the untrained encoder's weights")
    command.add_argument("--json", action="store_true", help="the same as JSON")
    command.set_defaults(run_command=probe)
    return [command]
