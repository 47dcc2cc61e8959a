"""A trained selection as a folder: ``config.json``, ``shiva.safetensors`` and a PEFT ``adapter`` folder."""

import json
import os
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ._library import __version__
from .models import Conditioning
from .selection import PolicyConfig, RatioPolicy, RatioTable, RouterConfig, ShivaRouter

if TYPE_CHECKING:
    from .method_artifact import MethodArtifact

CONFIG_NAME, WEIGHTS_NAME, ADAPTER_NAME = "config.json", "shiva.safetensors", "adapter"


def guidance_of(metadata: dict) -> float:
    """Scale of guidance that was distilled into an artefact's weights, see ``TrainConfig.guidance``; 0 is none."""
    return float(metadata.get("training", {}).get("guidance", 0))


@dataclass
class ShivaArtifact:
    """Router, ratio table and, optionally, the policy the table came from and the adapter that was tuned with them.

    It is a selector: :func:`shiva_ext.enable` takes it as it takes the folder it was saved in.

    Attributes:
        model_class: class of the transformer it was trained for.
        router, table, policy: see :mod:`shiva_ext.selection`.
        adapter: PEFT folder of the tuned weights, or None.
        share_selection: layers that share a router also share what it selects: the first one's scores choose the tokens
            of all, which then keep equally many. That halves the router's cost for pairs.
        metadata: free JSON values, such as the training settings.
    """

    model_class: str
    router: ShivaRouter
    table: RatioTable
    policy: RatioPolicy | None = None
    adapter: Path | None = None
    metadata: dict = field(default_factory=dict)
    share_selection: bool = False

    @property
    def first_layer(self) -> int:
        return self.table.first_layer

    @property
    def guidance(self) -> float:
        """Scale of guidance that the tuned weights give in one call; 0 where the pipeline guides."""
        return guidance_of(self.metadata)

    def group(self, layer: int) -> int | None:
        """Layers of one group select once, for all of them; None selects for itself."""
        return self.router.group(layer) if self.share_selection else None

    def ratios(self, sigma: float) -> tuple[float, ...]:
        """Share of tokens each layer keeps at noise level sigma."""
        return self.table.ratios(sigma)

    def scores(self, layer: int, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """Router scores [B,N] of tokens x [B,N,D] at the entry of a layer."""
        if self.router.layer_embedding.device != x.device:  # the model was moved, or is offloaded between calls
            self.router.to(x.device)
        return self.router(layer, x, conditioning.timestep_embedding, conditioning.pooled_embedding)

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the artefact with its adapter folder; config and weights appear whole or not at all."""
        tensors = {f"router.{k}": v for k, v in self.router.state_dict().items()}
        tensors |= {f"table.{k}": v for k, v in self.table.to_tensors().items()}
        if self.policy is not None:
            tensors |= {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        config = dict(
            format=1,
            shiva_ext=__version__,
            model_class=self.model_class,
            router=asdict(self.router.config),
            policy=None if self.policy is None else asdict(self.policy.config),
            adapter=self.adapter is not None,
            share_selection=self.share_selection,
            metadata=self.metadata,
        )
        return write_folder(folder, config, tensors, self.adapter)

    @classmethod
    def load(cls, source: str | os.PathLike) -> "ShivaArtifact":
        """Read an artefact from a folder or, if there is none of that name, from the Hugging Face hub.

        Args:
            source: a folder, or a hub id such as ``someone/sd35-shiva@0123abc`` with its revision. Without one it is
                whatever the repository holds today, and there is a warning.

        Raises:
            FileNotFoundError: neither exists, or the folder is not an artefact.
            ValueError: the artefact is damaged, of a later format, or of another method.
        """
        artifact = load(source)
        if not isinstance(artifact, cls):
            raise ValueError(
                f"shiva_ext: {source} holds {type(artifact.method).__name__}, wanted Shiva's router; load it with "
                "shiva_ext.load"
            )
        return artifact

    @classmethod
    def _read(cls, config: dict, tensors: dict[str, Tensor], folder: Path) -> "ShivaArtifact":
        """Build the artefact; what is missing or unfit in the files raises errors of many kinds."""

        def part(prefix: str) -> dict[str, Tensor]:
            # Copies: a file's tensors lie as they come, and kernels round otherwise on memory that is not aligned.
            return {k[len(prefix) :]: v.clone() for k, v in tensors.items() if k.startswith(prefix)}

        policy = None
        with torch.device("meta"):  # the weights come from the file: nothing is drawn, and their dtypes stay
            router = ShivaRouter.from_config(RouterConfig(**config["router"]))
            if config["policy"] is not None:
                policy = RatioPolicy.from_config(PolicyConfig(**config["policy"]))
        router.load_state_dict(part("router."), assign=True)
        if policy is not None:
            policy.load_state_dict(part("policy."), assign=True)
        return cls(
            config["model_class"],
            router.eval().requires_grad_(False),
            RatioTable.from_tensors(part("table.")),
            policy if policy is None else policy.eval().requires_grad_(False),
            folder / ADAPTER_NAME if config["adapter"] else None,
            config["metadata"],
            config.get("share_selection", False),
        )


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = repo_id.partition("@")
    if not revision:
        warnings.warn(
            f"shiva_ext: {repo_id!r} is loaded as it is on the hub today; give its revision ('{repo_id}@<commit>') for "
            "results that can be repeated",
            stacklevel=4,
        )
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"shiva_ext: {repo_id!r} is neither a folder here nor a repository on the hub that could be reached "
            f"({error})"
        ) from error


class MethodSource:
    """Makes a :class:`~shiva_ext.methods.Method` usable as a source: it runs the blocks, and no token is left out.

    Args:
        method: its settings.
        num_layers: of the model.
        weights: of a method that is trained.
        adapter: PEFT folder of the weights that were tuned with it.

    Attributes:
        guidance: see :attr:`ShivaArtifact.guidance`.
    """

    def __init__(self, method, num_layers: int, weights: nn.Module | None = None, adapter: Path | None = None):
        self.method, self.first_layer = method, method.first_layer
        self.weights, self.adapter = weights, adapter
        self.guidance = 0.0
        self._ratios = (1.0,) * num_layers

    def ratios(self, sigma: float) -> tuple[float, ...]:
        return self._ratios

    def scores(self, layer: int, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        raise AssertionError("a method runs its blocks itself")


class BaselineSource:
    """Makes a selector without training (``RandomSelector``, ``LargestNormSelector``) usable as a source."""

    first_layer = 1

    def __init__(self, selector, num_layers: int):
        self.selector = selector
        self._ratios = (1.0,) + (selector.ratio,) * (num_layers - 1)

    def ratios(self, sigma: float) -> tuple[float, ...]:
        return self._ratios

    def scores(self, layer: int, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        with torch.no_grad():
            return self.selector.scores(layer, x, sigma)


def write_folder(folder: str | os.PathLike, config: dict, tensors: dict[str, Tensor], adapter: Path | None) -> Path:
    """Write an artefact's files; config and weights appear whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if adapter is not None and Path(adapter).resolve() != (folder / ADAPTER_NAME).resolve():
        shutil.copytree(adapter, folder / ADAPTER_NAME, dirs_exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / (WEIGHTS_NAME + ".tmp"))
    (folder / (CONFIG_NAME + ".tmp")).write_text(json.dumps(config, indent=1))
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        os.replace(folder / (name + ".tmp"), folder / name)
    return folder


def load(source: str | os.PathLike) -> "ShivaArtifact | MethodArtifact":
    """Read an artefact from a folder or the hub; see :meth:`ShivaArtifact.load`.

    Returns:
        a :class:`ShivaArtifact`, or the :class:`~shiva_ext.method_artifact.MethodArtifact` of another trained method.
    """
    from .method_artifact import MethodArtifact

    folder = Path(source)
    if not folder.exists():
        folder = _download(str(source))
    if not (folder / CONFIG_NAME).is_file() or not (folder / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(
            f"shiva_ext: {folder} is not a Shiva artefact: it lacks {CONFIG_NAME} or {WEIGHTS_NAME}"
        )
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        tensors = load_file(folder / WEIGHTS_NAME)
        number = config["format"]
        if number == 1:
            kind = MethodArtifact if "method" in config else ShivaArtifact
            return kind._read(config, tensors, folder)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"shiva_ext: the artefact in {folder} is damaged ({type(error).__name__}: {error}); download or train "
            "it again"
        ) from error
    raise ValueError(f"shiva_ext: {folder} has artefact format {number!r}, this version reads 1; update shiva_ext")


def save(artifact: "ShivaArtifact | MethodArtifact", folder: str | os.PathLike) -> Path:
    """Write an artefact as a folder; see :meth:`ShivaArtifact.save`."""
    return artifact.save(folder)
