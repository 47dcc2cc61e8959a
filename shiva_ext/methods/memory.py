"""What a method carries from one step of a run to the next, and when it must be forgotten."""

from collections.abc import Iterator
from dataclasses import is_dataclass

from torch import Tensor

_CALLS_A_STEP = 2  # guidance in two calls


class RunMemory:
    """State of one run of a sampler: it is empty again when a new run begins.

    A run's noise levels fall: a call at a higher level begins a new one. Calls with another batch, size, dtype or
    device have a memory of their own (skip-layer guidance makes such calls between the others). So have the two calls
    of guidance in two calls, which come at one level; a third one there begins a new run.

    Attributes:
        step: steps of this run that are done, 0 in its first.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new run begins."""
        self.step, self._sigma = 0, None
        self._calls: dict[tuple, int] = {}  # at this level, by signature
        self._values: dict[tuple, dict] = {}
        self._now: dict = {}

    def begin(self, sigma: float, x: Tensor, repeated: bool = False) -> None:
        """A call of the transformer at noise level sigma on latents x begins.

        Args:
            repeated: further calls at a level are of the same kind: a solver that evaluates it twice, such as Heun's.
        """
        signature = (x.shape, x.dtype, x.device)
        if self._sigma is not None and sigma < self._sigma:
            self.step, self._calls = self.step + 1, {}
        elif self._sigma is not None and sigma > self._sigma:
            self.reset()
        call = 0 if repeated else self._calls.get(signature, 0)
        if call == _CALLS_A_STEP:
            self.reset()
            call = 0
        self._sigma, self._calls[signature] = sigma, call + 1
        self._now = self._values.setdefault((signature, call), {})

    def get(self, *key):
        """What was stored under a key, or None."""
        return self._now.get(key)

    def set(self, *key, value) -> None:
        """Store a value under a key until it is replaced or the run ends."""
        self._now[key] = value

    @property
    def bytes(self) -> int:
        """Memory that the stored tensors take."""
        tensors = (t for values in self._values.values() for v in values.values() for t in _tensors(v))
        return sum(t.numel() * t.element_size() for t in tensors)


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from _tensors(each)
    elif is_dataclass(value):
        yield from _tensors(tuple(vars(value).values()))
