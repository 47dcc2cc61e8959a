"""Every other method behind :func:`shiva_ext.enable`; its docstring says what was read and what had to be inferred."""

from .base import Method
from .ibtm import IBTM
from .sdtm import SDTM
from .tofu import ToFu
from .toma import ToMA
from .tomesd import ToMeSD

METHODS: dict[str, type[Method]] = {cls.__name__.lower(): cls for cls in (ToMeSD, ToFu, SDTM, ToMA, IBTM)}

__all__ = ["METHODS", "IBTM", "Method", "SDTM", "ToFu", "ToMA", "ToMeSD"]
