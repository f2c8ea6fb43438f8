"""The typed tree of a run's configuration: one YAML file and dotted overrides.

A key that does not exist, a value of the wrong type or out of range is refused in one line that names the nearest
right one.
"""

import difflib
from contextlib import suppress
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from mspt.data.stream import DataSettings
from mspt.errors import UserError
from mspt.models.pretraining import NetworkSettings
from mspt.objectives import ObjectivesSettings
from mspt.settings import Settings
from mspt.training.checkpoint import CheckpointSettings
from mspt.training.engine import EngineSettings
from mspt.training.schedule import ScheduleSettings
from mspt.training.trainer import TrainingSettings
from mspt.training.validation import EvaluationSettings


class RunSettings(Settings):
    """dir: the run folder. It holds the run's whole state: the same command in the same folder resumes.

    grace: seconds from a signal to the end of the machine's patience; a save that would take longer is left out; null:
    as long as it takes. hang_timeout: seconds without a step after which a run ends and names the ranks at fault; null:
    never.
    """

    dir: str
    grace: float | None = Field(None, gt=0)
    hang_timeout: float | None = Field(1800, gt=0)


class Config(Settings):
    """Everything that a run is made from."""

    run: RunSettings
    seed: int = Field(0, ge=0, lt=2**63)
    data: DataSettings
    model: NetworkSettings
    objectives: ObjectivesSettings
    training: TrainingSettings
    engine: EngineSettings = EngineSettings()
    schedule: ScheduleSettings
    checkpoint: CheckpointSettings = CheckpointSettings()
    evaluation: EvaluationSettings = EvaluationSettings()


def load(path, overrides=()):
    """Config from a YAML file and overrides such as "training.steps=50".

    Raises UserError for a missing or unreadable file, an override without "=", and whatever does not fit.
    """
    tree = read(path)
    for override in overrides:
        put(tree, *_key_and_value(override))
    return parse(tree, path)


def read(path):
    """The nested dicts of a YAML file. Raises UserError for one that is missing, unreadable or holds something else."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration ({error.strerror}); check --config") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no text in UTF-8 (byte {error.start}); save the configuration as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that there is not; a part of itself
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {type(tree).__name__} where keys such as run, data, model are needed")
    return tree


def put(tree, key, value):
    """Set a dotted key of nested dicts, in place; what is not there on the way to it is made."""
    *path, last = key.split(".")
    node = tree
    for name in path:
        if not isinstance(node.get(name), dict):
            node[name] = {}
        node = node[name]
    # YAML 1.1 takes 4e-4 for a string, because it has no dot.
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    node[last] = value


def parse(tree, source):
    """Config from nested dicts; source is what errors name as the place of a wrong key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error, tree)}") from error


def dump(config):
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _key_and_value(override):
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"{override!r} is not an override; write key=value, such as training.steps=50")
    try:
        return key, yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{override!r}: the value is not valid YAML; quote it") from error


def _explain(error, tree):
    """The first of pydantic's errors, as: key, what is wrong, what would be right."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a misspelt key explains a missing one
    location = [str(part) for part in first["loc"]]
    key = ".".join(part for part in location if _is_key(part, tree, location))
    value = first["input"]
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _siblings(location), n=1, cutoff=0.5)
        known = ", ".join(_siblings(location))
        hint = f"did you mean {near[0]}?" if near else f"known here: {known}"
        return f"unknown key {key}; {hint}"
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):  # a place in a list of fixed length
        return f"{key.rpartition('.')[0]} is {value!r}: it has too few values"
    if first["type"] == "missing":
        return f"missing key {key}; add it to the file or give {key}=VALUE"
    if first["type"] == "union_tag_invalid":
        context = first["ctx"]
        tag = context["discriminator"].strip("'")
        return f"{key}.{tag} is {context['tag']!r}; known: {context['expected_tags']}"
    return f"{key} is {value!r}: {first['msg'].removeprefix('Value error, ')}"


def _is_key(part, tree, location):
    """Whether a part of pydantic's location is a key (and not the tag of a union, which it adds)."""
    return part not in _tags(tree) or location.index(part) == len(location) - 1


def _tags(tree):
    names = set()
    if isinstance(tree, dict):
        for key, value in tree.items():
            names |= {value} if key == "name" and isinstance(value, str) else _tags(value)
    return names


def _siblings(location):
    """Names that are right where the last part of location is wrong."""
    nodes = [Config]
    for part in location[:-1]:
        fields = [node.model_fields[part] for node in nodes if part in node.model_fields]
        if fields:
            nodes = [each for field in fields for each in _settings_in(field.annotation)]
        else:  # the tag of a union: pydantic names it, the tree does not
            nodes = [
                node for node in nodes if "name" in node.model_fields and node.model_fields["name"].default == part
            ]
    return list(nodes[0].model_fields) if nodes else []


def _settings_in(annotation):
    """The settings classes of an annotation, which may be a union."""
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return [each for each in candidates if isinstance(each, type) and issubclass(each, Settings)]
