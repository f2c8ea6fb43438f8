"""A source -> shard sets, by many processes, whole or not there.

    OUT/train, OUT/heldout      shard sets; OUT itself is the set where nothing is split
    OUT/rejects.jsonl           key, field and reason of each row that was refused
    OUT/duplicates.jsonl        InChIKeys that several records share, with their keys and parts

Each chunk of the source becomes shards of its own, so that the bytes do not depend on who made them. It is made in
.OUT.partial, beside OUT:

    build.json                  what is built of what; only the same build goes on here
    chunk-00012                 a chunk that is done (shards/chunk.py)
    again-00012                 the same without the records that earlier chunks have
    out                         what becomes OUT, when all chunks are done
    finished                    says that nothing in here is needed any more, once out has gone
"""

import contextlib
import fcntl
import functools
import itertools
import json
import os
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import mspt
from mspt import files
from mspt.data.schema import SCHEMA_VERSION
from mspt.errors import UserError
from shards import chunk, duplicates, pool, split
from shards.progress import Progress
from shards.writer import complete, shard_name

BUILD, RESULT, FINISHED = "build.json", "out", "finished"


@dataclass(frozen=True)
class Settings:
    """What the bytes depend on beside the source; the names are those of the command line's options."""

    split: str | None = None
    split_by: str = "key"
    shard: int = 16384
    block: int = 256
    limit: int | None = None
    exclude: Path | None = None
    inchikey: bool = True
    drop_duplicates: bool = False


@dataclass
class Summary:
    """What came out. manifests: part -> manifest. refused: field and reason -> how many.

    excluded, dropped: records left out as asked. unknown: records without a scaffold. duplicates: InChIKeys of several
    records; leaking: those of them in several parts.
    """

    manifests: dict = field(default_factory=dict)
    refused: Counter = field(default_factory=Counter)
    excluded: int = 0
    dropped: int = 0
    unknown: int = 0
    duplicates: int = 0
    leaking: int = 0


def build(source, out, settings, command, processes=1, part=None, strict=False):
    """Build OUT -> its Summary; with part ("I/N") only the chunks I, I + N, … -> None.

    command: what the manifest says of how the set was made. Raises UserError where out is there already, where an
    unfinished build is of something else, where a set would be empty, at a limit where the source cannot count
    its rows, or with strict at a refused record.
    """
    out = Path(out)
    for name, value in (("shard", settings.shard), ("block", settings.block), ("limit", settings.limit)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; give 1 or more")
    if settings.limit is not None and source.uncounted:
        raise UserError(f"--limit is {settings.limit}, but {source.uncounted}")
    if processes < 1:
        raise UserError(f"--processes is {processes}; give 1 or more")
    if settings.drop_duplicates and not settings.inchikey:
        raise UserError("--drop-duplicates goes by InChIKey; leave --no-inchikey out")
    first, step = _part(part)
    work = out.with_name(f".{out.name}.partial")
    plan = chunk.Plan(
        source=source,
        work=work,
        split=split.Split(split.parse(settings.split) if settings.split else {}, settings.split_by),
        block=settings.block,
        exclude=excluded(settings.exclude),
        inchikey=settings.inchikey,
        strict=strict,
    )
    _tidy(work)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; remove it or choose another --out")
    _begin(work, settings, command, [*source.inputs, *([settings.exclude] if settings.exclude else [])])
    with contextlib.ExitStack() as locks:
        locks.enter_context(_locked(work / BUILD, fcntl.LOCK_SH if part else fcntl.LOCK_EX))
        if part:
            locks.enter_context(_locked(work / f"part-{first}-of-{step}", fcntl.LOCK_EX))
        tasks = itertools.islice(_tasks(source, settings), first, None, step)
        names = _run(plan, tasks, processes, _rows_left(plan, settings, first, step))
        if part:
            return None
        if not names:
            raise UserError(f"{', '.join(map(str, source.inputs))}: no rows to build of")
        summary = _finish(plan, settings, [work / name for name in names], command, processes)
        files.write(work / FINISHED, "")
        os.replace(work / RESULT, out)
    _tidy(work)
    return summary


def _part(text):
    """I/N -> I, N; None -> 0, 1, which is every chunk."""
    found = re.fullmatch(r"(\d+)/(\d+)", text or "0/1")
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"--part is {text}; give I/N with I from 0 to N - 1, such as 0/4")
    return int(found[1]), int(found[2])


def excluded(path):
    """The keys of a file with one on each line; none where there is no file. Raises UserError."""
    if path is None:
        return frozenset()
    try:
        return frozenset(line.strip() for line in Path(path).read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give --exclude a file with a key on each line") from error


def _tidy(work):
    """Remove the folder of a build that is finished. Its files go last: a kill in between leaves it finished."""
    if not (work / FINISHED).exists() or (work / RESULT).exists():
        return
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    shutil.rmtree(work)


def _begin(work, settings, command, inputs):
    """Make the folder of a build, or see that the one that is there is of the same."""
    stats = [(path.resolve(), path.stat()) for path in map(Path, inputs)]
    wanted = {
        **{name: str(value) for name, value in asdict(settings).items()},
        "command": command,
        "schema_version": SCHEMA_VERSION,
        "mspt": mspt.__version__,
        "inputs": {str(path): [stat.st_size, stat.st_mtime_ns] for path, stat in stats},
    }
    if not (work / BUILD).exists():
        work.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f"{work.name}.", dir=work.parent))
        files.write(made / BUILD, json.dumps(wanted, indent=1, ensure_ascii=False))
        try:
            os.rename(made, work)
        except OSError:  # another part was first
            shutil.rmtree(made)
    try:
        found = json.loads((work / BUILD).read_text())
    except FileNotFoundError:
        raise UserError(f"{work}: is there, but not of this program; remove it") from None
    remedy = f"give the command that it was begun with, or remove {work} to begin again"
    for name in wanted:
        before, now = found.get(name), wanted[name]
        if name == "inputs" and before != now:
            path = min(path for path in {*before, *now} if before.get(path) != now.get(path))
            raise UserError(f"{path}: has changed since this build was begun; {remedy}")
        if before != now:
            raise UserError(f"{work}: was begun with {name} = {before}, now it is {now}; {remedy}")


@contextlib.contextmanager
def _locked(path, kind):
    with path.open("a") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path.parent}: another build is at work there; wait until it has ended") from None
        except OSError:
            pass  # a file system without locks
        yield


def _tasks(source, settings):
    """Yield the Task of every chunk."""
    chunks = source.chunks(settings.shard)
    if settings.limit is not None:
        chunks = itertools.islice(chunks, -(-settings.limit // settings.shard))
    for number, one in enumerate(chunks):
        rows = None if settings.limit is None else settings.limit - number * settings.shard
        yield chunk.Task(f"chunk-{number:05d}", one, rows)


def _rows_left(plan, settings, first, step):
    """How many rows a command has to read, None where only reading tells."""
    total = plan.source.total
    if total is None:
        return None
    total = total if settings.limit is None else min(total, settings.limit)
    starts = range(first * settings.shard, total, step * settings.shard)
    done = {int(path.name.removeprefix("chunk-")) * settings.shard for path in plan.work.glob("chunk-*")}
    return sum(min(settings.shard, total - start) for start in starts if start not in done)


def _run(plan, tasks, processes, total):
    """Do the tasks that are not done -> the names of all."""
    names = []

    def missing():
        for task in tasks:
            names.append(task.name)
            if not (plan.work / task.name).exists():
                yield task

    with Progress(total) as progress:
        for count in pool.unordered(functools.partial(chunk.build, plan), missing(), processes):
            progress.add(count.rows, len(count.rejects))
    return names


def _finish(plan, settings, folders, command, processes):
    """All chunks are done: make work/out of them."""
    summary, result = Summary(), plan.work / RESULT
    result.mkdir(exist_ok=True)
    twice, dropped = _compare(plan, settings, folders, summary)
    numbers = {*twice, *dropped}
    if numbers:
        again = (
            replace(task, name=task.name.replace("chunk", "again"), twice=twice[number], dropped=dropped[number])
            for number, task in enumerate(_tasks(plan.source, settings))
            if number in numbers
        )
        _run(plan, again, processes, None)
    for number in numbers:
        folders[number] = plan.work / folders[number].name.replace("chunk", "again")
    _write_lines(result / "rejects.jsonl", _rejects(folders, summary, plan.strict))
    shards = {part: [] for part in plan.split.parts}
    for folder in folders:
        for part, shard in chunk.shards(folder, plan.split.parts).items():
            shards[part].append((folder / part / chunk.SHARD, shard))
    for part, own in shards.items():
        if not own:
            raise UserError(
                f"{part or 'the set'}: no record is left for it, {summary.refused.total()} were refused "
                f"({result / 'rejects.jsonl'}); give more molecules or another --split, and remove {plan.work}"
            )
    for part, own in shards.items():
        (result / part).mkdir(exist_ok=True)
        for number, (path, _) in enumerate(own):
            place = result / part / shard_name(number)
            if not place.exists():  # a killed command has moved some
                os.replace(path, place)
        provenance = {"command": command, **plan.source.provenance}
        summary.manifests[part] = complete(result / part, [shard for _, shard in own], provenance)
    return summary


def _compare(plan, settings, folders, summary):
    """Find what is there more than once -> keys to refuse and keys to leave out, as number of a chunk -> set.

    Writes duplicates.jsonl.
    """
    records, twice, dropped = chunk.Records(folders), defaultdict(set), defaultdict(set)
    key, inchikey = (functools.partial(records.text, name) for name in ("keys", "inchikeys"))
    later = [row for group in duplicates.groups(records.column("words"), key) for row in group[1:]]
    for row in later:
        twice[records.chunk_of(row)].add(key(row))
    if not settings.inchikey:
        return twice, dropped
    molecules, part = records.column("molecules"), records.column("part")
    molecules[later] = 0
    groups = duplicates.groups(molecules, inchikey)
    rows = (
        {
            "inchikey": inchikey(group[0]),
            "keys": [key(row) for row in group],
            "parts": [plan.split.parts[number] for number in part[group]],
        }
        for group in groups
    )
    _write_lines(plan.work / RESULT / "duplicates.jsonl", rows)
    summary.duplicates = len(groups)
    if settings.drop_duplicates:
        for row in itertools.chain.from_iterable(group[1:] for group in groups):
            dropped[records.chunk_of(row)].add(key(row))
    else:
        summary.leaking = sum(bool(part[group].min() != part[group].max()) for group in groups)
    return twice, dropped


def _rejects(folders, summary, strict):
    """Yield the rejects of all chunks, and count."""
    for folder in folders:
        count = chunk.load(folder)
        summary.excluded += count.excluded
        summary.dropped += count.dropped
        summary.unknown += count.unknown
        for row in count.rejects:
            if strict:
                raise chunk.refusal(row)
            # Reasons that differ in a number are one.
            summary.refused[f"{row['field']}: {re.sub(r'[0-9.]*[0-9]', 'N', row['reason'])}"] += 1
            yield row


def _write_lines(path, rows):
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
