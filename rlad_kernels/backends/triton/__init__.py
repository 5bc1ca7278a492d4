"""Triton backend: a file an operation, with its kernel and all that is known of it. Imported only when an operation first runs.

Every file here is imported, so that a kernel exists because its file does.
"""

from importlib import import_module
from pkgutil import iter_modules

from ._kernel import KERNELS

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)

LAUNCHERS = {kernel.launcher.__name__: kernel.launcher for kernel in KERNELS.values()}
