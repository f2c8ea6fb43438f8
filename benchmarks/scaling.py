"""What training costs on many ranks: measured on one and two, predicted for 1 to 4096, and what a rank must hold.

    python benchmarks/scaling.py [--json FILE] [--rounds 5] [--steps 3] [--only speed memory prediction]
    python benchmarks/scaling.py --largest [--json FILE]      # one step of 1 B parameters: 25 GB, minutes
    python benchmarks/scaling.py --only prediction --step-seconds 0.02

speed: the published stages at their batch, one core and thread a rank, the same molecules a rank; two ranks beside what
α and β, fitted in the same run, predict, and beside two runs of one rank side by side, which send nothing. memory: the
peak of a step at each ZeRO stage, by formula and, up to 100 M parameters, as tensors were made. prediction: for H100s,
whose rates are assumed (benchmarks/costs.py); the time of a step on one is --step-seconds, or follows from the
operations counted (mspt/training/flops.py) and --utilisation.
"""

import argparse
import statistics
from pathlib import Path

import costs
import measure
import ranks
import torch
from ranks import Ranks

from mspt import config
from mspt.objectives import Pretraining
from mspt.training import flops

DATA = ("data.heldout=null", "data.workers=0", "model.init=null")
STAGE_1 = "configs/pcqm4mv2-coord.yaml", (*DATA, "data.train=shards/bundled/qm9-geometries/train")
STAGE_2 = "configs/qm9s-molspectra.yaml", (*DATA, "data.train=shards/bundled/qm9-spectra/train")
PUBLISHED = {"stage 1": STAGE_1, "stage 2": STAGE_2}
# layers, channels, heads of stage 1's encoder
SIZES = {"7 M": (8, 256, 8), "100 M": (14, 768, 24), "1 B": (32, 1664, 52)}
MEASURED = ("7 M", "100 M")
GPUS = (1, 8, 64, 512, 4096)


def overridden(size):
    """Overrides that give stage 1's encoder a size."""
    return [
        f"model.encoder.{key}={value}" for key, value in zip(("layers", "channels", "heads"), SIZES[size], strict=True)
    ]


def described(file, overrides):
    """(costs.Model, Config) of a configuration; no parameter is made."""
    loaded = config.load(measure.ROOT / file, overrides)
    with torch.device("meta"):
        module = Pretraining(loaded.model, loaded.objectives)
    contrast = loaded.objectives.contrast
    model = costs.Model(
        parameters=tuple(parameter.numel() for parameter in module.parameters()),
        layers=loaded.model.encoder.layers,
        precision=loaded.engine.precision,
        ema=loaded.engine.ema_decay is not None,
        embedding=loaded.model.encoder.channels if contrast and contrast.negatives != "micro" else 0,
        passes=2 if module.two_passes else 1,
    )
    return model, loaded


# Speed


def interconnect(pair):
    """α and β of the collectives between two ranks of this machine."""
    sizes = [2**power for power in range(12, 27, 2)]
    found = {}
    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        times = [max(both) for both in zip(*pair.ask(ranks.collective_times, name, sizes, 7), strict=True)]
        alpha, rate = costs.fit(sizes, times, 2, name)
        found[name] = {"alpha_seconds": alpha, "bytes_per_second": rate, "sizes": sizes, "seconds": times}
        print(f"{name:16s} α {1e6 * alpha:8.0f} µs   β {rate / 1e9:6.2f} GB/s")
    return found


def rate(results):
    """Molecules a second of ranks that worked at the same time."""
    molecules = sum(count for result in results for count, _ in result)
    return molecules / max(sum(seconds for _, seconds in result) for result in results)


def speed(name, options, links=None):
    """One published stage on one and on two ranks -> what goes into the result."""
    file, overrides = PUBLISHED[name]
    model, loaded = described(file, overrides)
    rounds = []
    with Ranks(1) as alone, Ranks(1, first=1) as beside, Ranks(2) as pair:
        worlds = {"alone": alone, "beside": beside, "pair": pair}
        for world in worlds.values():
            world.ask(ranks.build, file, [*overrides, f"data.lanes={len(world.pipes)}"])
            world.ask(ranks.run, 1)
        links = links or interconnect(pair)
        for _ in range(options.rounds):
            row = {"1 rank": rate(alone.ask(ranks.run, options.steps))}
            row["2 ranks"] = rate(pair.ask(ranks.run, options.steps))
            for world in (alone, beside):
                world.send(ranks.run, options.steps)
            row["2 runs of 1 rank"] = rate(alone.receive() + beside.receive())
            rounds.append(row)
    medians = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    molecules = loaded.data.budget.molecules
    sending = sum(seconds_between_two(links, message) for message in costs.messages(model, loaded.engine.zero_stage, 2))
    step = molecules / medians["1 rank"]
    predicted = 2 * molecules / (step + sending)
    result = {
        "config": file,
        "parameters": model.total,
        "molecules_a_rank_and_step": molecules,
        "zero_stage": loaded.engine.zero_stage,
        "molecules_per_second": medians,
        "predicted_2_ranks": predicted,
        "seconds_sending_predicted": sending,
        "weak_efficiency_2": statistics.median(row["2 ranks"] / (2 * row["1 rank"]) for row in rounds),
        "weak_efficiency_2_predicted": step / (step + sending),
        "efficiency_of_2_runs": statistics.median(row["2 runs of 1 rank"] / (2 * row["1 rank"]) for row in rounds),
        "rounds": rounds,
    }
    print(
        f"{name}, {model.total / 1e6:.1f} M parameters, {molecules} molecules a rank and step, in molecules/s:\n"
        f"    1 rank {medians['1 rank']:.1f}, 2 ranks {medians['2 ranks']:.1f} (predicted {predicted:.1f}), "
        f"2 runs of 1 rank {medians['2 runs of 1 rank']:.1f}\n"
        f"    efficiency at 2 ranks {result['weak_efficiency_2']:.3f} (predicted "
        f"{result['weak_efficiency_2_predicted']:.3f}), of 2 runs {result['efficiency_of_2_runs']:.3f}"
    )
    return result, links


def seconds_between_two(links, message):
    """Time of a Message between two ranks by the measured α and β."""
    link = links[message.collective]
    alpha = link["alpha_seconds"]
    measured = costs.Interconnect("measured", 2, (alpha, alpha), (link["bytes_per_second"],) * 2)
    return measured.seconds(message, 2)


# Memory and messages


def memory(options):
    """Peak of a step at each ZeRO stage -> rows; what two ranks send."""
    rows, sent = [], []
    print(
        f"{'memory of a rank, GB':28s}{'ranks':>6s}{'device':>9s}{'host':>9s}{'tensors':>9s}{'off by':>8s}{'RSS':>8s}"
    )
    for size in SIZES:
        model, _ = described(STAGE_1[0], overridden(size))
        for stage in range(4):
            for offload in (False, True)[: 1 + (stage > 0)]:
                for count in (1, 2, 8, 64):
                    parts = costs.memory(model, stage, count, offload)
                    row = {"size": size, "parameters": model.total, "zero_stage": stage, "offload": offload}
                    row |= {"ranks": count, "parts": {part: number for part, (number, _) in parts.items()}}
                    for place in ("device", "host"):
                        row[place] = sum(number for number, where in parts.values() if where == place)
                    if size in MEASURED and count <= 2:
                        row |= measured_memory(size, stage, offload, count, sent)
                    rows.append(row)
                    show(row)
    return {"memory": rows, "sent_by_2_ranks": sent}


def measured_memory(size, stage, offload, count, sent):
    """Peaks of real ranks; where there are two, what they send is added to sent."""
    file, overrides = STAGE_1
    own = [*overrides, *overridden(size), "data.budget.molecules=1", f"data.lanes={count}"]
    own += [f"engine.zero_stage={stage}", f"engine.offload={str(offload).lower()}"]
    with Ranks(count) as world:
        found = world.ask(ranks.memory, file, own, 2)
        if count == 2 and not offload:
            counted = world.ask(ranks.traffic, 2)[0]
            expected = costs.messages(described(file, own)[0], stage, 2, molecules=1)
            row = {"size": size, "zero_stage": stage, "expected_bytes": sum(costs.sent(m, 2) for m in expected)}
            sent.append(row | counted)
    return {name: max(one[name] for one in found) for name in found[0]}


def show(row):
    name = f"{row['size']:6s} ZeRO {row['zero_stage']}{', offload' if row['offload'] else ''}"
    line = f"{name:28s}{row['ranks']:6d}{row['device'] / 1e9:9.3f}{row['host'] / 1e9:9.3f}"
    if "tensors_training" in row:
        off = (row["device"] + row["host"]) / row["tensors_training"] - 1
        line += f"{row['tensors_training'] / 1e9:9.3f}{100 * off:+8.0f}%{row['resident_training'] / 1e9:9.3f}"
    else:
        line += "   computed"
    print(line)


def largest(options):
    """One step of the largest size under ZeRO 3, bf16, with and without offload, on one rank."""
    file, overrides = STAGE_1
    rows = []
    for offload in (True, False):
        own = [*overrides, *overridden(options.size), "data.budget.molecules=1", "data.lanes=1", "engine.zero_stage=3"]
        own += ["engine.precision=bf16", f"engine.offload={str(offload).lower()}"]
        model, _ = described(file, own)
        needed = sum(number for number, _ in costs.memory(model, 3, 1, offload).values())
        row = {"size": options.size, "parameters": model.total, "offload": offload, "computed_bytes": needed}
        with Ranks(1) as one:
            try:
                row |= one.ask(ranks.one_step, file, own, options.keep_free)[0]
            except RuntimeError as error:
                row["error"] = str(error)
        row["available_bytes"] = ranks.available()
        print(row)
        rows.append(row)
    return {"largest": rows}


# Prediction


def predictions(options):
    """Molecules/s and efficiency on H100s -> rows."""
    molecules, rows = options.molecules, []
    batch = measure.bundled(256, "qm9-geometries")
    atoms = len(batch.numbers) / 256
    print(f"\n{costs.H100.name}, {molecules} molecules a GPU and step; {assumed(options)}")
    print(f"{'molecules/s (efficiency)':24s}" + "".join(f"{count:>20d}" for count in GPUS))
    for precision in costs.H100_RATES:
        for name, file, own in [
            *((size, STAGE_1[0], overridden(size)) for size in SIZES),
            ("stage 2", STAGE_2[0], ["objectives.contrast.negatives=ranks"]),
        ]:
            model, loaded = described(file, [*own, f"engine.precision={precision}"])
            edges = flops.edges(batch, loaded.model.encoder) / 256
            work = flops.training_step(loaded.model, loaded.objectives, molecules, atoms * molecules, edges * molecules)
            step = options.step_seconds or work / (options.utilisation * costs.H100_RATES[precision])
            # DeepSpeed shards the masters of bf16: stage 0 runs as 1.
            for stage in range(int(precision == "bf16"), 4):
                row = {"size": name, "parameters": model.total, "precision": precision, "zero_stage": stage}
                row |= {"operations": work, "step_seconds": step, "gpus": {}}
                for count in GPUS:
                    sending = sum(
                        costs.H100.seconds(message, count)
                        for message in costs.messages(model, stage, count, molecules=molecules)
                    )
                    row["gpus"][count] = {
                        "molecules_per_second": count * molecules / (step + sending),
                        "efficiency": step / (step + sending),
                        "memory_bytes": sum(number for number, _ in costs.memory(model, stage, count).values()),
                    }
                rows.append(row)
                cells = "".join(
                    f"{cell['molecules_per_second']:12.3g} ({cell['efficiency']:.2f})" for cell in row["gpus"].values()
                )
                held = [row["gpus"][count]["memory_bytes"] / 1e9 for count in (GPUS[0], GPUS[-1])]
                print(f"{name:8s}{precision:5s} ZeRO {stage}    {cells}   {held[0]:.3g} to {held[1]:.3g} GB a GPU")
    return {"prediction": {"assumed": assumed(options), "interconnect": costs.H100.name, "rows": rows}}


def assumed(options):
    if options.step_seconds:
        return f"a step on one GPU given as {options.step_seconds} s"
    return f"a step on one GPU assumed: {options.utilisation:.0%} of the rate of its matrix products"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--only", nargs="*", default=("speed", "memory", "prediction"))
    parser.add_argument("--largest", action="store_true", help="train one step of --size alone")
    parser.add_argument("--size", default="1 B", choices=SIZES)
    parser.add_argument("--keep-free", type=float, default=0.5, help="GB of memory below which --largest gives up")
    parser.add_argument("--molecules", type=int, default=128, help="of a GPU and step, for the prediction")
    parser.add_argument("--step-seconds", type=float, help="time of a step on one GPU, for the prediction")
    parser.add_argument("--utilisation", type=float, default=0.25, help="share of a GPU's products that is assumed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure.machine()
    if options.largest:
        result |= largest(options)
    else:
        if "speed" in options.only:
            result["speed"], links = {}, None
            for name in PUBLISHED:
                result["speed"][name], links = speed(name, options, links)
            result["interconnect"] = links
            result["weak_efficiency_2"] = min(stage["weak_efficiency_2"] for stage in result["speed"].values())
        if "memory" in options.only:
            result |= memory(options)
        if "prediction" in options.only:
            result |= predictions(options)
    if options.json:
        measure.write(options.json, result)


if __name__ == "__main__":
    main()
