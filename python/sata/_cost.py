"""What an attention costs."""

from __future__ import annotations

from typing import Any

from ._native import Spec
from ._tensors import hashable_series, make_spec


def cost(
    d_key: int | Spec,
    d_value: int | None = None,
    *,
    terms: int = 4,
    series: Any = "taylor",
) -> dict[str, int]:
    """Sizes and FLOPs of one head, whatever the length of the text.

    Args:
        d_key: Elements of a key; or a ``Spec``, which says it all.
        d_value: Elements of a value; as many where it is None.
        terms: How many terms.
        series: Which series, as for ``sata.attention``.

    Returns:
        ``features`` (D), ``state_elements`` (D*(d_value+1)), ``state_bytes`` (float32 far sums with
        their compensation), ``state_bytes_f64``, ``flops`` (4*D*(d_value+1) per token),
        ``paper_flops`` and ``corrected_flops`` (the paper's count, and the same without its two
        extra operations per feature), ``softmax_flops_per_key``, ``cache_elements_per_token``, and
        the lengths from which the state takes less memory (``break_even_memory_tokens``) and a step
        fewer operations (``break_even_flops_tokens``) than a KV cache.

    Raises:
        ValueError: Sizes that no spec has.
    """
    if not isinstance(d_key, Spec):
        series = hashable_series(series)
        d_key = make_spec(
            d_key, d_key if d_value is None else d_value, terms, series, 0, 64, 0, None, None
        )
    return d_key.cost()
