"""Self-attention at constant cost per token, for NumPy, PyTorch and transformers.

``sata.attention`` stands where ``scaled_dot_product_attention`` stood; ``sata.State`` is a past of
fixed size instead of a KV cache; ``sata.torch`` has a layer, ``sata.transformers`` an attention for
Hugging Face models, ``sata.inspect`` says what a model's own queries and keys would lose.

The words are those of the Rust library: *terms* of a *series* for what is far, *near* blocks and
*sinks* that stay exact, decay by *slopes* (ALiBi) or *gates* (forget gates).
"""

import os as _os

from ._call import attention
from ._cost import cost
from ._inspect import Inspection, inspect
from ._native import (
    Diagnostics,
    HeadDiagnostics,
    Spec,
    __version__,
    alibi_slopes,
    get_num_threads,
    set_num_threads,
    simd_level,
)
from ._native import after_fork as _after_fork
from ._state import State
from ._tensors import DenominatorWarning

__all__ = [
    "DenominatorWarning",
    "Diagnostics",
    "HeadDiagnostics",
    "Inspection",
    "Spec",
    "State",
    "__version__",
    "alibi_slopes",
    "attention",
    "cost",
    "get_num_threads",
    "inspect",
    "set_num_threads",
    "simd_level",
]

# A forked process has none of its parent's threads.
if hasattr(_os, "register_at_fork"):
    _os.register_at_fork(after_in_child=_after_fork)
