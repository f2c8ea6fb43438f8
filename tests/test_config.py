"""Configurations: every published file parses and builds, and what is wrong is said in one line."""

from pathlib import Path

import pytest
import yaml

from mspt import config
from mspt.errors import UserError
from mspt.models.encoders.torchmd_et import MD17
from mspt.objectives import Pretraining

# A table of mspt reproduce is no configuration: its rows lie in a folder of its name.
CONFIGS = sorted(p for p in (Path(__file__).parent.parent / "configs").glob("*.yaml") if not p.with_suffix("").is_dir())
QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_parses_and_builds(path):
    loaded = config.load(path)
    module = Pretraining(loaded.model, loaded.objectives)
    assert sum(parameter.numel() for parameter in module.parameters()) > 10_000


def test_published_constants():
    """The numbers of the papers that a silent change would spoil."""
    stage1, stage2 = (config.load(QUICKSTART.parent / f"{name}.yaml") for name in ("pcqm4mv2-coord", "qm9s-molspectra"))
    for loaded, molecules in ((stage1, 70), (stage2, 128)):
        encoder = loaded.model.encoder
        assert (encoder.layers, encoder.channels, encoder.heads, encoder.radial_functions) == (8, 256, 8, 64)
        assert (encoder.cutoff, encoder.max_neighbours, encoder.norm) == (5.0, 32, "whitened_published")
        assert (loaded.schedule.kind, loaded.schedule.warmup, loaded.schedule.peak) == ("cosine", 10_000, 4e-4)
        assert (loaded.schedule.final, loaded.training.steps, loaded.engine.weight_decay) == (1e-7, 400_000, 0.0)
        assert (loaded.data.budget.molecules, loaded.engine.precision) == (molecules, "fp32")
        assert loaded.objectives.coord.sigma == 0.04
    assert stage2.objectives.contrast.temperature == 0.07
    assert stage2.objectives.masked_patches.ratio == 0.1
    assert [stage2.objectives.chosen()[name].weight for name in ("coord", "masked_patches", "contrast")] == [1, 1, 1]
    specformer = stage2.model.specformer
    assert (specformer.layers, specformer.channels, specformer.heads, specformer.feed_forward) == (3, 128, 16, 256)
    assert stage2.model.init == stage1.run.dir


def test_published_constants_of_fine_tuning():
    qm9, md17 = (config.load(QUICKSTART.parent / f"finetune-{name}.yaml") for name in ("qm9", "md17"))
    assert qm9.model.encoder == config.load(QUICKSTART.parent / "qm9s-molspectra.yaml").model.encoder
    assert md17.model.encoder == MD17
    for loaded, molecules, peak, warmup, steps, parts in (
        (qm9, 128, 4e-4, 10_000, 700_000, (110_000, 10_000)),
        (md17, 8, 5e-4, 1000, 140_000, (950, 50)),
    ):
        assert (loaded.data.budget.molecules, loaded.training.steps) == (molecules, steps)
        assert (loaded.data.split.train, loaded.data.split.validation) == parts
        schedule = loaded.schedule
        assert (schedule.kind, schedule.peak, schedule.warmup, schedule.final) == ("cosine", peak, warmup, 1e-7)
        assert (loaded.engine.weight_decay, loaded.engine.precision) == (0.0, "fp32")
    assert (qm9.objectives.coord.weight, qm9.objectives.coord.sigma) == (0.1, 0.005)
    assert md17.objectives.coord is None  # published with the same noise, which forces are the worse for
    assert (qm9.objectives.property.loss, qm9.objectives.property.readout) == ("mse", "scalar")
    assert (md17.objectives.forces.energy_weight, md17.objectives.forces.force_weight) == (0.2, 0.8)


@pytest.mark.parametrize(
    ("target", "readout", "references"),
    [("mu", "dipole_norm", False), ("r2", "spatial_extent", False), ("gap", "scalar", False), ("u0", "scalar", True)],
)
def test_what_a_target_is_read_off_as(target, readout, references):
    loaded = config.load(QUICKSTART.parent / "finetune-qm9.yaml", [f"objectives.property.target={target}"])
    assert loaded.objectives.property.readout == readout
    assert loaded.objectives.property.with_references == references


def test_overrides_and_round_trip():
    loaded = config.load(
        QUICKSTART, ["training.steps=7", "schedule.peak=4e-4", "data.heldout=null", "run.dir=else/where"]
    )
    assert (loaded.training.steps, loaded.schedule.peak, loaded.data.heldout) == (7, 4e-4, None)
    assert config.parse(yaml.safe_load(config.dump(loaded)), "dump") == loaded


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.stpes=5", "unknown key training.stpes; did you mean steps?"),
        ("trainig.steps=5", "unknown key trainig; did you mean training?"),
        ("model.encoder.layer=5", "unknown key model.encoder.layer; did you mean layers?"),
        ("training.steps=many", "training.steps is 'many'"),
        ("training.steps=0", "training.steps is 0"),
        ("model.encoder.name=schnett", "model.encoder.name is 'schnett'; known: 'torchmd_et'"),
        ("engine.zero_stage=4", "engine.zero_stage is 4"),
        ("objectives.contrast.negatives=most", "objectives.contrast.negatives is 'most'"),
        ("evaluation.patience=3", "patience counts measurements; set every too"),
        ("data.limit=0", "data.limit is 0"),
        ("seed=99999999999999999999999", "seed is 99999999999999999999999"),
        (
            "model.encoder={name: painn, heads: 4}",
            "unknown key model.encoder.heads; known here: name, layers, channels",
        ),
        (
            "model.encoder={name: transformer_m, feed_foward: 64}",
            "model.encoder.feed_foward; did you mean feed_forward?",
        ),
        ("model.encoder={name: egnn, vector: true}", "model.encoder.vector; did you mean vectors?"),
        ("run.dir=2026-11-31", "'run.dir=2026-11-31': the value is not valid YAML; quote it"),
        ("engine.betas=[0.9]", "engine.betas is [0.9]: it has too few values"),
        ("engine.betas=[0.9, 1.5]", "engine.betas.1 is 1.5"),
        ("objectives.contrast.temperature=0", "objectives.contrast.temperature is 0"),
        ("objectives.masked_patches.ratio=2", "objectives.masked_patches.ratio is 2"),
        ("objectives.masked_patches.ratio=.nan", "objectives.masked_patches.ratio is nan"),
        ("objectives.coord.sigma=-1", "objectives.coord.sigma is -1"),
        ("objectives.coord.weight=-3", "objectives.coord.weight is -3"),
        ("schedule.peak=.inf", "schedule.peak is inf"),
        ("objectives.property.loss=huber", "objectives.property"),
        ("training", "'training' is not an override; write key=value"),
    ],
)
def test_what_is_wrong_is_named(override, expected):
    with pytest.raises(UserError) as raised:
        config.load(QUICKSTART, [override])
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        config.load(tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [1, 2")
    with pytest.raises(UserError, match="not valid YAML"):
        config.load(broken)
    for text in ("run: {dir: 2026-11-31}", "run: &run [*run]\nx: *run"):
        broken.write_text(text)
        with pytest.raises(UserError, match=r"broken\.yaml"):
            config.load(broken)
    broken.write_bytes("run: {dir: Ü}".encode("latin-1"))
    with pytest.raises(UserError, match=r"no text in UTF-8 \(byte 11\)"):
        config.load(broken)
    broken.write_text("3")
    with pytest.raises(UserError, match="int"):
        config.load(broken)


def test_an_objective_without_its_encoder(tmp_path):
    loaded = config.load(QUICKSTART, ["model.specformer=null"])
    with pytest.raises(UserError, match="needs spectra"):
        Pretraining(loaded.model, loaded.objectives)
    loaded = config.load(QUICKSTART, ["objectives={}"])
    with pytest.raises(UserError, match="none is on"):
        Pretraining(loaded.model, loaded.objectives)
