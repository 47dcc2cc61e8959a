"""Going on from an artefact instead of from fresh weights."""

from dataclasses import asdict

from peft import LoraConfig

from shiva_ext.artifact import ShivaArtifact

from .config import TrainConfig


def load_start(config: TrainConfig, fresh: ShivaArtifact) -> ShivaArtifact:
    """Read ``config.start_from`` and put its router and policy into those of a fresh artefact.

    Args:
        config: the settings of the run.
        fresh: what the run would begin with; its router and policy are written to.

    Returns:
        the artefact that was read; its adapters are loaded once the run has some, see :func:`adapter_weights.load`.

    Raises:
        FileNotFoundError: there is no such artefact.
        ValueError: it is damaged, or of another kind than the run would make.
    """
    start = ShivaArtifact.load(config.start_from)
    differences = []
    if start.model_class != fresh.model_class:
        differences.append(f"model class {start.model_class} (the run's is {fresh.model_class})")
    parts = ("router",) if fresh.policy is None else ("router", "policy")  # a measured schedule has no policy
    for name in parts:
        found, wanted = getattr(start, name), getattr(fresh, name)
        found = {} if found is None else asdict(found.config)
        for key, value in asdict(wanted.config).items():
            # The target only sets where a fresh policy begins.
            if (name, key) != ("policy", "target") and found.get(key) != value:
                differences.append(f"{name}.{key} {found.get(key)} (the run's is {value})")
    rank = 0 if start.adapter is None else LoraConfig.from_pretrained(str(start.adapter)).r
    if rank not in (0, config.adapter_rank):
        differences.append(f"adapter_rank {rank} (the run's is {config.adapter_rank})")
    if differences:
        raise ValueError(
            f"shiva_ext: cannot start from {config.start_from}: it has {', '.join(differences)}; change the settings, "
            "or start afresh"
        )
    for name in parts:
        getattr(fresh, name).load_state_dict(getattr(start, name).state_dict())
    return start
