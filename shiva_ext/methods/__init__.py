"""Every other method behind :func:`shiva_ext.enable`; its docstring says what was read and what had to be inferred."""

from .base import Method
from .diffcr import DiffCR
from .dydit import DyDiT
from .ibtm import IBTM
from .sdtm import SDTM
from .sparsedit import SparseDiT
from .tofu import ToFu
from .toma import ToMA
from .tomesd import ToMeSD
from .trained import TrainedMethod

METHODS: dict[str, type[Method]] = {cls.__name__.lower(): cls for cls in (ToMeSD, ToFu, SDTM, ToMA, IBTM)}
# These have weights of their own: they are trained, see shiva_ext.training, and enabled from a folder.
TRAINED: dict[str, type[TrainedMethod]] = {cls.__name__.lower(): cls for cls in (DiffCR, DyDiT, SparseDiT)}

__all__ = [
    "METHODS",
    "TRAINED",
    "DiffCR",
    "DyDiT",
    "IBTM",
    "Method",
    "SDTM",
    "SparseDiT",
    "ToFu",
    "ToMA",
    "ToMeSD",
    "TrainedMethod",
]
