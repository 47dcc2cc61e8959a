"""The heads that score patches, and their files."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import write_text
from ..selection import get_estimator
from .config import CONFIGS, PatchConfig, ShivaViTConfig, TNTConfig

_CONFIG, _WEIGHTS = "patches.json", "patches.safetensors"


class PatchPruner(nn.Module):
    """What is learned beside the vision transformer: a linear head for every scored block, TNT's LayerNorm.

    Its parameters are trained with the model's: add them to the optimizer.

    Args:
        config: how patches are chosen.
        width: D, channels of the model.
    """

    def __init__(self, config: PatchConfig, width: int):
        super().__init__()
        self.config, self.width = config, width
        self.heads = nn.ModuleDict({str(layer): nn.Linear(width, 1) for layer in config.scored()})
        for head in self.heads.values():
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.norm = nn.LayerNorm(width) if isinstance(config, TNTConfig) else None
        self.estimator = get_estimator(config.estimator) if isinstance(config, ShivaViTConfig) else None

    def scores(self, layer: int, x: Tensor) -> Tensor:
        """Scores [B,n], float32, of patches x [B,n,D] at a block."""
        head = self.heads[str(layer)]
        with torch.autocast(x.device.type, enabled=False):  # in half precision many of them would be equal
            return F.linear(x.float(), head.weight.float(), head.bias.float()).squeeze(-1)

    @property
    def device(self) -> torch.device | None:
        """Where the heads are; None without any."""
        return next((parameter.device for parameter in self.parameters()), None)

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``patches.json`` and ``patches.safetensors``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{_WEIGHTS}.tmp"
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, temporary)
        os.replace(temporary, folder / _WEIGHTS)
        about = {"method": type(self.config).__name__, "width": self.width, "config": asdict(self.config)}
        write_text(folder / _CONFIG, json.dumps(about, indent=1) + "\n")


def load(folder: str | os.PathLike, **changes) -> PatchPruner:
    """What :meth:`PatchPruner.save` wrote, with some settings changed, such as ``keep=0.5``.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is something else, or a setting does not fit.
    """
    folder = Path(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; wanted a folder that PatchPruner.save wrote")
    about = json.loads((folder / _CONFIG).read_text())
    if not isinstance(about, dict) or about.get("method") not in CONFIGS:
        raise ValueError(f"{folder / _CONFIG} has no method that is known, wanted one of {', '.join(CONFIGS)}")
    cls = CONFIGS[about["method"]]
    try:
        config = cls(**about["config"] | changes)
        pruner = PatchPruner(config, about["width"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"{folder / _CONFIG} and {changes} do not make a {cls.__name__}: {error!r}") from error
    try:
        pruner.load_state_dict(load_file(folder / _WEIGHTS))
    except RuntimeError as error:
        raise ValueError(f"{folder / _WEIGHTS} has no heads for {config}: {error}") from error
    return pruner
