"""The network and the objectives of a run, out of its checkpoint, to be used for something else than training."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mspt.data.stream import DataSettings
from mspt.errors import UserError
from mspt.models.pretraining import NetworkSettings
from mspt.objectives import ObjectivesSettings, Pretraining
from mspt.training import checkpoint


@dataclass(frozen=True)
class Loaded:
    """source: the checkpoint. module: a Pretraining that is to be evaluated, on the GPU if there is one. data: the
    DataSettings of the run, line shapes among them; but damage is an error, since answers go by a record's number."""

    source: Path
    module: Pretraining
    data: DataSettings
    device: torch.device

    def objective(self, name, purpose):
        """The objective of this name. Raises UserError, with what it is needed for, where the run was without."""
        if name not in self.module.objectives:
            raise UserError(
                f"{self.source}: the run was without objectives.{name}, which {purpose} needs; give another"
            )
        return self.module.objectives[name]


def newest(source):
    """A run folder -> its newest whole checkpoint; a checkpoint -> itself. Raises UserError where there is none."""
    found = Path(source) if (Path(source) / "meta.json").exists() else checkpoint.latest(source)
    if found is None:
        raise UserError(f"{source}: no checkpoint in this run folder; train it first (mspt pretrain)")
    return found


def load(source):
    """A run folder, or one of its checkpoints -> Loaded, with the weights' moving average if the run keeps one."""
    found = newest(source)
    config = checkpoint.read_meta(found)["config"]
    network = NetworkSettings.model_validate(config["model"])
    module = Pretraining(network, ObjectivesSettings.model_validate(config["objectives"]))
    module.load_state_dict(checkpoint.averaged(found))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = module.to(device).eval().requires_grad_(False)
    data = DataSettings.model_validate(config["data"]).model_copy(update={"on_bad_block": "error"})
    return Loaded(found, module, data, device)
