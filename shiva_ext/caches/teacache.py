"""TeaCache: a step whose input has hardly changed takes what the blocks added in the last step that ran them."""

import math
import warnings
from dataclasses import dataclass, field

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from ..hooks import with_weights
from ..selection_state import odd_batch
from .base import Cache, block_passing
from .fit import Fit
from .published import BY_CLASS, coefficients_of
from .state import CacheState


@dataclass(frozen=True)
class TeaCache(Cache):
    """TeaCache (arXiv 2411.19108, eq. 4, 6, 7; code github.com/ali-vilab/TeaCache).

    The first block's normalised and modulated input tells how much a step differs from the one before:
    mean |m - m'| / mean |m'|. A polynomial rescales that to the expected change of the output, and the sum over steps
    is compared with a threshold. Below it all blocks are skipped and the last computed difference between their output
    and input is added again; the head runs on the current step. At the threshold the blocks run and the sum restarts.

    Every image decides for itself, its two halves of guidance together: what else is in the batch changes nothing.
    Where images disagree, the blocks run on those that want it. Guidance in two calls has a memory for each.

    Attributes:
        threshold: of the sum; 0 skips nothing as long as the polynomial is positive.
        coefficients: of the polynomial, highest power first; or the name of published ones, or "identity". By default
            those that were published for the model's class; most have none.
        bounds: the changes that the polynomial was fitted to; others are moved to the nearest bound, as a polynomial
            means nothing outside. By default not, as published.
        first, last: steps at the beginning and end of a run that are computed whatever the sum; as published 1 and 1.
        steps: of a run, see :class:`Cache`.
        static: where images disagree, run the blocks on the whole batch, and use the result of those that wanted it
            alone. Shapes then never change; the images are the same.
        fit: what the coefficients were fitted to, if known: another model or scheduler is refused.

    One call stores two tensors [B,N,D] (the modulated input and the difference).
    """

    threshold: float
    coefficients: tuple[float, ...] | str | None = None
    bounds: tuple[float, float] | None = None
    first: int = 1
    last: int = 1
    steps: int | None = None
    static: bool = False
    fit: Fit | None = field(default=None, repr=False)

    def __post_init__(self):
        if not self.threshold >= 0:
            raise ValueError(f"TeaCache: threshold is {self.threshold}, wanted at least 0")
        if isinstance(self.coefficients, str):
            coefficients_of(self.coefficients)
        elif self.coefficients is not None:
            numbers = tuple(float(each) for each in self.coefficients)
            if not numbers or not all(map(math.isfinite, numbers)):
                raise ValueError(f"TeaCache: coefficients are {self.coefficients}, wanted finite numbers")
            object.__setattr__(self, "coefficients", numbers)
        if self.bounds is not None and not 0 <= self.bounds[0] <= self.bounds[1]:
            raise ValueError(f"TeaCache: bounds are {self.bounds}, wanted 0 <= low <= high")
        if self.first < 1 or self.last < 0:
            raise ValueError(
                f"TeaCache: first is {self.first} and last {self.last}, wanted at least 1 and 0: the first step has "
                "nothing to take from"
            )

    def polynomial(self, transformer: nn.Module) -> tuple[float, ...]:
        """The coefficients for a model.

        Raises:
            ValueError: none were given, and none published for its class.
        """
        if isinstance(self.coefficients, tuple):
            return self.coefficients
        known = [BY_CLASS[cls.__name__] for cls in type(transformer).__mro__ if cls.__name__ in BY_CLASS]
        if self.coefficients is None and not known:
            raise ValueError(
                f"shiva_ext: no coefficients were published for {type(transformer).__name__}; fit them with `shiva "
                "calibrate teacache` and enable what it writes, or give TeaCache(..., coefficients='identity') and "
                "find a threshold for that"
            )
        return coefficients_of(self.coefficients or known[0])

    def expected(self, polynomial: tuple[float, ...], change: float) -> float:
        """The output's expected change at a change of the indicator."""
        if self.bounds is not None:
            change = min(max(change, self.bounds[0]), self.bounds[1])
        value = 0.0
        for coefficient in polynomial:
            value = value * change + coefficient
        return value

    def attach(self, transformer: nn.Module, state: CacheState) -> list[tuple[nn.Module, ModelHook]]:
        if self.fit is not None:
            self.fit.check_model(transformer)
        shared = Stack(self, self.polynomial(transformer), state)
        blocks = state.adapter.blocks(transformer)
        state.stores.append(shared.values)
        return [(block, StackHook(shared, i, i == len(blocks) - 1)) for i, block in enumerate(blocks)]

    def check_scheduler(self, scheduler) -> None:
        if self.fit is not None:
            self.fit.check_scheduler(scheduler)

    def begin_step(self, step: int, steps: int) -> tuple:
        if self.fit is not None and steps != self.fit.steps and step == 0:
            warnings.warn(
                f"shiva_ext: TeaCache was calibrated with runs of {self.fit.steps} steps, this one has {steps}; the "
                "threshold will lead to another share of reused steps",
                stacklevel=2,
            )
        return ()

    def check_selection(self, selection) -> None:
        if selection.stateful is not None:
            raise ValueError(
                f"shiva_ext: {selection.stateful} carries tensors from step to step for the whole batch, and TeaCache "
                "lets each image skip steps by itself; use SmoothCache or FORA, whose steps are the same for all"
            )

    def memory_bound(self, layers: int, B: int, N: int, T: int, D: int) -> int:
        return 2 * B * N * D


class Stack:
    """One call's decision, shared by the hooks of all blocks."""

    def __init__(self, cache: TeaCache, polynomial: tuple[float, ...], state: CacheState):
        self.cache, self.polynomial, self.state = cache, polynomial, state
        self.values: dict[tuple, dict] = {}  # by the call's key
        self.rows: Tensor | None = None
        self.entry: Tensor | None = None

    def decide(self, block: nn.Module, x: Tensor, arguments: dict) -> None:
        """Which images [B] compute this step: ``rows`` None for all, empty for none, else their indices."""
        state, cache = self.state, self.cache
        mine = self.values.setdefault(state.key, {})
        with torch.no_grad():
            m = state.adapter.modulated_input(block, x, arguments)
        m, before = m.detach(), mine.get("indicator")
        mine["indicator"] = m  # also on steps that are skipped
        self.entry, images = x, self.images(x)
        if before is None:
            wanted = [True] * images
            mine["sum"] = [0.0] * images
        else:
            wanted = self._compare(m, before, images, mine["sum"])
        begun = mine.setdefault("begun", state.step)  # an image to start from leaves out the first levels
        forced = state.step - begun < cache.first or state.step >= state.steps - cache.last or "added" not in mine
        if forced:
            wanted = [True] * images
        mine["sum"] = [0.0 if computes else total for computes, total in zip(wanted, mine["sum"], strict=True)]
        state.computed += sum(wanted)
        state.reused += images - sum(wanted)
        if all(wanted):
            self.rows = None
        else:
            chosen = [image for image, computes in enumerate(wanted) if computes]
            chosen += [image + images for image in chosen] if state.guided else []
            self.rows = torch.tensor(chosen, dtype=torch.int64, device=x.device)

    def images(self, x: Tensor) -> int:
        """How many images a batch has: with guidance in the batch, half as many as samples."""
        if not self.state.guided:
            return len(x)
        if len(x) % 2:
            raise ValueError(f"shiva_ext: {odd_batch(len(x))}")
        return len(x) // 2

    @staticmethod
    def changes(now: Tensor, before: Tensor, images: int) -> list[float]:
        """Of each image: mean |now - before| / mean |before|, over both of its halves of guidance."""
        sizes = [
            each.abs().flatten(1).mean(1, dtype=torch.float32).view(-1, images).mean(0)
            for each in (now.float() - before.float(), before)
        ]
        return (sizes[0] / sizes[1]).tolist()

    def _compare(self, m: Tensor, before: Tensor, images: int, sums: list[float]) -> list[bool]:
        """Adds each image's expected change to its sum; whether it is too much now."""
        wanted = []
        for image, change in enumerate(self.changes(m, before, images)):
            sums[image] += self.cache.expected(self.polynomial, change)
            wanted.append(not -math.inf < sums[image] < self.cache.threshold)  # NaN and infinity compute
        return wanted

    def finish(self, output: Tensor) -> Tensor:
        """What the stack gives: ``output`` [B,N,D] where it ran, else the entry and what was added the last time."""
        mine = self.values[self.state.key]
        if self.rows is None:
            mine["added"] = (output - self.entry).detach()
        elif len(self.rows) == 0:
            output = self.entry + mine["added"]
        else:
            fresh = (output - self.entry).detach()
            added = mine["added"].index_copy(0, self.rows, fresh.index_select(0, self.rows))
            reused = self.entry + added
            output, mine["added"] = reused.index_copy(0, self.rows, output.index_select(0, self.rows)), added
        self.entry = None
        return output


class StackHook(ModelHook):
    """On every block: runs it, or not, on all images or some."""

    def __init__(self, stack: Stack, index: int, is_last: bool):
        super().__init__()
        self.stack, self.index, self.is_last = stack, index, is_last

    def new_forward(self, module: nn.Module, *args, **kwargs):
        stack, forward = self.stack, self.fn_ref.original_forward
        state = stack.state
        if state.bypass:
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "shiva_ext: TeaCache looks at the image to decide whether a step runs, which a compiled transformer "
                "cannot; use SmoothCache or FORA with torch.compile"
            )
        if self.index == 0:
            args, kwargs = with_weights(module, args, kwargs)
        arguments = state.adapter.bind(forward, args, kwargs)
        x = arguments[state.adapter.image_argument]
        if self.index == 0:
            stack.decide(module, x, arguments)
        output = self._run(forward, args, kwargs, arguments, x)
        if self.is_last:
            tokens = stack.finish(state.adapter.image_tokens(output))
            output = state.adapter.with_image_tokens(output, tokens)
        return output

    def _run(self, forward, args: tuple, kwargs: dict, arguments: dict, x: Tensor):
        stack, adapter = self.stack, self.stack.state.adapter
        rows = stack.rows
        if rows is None:
            return forward(*args, **kwargs)
        if len(rows) == 0:
            return block_passing(adapter, arguments, x)
        narrowed = None if stack.cache.static else adapter.rows_of(arguments, rows)
        if narrowed is None:
            return forward(*args, **kwargs)
        selection = stack.state.selection
        if selection is None:
            found = forward(**narrowed)
        else:
            with selection.rows(rows):
                found = forward(**narrowed)
        whole = block_passing(adapter, arguments, x)
        if not isinstance(whole, tuple):
            return whole.index_copy(0, rows, found)
        pairs = zip(whole, found, strict=True)
        return tuple(None if part is None else old.index_copy(0, rows, part) for old, part in pairs)
