"""CAF's sampler as a diffusers scheduler."""

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from .flow import TIMESTEPS
from .flow import timestep as timestep_at


def check_h(name: str, h: float) -> None:
    """Raise ValueError unless 0 < h <= 2: beyond, a path's noise level does not fall all the way."""
    if not 0 < h <= 2:
        raise ValueError(f"{name}: h is {h}, wanted a number above 0 and at most 2; the paper's are 0.5 to 2")


class CAFScheduler(SchedulerMixin, ConfigMixin):
    """N steps along a path of initial velocity and constant acceleration: CAF (arXiv 2411.00322), algorithms 2 and 3.

    A step from t = i / N is ``x + v0 / N + t' / N a(x, t, v0)`` with t' = (2 i + 1) / (2 N), the middle of the step, so
    that it is exact where v0 and a are constant. :meth:`invert_step` is its reverse. Times are the paper's (0 is
    noise); timesteps are what the networks are told, the path's noise level there times 1000, see
    :func:`~shiva_ext.caf.flow.noise_level`. No state is kept from step to step.

    Args:
        h: of the path that the networks were trained on, see :func:`~shiva_ext.caf.flow.initial_velocity`.
        clip_sample: clamp the last step's result to [-1, 1], as the published code does. Off by default: it has no
            meaning for latents and breaks inversion.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, h: float = 1.5, clip_sample: bool = False):
        check_h("CAFScheduler", h)
        self.num_inference_steps: int | None = None
        self._inverse = False
        self.timesteps = torch.empty(0)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, inverse: bool = False
    ) -> None:
        """Choose N. The timesteps are those of t = i / N for i = 0 .. N - 1, or, ``inverse``, for i = N .. 1.

        Raises:
            ValueError: N is not a positive integer.
        """
        N = num_inference_steps
        if isinstance(N, bool) or not isinstance(N, int) or N < 1:
            raise ValueError(f"CAFScheduler: num_inference_steps is {N!r}, wanted an integer of at least 1")
        i = torch.arange(N, 0, -1) if inverse else torch.arange(N)
        self.num_inference_steps, self._inverse = N, inverse
        self.timesteps = timestep_at(i.double() / N, self.config.h).float().to(device)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample as it is."""
        return sample

    def time(self, timestep: float | Tensor) -> float:
        """t in [0, 1] of one of :attr:`timesteps`."""
        return self._index(timestep, self._inverse) / self.num_inference_steps

    def _index(self, timestep: float | Tensor, inverse: bool) -> int:
        """i, where t = i / N."""
        N = self.num_inference_steps
        if N is None or self._inverse != inverse:
            wanted = "num_inference_steps, inverse=True" if inverse else "num_inference_steps"
            raise ValueError(f"CAFScheduler: call set_timesteps({wanted}) before the first step")
        distance, position = (self.timesteps.cpu() - float(timestep)).abs().min(dim=0)
        if not distance <= 1e-3:
            raise ValueError(
                f"CAFScheduler: the timestep is {float(timestep):g}, wanted one of the {N} in its timesteps, such as "
                f"{float(self.timesteps[0]):g}"
            )
        return N - int(position) if inverse else int(position)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        initial_velocity: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """From t = i / N to (i + 1) / N.

        Args:
            model_output: the acceleration at this timestep, [B, ...].
            timestep: one of :attr:`timesteps`.
            sample: x there, [B, ...].
            initial_velocity: v0, the same in all steps, [B, ...].
            return_dict: False gives a tuple.

        Raises:
            ValueError: shapes differ, or the timestep is none of the scheduler's.
        """
        i, N = self._index(timestep, inverse=False), self.num_inference_steps
        self._check(model_output, sample, initial_velocity)
        after = sample + initial_velocity / N + (2 * i + 1) / (2 * N) / N * model_output
        if self.config.clip_sample and i == N - 1:
            after = after.clamp(-1, 1)
        return SchedulerOutput(prev_sample=after) if return_dict else (after,)

    def invert_step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        initial_velocity: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """From t = i / N back to (i - 1) / N; arguments as :meth:`step`, after ``set_timesteps(N, inverse=True)``."""
        i, N = self._index(timestep, inverse=True), self.num_inference_steps
        self._check(model_output, sample, initial_velocity)
        before = sample - initial_velocity / N - (2 * i - 1) / (2 * N) / N * model_output
        return SchedulerOutput(prev_sample=before) if return_dict else (before,)

    def _check(self, model_output: Tensor, sample: Tensor, initial_velocity: Tensor) -> None:
        if not model_output.shape == sample.shape == initial_velocity.shape:
            raise ValueError(
                "CAFScheduler: acceleration, sample and initial velocity must have one shape, got "
                f"{list(model_output.shape)}, {list(sample.shape)} and {list(initial_velocity.shape)}"
            )

    def __len__(self) -> int:
        return TIMESTEPS
