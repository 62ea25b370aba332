"""The eight adapter kinds of the native trainer, and their tensors per layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One adapter kind: the tensors of a layer, the axes whose norms it sets, and the use of SVD bases (-xs)."""

    name: str
    tensors: tuple[str, ...]
    rows: bool  # the norm of every row is set by a magnitude (out,)
    columns: bool  # the norm of every column is set by a magnitude (in,)
    svd: bool  # the low-rank change is U M V^T with U, V of the base weight; else B A


def _kind(name: str, magnitudes: tuple[str, ...], rows: bool = False, columns: bool = False) -> tuple[Kind, Kind]:
    return (
        Kind(name, ("lora_A", "lora_B", *magnitudes), rows, columns, svd=False),
        Kind(f"{name}-xs", ("M_xs", *magnitudes), rows, columns, svd=True),
    )


KINDS: dict[str, Kind] = {
    kind.name: kind
    for pair in (
        _kind("lora", ()),
        _kind("dora-rows", ("magnitude",), rows=True),
        _kind("dora-cols", ("magnitude",), columns=True),
        _kind("bora", ("magnitude_r", "magnitude_c"), rows=True, columns=True),
    )
    for kind in pair
}
TENSORS = ("lora_A", "lora_B", "M_xs", "magnitude", "magnitude_r", "magnitude_c", "U", "V")
OWN_BASES = ("U", "V")  # optional tensors of the -xs kinds: in full state dicts, not in the trainer's files
# Norms stored for programs without access to the base weights; not needed here.
BAKED_NORMS = ("baked_vnorm_row", "baked_vnorm_col")
