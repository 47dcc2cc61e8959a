"""CAF's sampler as a diffusers scheduler."""

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor


class CAFScheduler(SchedulerMixin, ConfigMixin):
    """N steps along a path of initial velocity and constant acceleration: CAF (arXiv 2411.00322), algorithms 2 and 3.

    A step from t = i / N is ``x + v0 / N + t' / N a(x, t, v0)`` with t' = (2 i + 1) / (2 N), the middle of the step, so
    that it is exact where v0 and a are constant. :meth:`invert_step` is its reverse. Times are the paper's (0 is
    noise), timesteps diffusers' (1000 is noise). The scheduler keeps no state between steps.

    Args:
        num_train_timesteps: timestep of pure noise.
        clip_sample: clamp the last step's result to [-1, 1], as the published code does. Off by default: it has no
            meaning for latents and breaks inversion.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, clip_sample: bool = False):
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, inverse: bool = False
    ) -> None:
        """Choose N. The timesteps are 1000 (1 - i / N) for i = 0 .. N - 1, or, ``inverse``, for i = N .. 1.

        Raises:
            ValueError: N is not a positive integer.
        """
        N = num_inference_steps
        if isinstance(N, bool) or not isinstance(N, int) or N < 1:
            raise ValueError(f"CAFScheduler: num_inference_steps is {N!r}, wanted an integer of at least 1")
        i = torch.arange(N, 0, -1) if inverse else torch.arange(N)
        self.num_inference_steps = N
        self.timesteps = (self.config.num_train_timesteps * (1 - i.double() / N)).float().to(device)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample as it is."""
        return sample

    def time(self, timestep: float | Tensor) -> float:
        """t in [0, 1] of a timestep."""
        return 1 - float(timestep) / self.config.num_train_timesteps

    def _index(self, timestep: float | Tensor, first: int) -> tuple[int, int]:
        """i and N, where t = i / N; first <= i < first + N."""
        if self.num_inference_steps is None:
            raise ValueError("CAFScheduler: call set_timesteps(num_inference_steps) before the first step")
        N = self.num_inference_steps
        i = round(self.time(timestep) * N)
        if abs(self.time(timestep) * N - i) > 1e-3 or not first <= i < first + N:
            raise ValueError(
                f"CAFScheduler: the timestep is {float(timestep):g}, wanted one of the scheduler's, "
                f"{[round(float(each), 3) for each in self.timesteps]}"
            )
        return i, N

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
        i, N = self._index(timestep, first=0)
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
        i, N = self._index(timestep, first=1)
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
        return self.config.num_train_timesteps
