"""A pytest plugin, ``-p tests.sanitized``: the C++ backend is the one that `make sanitize` has built in ``RLAD_SANITIZED``."""

from __future__ import annotations

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch

assert torch  # whose library the backend is linked against
(BUILT,) = Path(os.environ["RLAD_SANITIZED"]).rglob("_C*.so")
_spec = spec_from_file_location("rlad_kernels._C", BUILT)
assert _spec is not None
sys.modules["rlad_kernels._C"] = module_from_spec(_spec)  # before the package looks for it
