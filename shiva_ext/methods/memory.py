"""What a method carries from one step of a run to the next, and when it must be forgotten."""

from torch import Tensor

_CALLS_A_STEP = 2  # guidance in two calls


class RunMemory:
    """State of one run of a sampler: it is empty again when a new run begins.

    A run's noise levels fall. A call at a higher level, with another batch, size, dtype or device, or a third call at
    one level begins a new run. Two calls at one level are guidance in two calls: each has a memory of its own.

    Attributes:
        step: steps of this run that are done, 0 in its first.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new run begins."""
        self.step, self._call, self._sigma, self._signature = 0, 0, None, None
        self._values: tuple[dict, ...] = tuple({} for _ in range(_CALLS_A_STEP))

    def begin(self, sigma: float, x: Tensor) -> None:
        """A call of the transformer at noise level sigma on latents x begins."""
        signature = (x.shape, x.dtype, x.device)
        new = self._sigma is None or sigma > self._sigma or signature != self._signature
        if not new and sigma == self._sigma:
            self._call += 1
            new = self._call == _CALLS_A_STEP
        elif not new:
            self.step, self._call = self.step + 1, 0
        if new:
            self.reset()
        self._sigma, self._signature = sigma, signature

    def get(self, *key):
        """What was stored under a key, or None."""
        return self._values[self._call].get(key)

    def set(self, *key, value) -> None:
        """Store a value under a key until it is replaced or the run ends."""
        self._values[self._call][key] = value

    @property
    def bytes(self) -> int:
        """Memory that the stored tensors take."""
        tensors = [v for values in self._values for v in values.values() if isinstance(v, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)
