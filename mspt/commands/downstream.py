"""What has been learnt: mspt probe | retrieve | predict-spectrum | attention."""

import argparse
import json
from pathlib import Path

from mspt.commands.arguments import at_least
from mspt.errors import UserError

A_SET = "a shard set or its Zarr twin"
A_RUN = "a run folder, or one of its checkpoints"


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


def retrieve(options):
    """Say which spectrum belongs to a molecule of a set, and which molecule to a spectrum."""
    from mspt import files
    from mspt.data.opening import open_set
    from mspt.downstream import identification, retrieval
    from mspt.training import loading

    run = loading.load(options.run)
    run.objective("contrast", "retrieval")
    molecules, network = open_set(options.data), run.module.network
    query = identification.read(options.query or [])
    if query and (options.queries or options.spectra):
        raise UserError("--queries and --spectra choose among the set's own spectra; leave them out beside --query")
    if options.calibrated and not query:
        raise UserError("--calibrated is about the spectra of --query; give one, or leave it out")
    subsets = [] if query else list(dict.fromkeys(options.spectra or [subset("all")]))
    for option, asked in (
        *(("--query", [name]) for name in query),
        *(("--spectra", each.split(",")) for each in subsets),
    ):
        if not set(asked) & set(run.data.spectra):
            raise UserError(
                f"{option} {','.join(asked)}: the run learnt from {', '.join(run.data.spectra)} alone (data.spectra); "
                "ask by these, or give another run"
            )
    library = retrieval.read(network, molecules, subsets, run.data, run.device)
    if query:
        spectra = query if options.calibrated else identification.scaled(query, library)
        found = identification.identify(network, library, spectra, options.top, run.device)
        print(identification.report(molecules, found))
        if options.out:
            files.write(options.out, identification.answers(molecules, found))
            print(f"wrote {options.out}")
        return
    queries = [options.queries] if options.queries else ["molecule", "spectrum"]
    found = retrieval.rank(library, options.data)
    print(retrieval.report(found, queries))
    if options.out:
        files.write(options.out, retrieval.answers(library, found, queries, options.top))
        print(f"wrote {options.out}")


def predict_spectrum(options):
    """Write the spectra that a run predicts for a set's molecules, and compare them with the set's own."""
    from mspt.data import plot
    from mspt.data.opening import broadened, open_set
    from mspt.downstream import pictures, spectra
    from mspt.training import loading

    if options.figure:
        plot.check_png(options.figure, "--figure")
    run = loading.load(options.run)
    objective = run.objective("spectrum_prediction", "the prediction of spectra")
    molecules = open_set(options.data)
    training = spectra.Training(list(objective.heads))
    for each in [open_set(folder) for folder in options.train] if options.train else run.data.open():
        for batch in broadened(each, run.data, run.device):
            training.learn(batch)
    about = {"run": str(run.source), "data": str(options.data)}
    found = spectra.compare(
        run.module.network, objective, molecules, training, run.data, run.device, options.out, about
    )
    print(json.dumps(spectra.means(found), indent=1) if options.json else spectra.report(spectra.means(found)))
    if options.figure:
        plot.save(pictures.predictions(molecules, options.out, found, training, run.data), options.figure)
    if not options.json:
        print(f"wrote {options.out}" + (f" and {options.figure}" if options.figure else ""))


def attention(options):
    """Draw a run's attention within and between the spectra of a molecule."""
    from mspt.data import look, plot
    from mspt.downstream import attention, pictures
    from mspt.training import loading

    plot.check_png(options.out)
    run = loading.load(options.run)
    shardset = look.open_one(options.data)
    record = next(shardset.records([look.find(shardset, options.record)]))
    maps = attention.maps(run.module.network, record, run.data, run.device)
    print(attention.report(maps))
    plot.save(pictures.attention(maps), options.out)
    print(f"wrote {options.out}")


def subset(text):
    """Names of spectra with commas between them, in the order of the grids; all means all."""
    from mspt.chemistry.spectra import SPECTRA

    wanted = list(SPECTRA) if text == "all" else names(text)
    if not wanted or not set(wanted) <= set(SPECTRA):
        raise argparse.ArgumentTypeError(f"{text}: known are all, {', '.join(SPECTRA)}")
    return ",".join(name for name in SPECTRA if name in wanted)


def names(text):
    """Names with commas between them, as a list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def add(commands):
    """Add the parsers -> list of them."""
    return [_add_probe(commands), _add_retrieve(commands), _add_predict_spectrum(commands), _add_attention(commands)]


def _add_probe(commands):
    command = commands.add_parser("probe", help=probe.__doc__)
    command.add_argument("--encoder", metavar="DIR", help="a folder of model.safetensors and config.json")
    command.add_argument(
        "--embeddings", nargs=2, metavar=("TRAIN", "TEST"), help="in its place: stores of both sets by mspt embed"
    )
    command.add_argument("--train", required=True, metavar="SET", help=f"{A_SET}, to fit on")
    command.add_argument("--test", required=True, metavar="SET", help=f"{A_SET}, to measure on")
    command.add_argument("--targets", required=True, type=names, metavar="NAME,…", help="such as homo,lumo,gap")
    command.add_argument("--labels", type=at_least(1), metavar="N", help="fit on so many molecules, drawn at random")
    command.add_argument("--pool", choices=["sum", "mean"], default="sum", help="over atoms (default: %(default)s)")
    command.add_argument(
        "--seed", type=at_least(0), default=0, help="of that draw and of the untrained encoder's weights"
    )
    command.add_argument("--json", action="store_true", help="the same as JSON")
    command.set_defaults(run_command=probe)
    return command


def _add_retrieve(commands):
    command = commands.add_parser("retrieve", help=retrieve.__doc__)
    command.add_argument("run", metavar="RUN", help=A_RUN)
    command.add_argument("--data", required=True, metavar="SET", help=A_SET)
    command.add_argument("--queries", choices=["molecule", "spectrum"], help="one direction only")
    command.add_argument(
        "--spectra",
        nargs="+",
        type=subset,
        metavar="NAMES",
        help="what of a molecule's spectra is seen, such as: all ir ir,raman (default: all)",
    )
    command.add_argument(
        "--query",
        nargs=2,
        action="append",
        metavar=("NAME", "FILE"),
        help="in place of the set's own spectra a measured one: ir, raman or uv_vis, with its unit if it is not the "
        "grid's (uv_vis:nm), and a file of two columns; once for each spectrum of the molecule",
    )
    command.add_argument(
        "--calibrated", action="store_true", help="take the query's intensities as they are, in the units of training"
    )
    command.add_argument(
        "--top", type=at_least(1), default=10, metavar="K", help="answers to a query (default: %(default)s)"
    )
    command.add_argument("--out", metavar="FILE.csv", help="write the answers to every query")
    command.set_defaults(run_command=retrieve)
    return command


def _add_predict_spectrum(commands):
    command = commands.add_parser("predict-spectrum", help=predict_spectrum.__doc__)
    command.add_argument("run", metavar="RUN", help=A_RUN)
    command.add_argument("--data", required=True, metavar="SET", help=A_SET)
    command.add_argument("--out", required=True, type=Path, metavar="STORE", help="the Zarr store to write")
    command.add_argument(
        "--train",
        nargs="+",
        metavar="SET",
        help="what baselines are taken from (default: what the run learnt from)",
    )
    command.add_argument("--figure", type=Path, metavar="FILE.png", help="draw the best, a middling and the worst one")
    command.add_argument("--json", action="store_true", help="the scores as JSON")
    command.set_defaults(run_command=predict_spectrum)
    return command


def _add_attention(commands):
    command = commands.add_parser("attention", help=attention.__doc__)
    command.add_argument("run", metavar="RUN", help=A_RUN)
    command.add_argument("--data", required=True, metavar="SET", help="a shard set")
    command.add_argument("--record", required=True, metavar="KEY|NUMBER", help="a key, or a number from 0")
    command.add_argument("--out", required=True, type=Path, metavar="FILE.png", help="the picture to write")
    command.set_defaults(run_command=attention)
    return command
