"""Another method that was trained for a model, as a folder like Shiva's own."""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ._library import __version__
from .artifact import ADAPTER_NAME, MethodSource, guidance_of, load, write_folder
from .methods import TRAINED, TrainedMethod
from .models import adapter_for


@dataclass
class MethodArtifact:
    """A trained method's settings, its weights, and the adapter that was tuned with them.

    :func:`shiva_ext.enable` takes it as it takes the folder it was saved in.

    Attributes:
        model_class: class of the transformer it was trained for.
        method: the settings.
        tensors: state of the method's weights.
        adapter: PEFT folder of the tuned weights, or None.
        metadata: free JSON values, such as the training settings.
    """

    model_class: str
    method: TrainedMethod
    tensors: dict[str, Tensor]
    adapter: Path | None = None
    metadata: dict = field(default_factory=dict)

    def with_settings(self, **settings) -> "MethodArtifact":
        """The same weights under other settings, such as ``shift`` of DiffCR or ``threshold`` of DyDiT.

        Raises:
            ValueError: a setting changes nothing any more: it was for the training.
        """
        idle = [name for name in settings if name in self.method.training_only]
        if idle:
            raise ValueError(
                f"shiva_ext: {idle[0]} of {type(self.method).__name__} is a setting of its training and changes "
                "nothing afterwards; train it anew for another value"
            )
        return replace(self, method=replace(self.method, **settings))

    def source(self, transformer: nn.Module) -> MethodSource:
        """What the hooks of a model work with.

        Raises:
            ValueError: it was trained for another model.
        """
        adapter = adapter_for(transformer)
        if self.model_class not in (cls.__name__ for cls in type(transformer).__mro__):
            raise ValueError(
                f"shiva_ext: the {type(self.method).__name__} artefact was trained for {self.model_class}, the model "
                f"is a {type(transformer).__name__}; enable it on that model, or train one for this"
            )
        with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and then replaced
            weights = self.method.build(adapter, transformer)
        try:
            # Assigned: what is built from the weights of an offloaded model has no values to copy into.
            weights.load_state_dict({name: value.clone() for name, value in self.tensors.items()}, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"shiva_ext: the {type(self.method).__name__} artefact was trained for a {self.model_class} of another "
                f"size ({error})"
            ) from error
        device = next(transformer.parameters()).device
        if device.type != "meta":  # weights of an offloaded model
            weights.to(device)
        weights.eval().requires_grad_(False)
        self.method.prepare(weights)
        source = MethodSource(self.method, adapter.dims(transformer)["num_layers"], weights, self.adapter)
        source.guidance = guidance_of(self.metadata)
        return source

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the artefact with its adapter folder; config and weights appear whole or not at all."""
        config = dict(
            format=1,
            shiva_ext=__version__,
            method=type(self.method).__name__.lower(),
            settings=asdict(self.method),
            model_class=self.model_class,
            adapter=self.adapter is not None,
            metadata=self.metadata,
        )
        return write_folder(folder, config, self.tensors, self.adapter)

    @classmethod
    def load(cls, source: str | os.PathLike) -> "MethodArtifact":
        """Read one, see :func:`shiva_ext.load`.

        Raises:
            ValueError: it holds Shiva's own selection.
        """
        artifact = load(source)
        if not isinstance(artifact, cls):
            raise ValueError(f"shiva_ext: {source} holds Shiva's own selection, wanted another trained method's")
        return artifact

    @classmethod
    def _read(cls, config: dict, tensors: dict[str, Tensor], folder: Path) -> "MethodArtifact":
        if config["method"] not in TRAINED:
            raise ValueError(f"method {config['method']!r}, this version knows {', '.join(TRAINED)}")
        method = TRAINED[config["method"]](**config["settings"])
        tensors = {name: torch.clone(value) for name, value in tensors.items()}
        adapter = folder / ADAPTER_NAME if config["adapter"] else None
        return cls(config["model_class"], method, tensors, adapter, config["metadata"])
