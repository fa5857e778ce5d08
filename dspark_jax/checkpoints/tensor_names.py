"""Checkpoints under other names, and with other cuts, than they have in their files."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable

import numpy as np

from dspark_jax.checkpoints.tensors import Tensors


def text_part(tensors: Tensors) -> Tensors:
    """The language model of a checkpoint that has others beside it, under the names of one that
    has none: ``model.language_model.x`` and ``language_model.model.x`` are ``model.x``; some call
    it ``text_model``, and a model that is saved without its head leaves out ``model``."""
    names = {}
    for name in tensors.shapes:
        found = re.fullmatch(
            r"(?:model\.)?(?:language|text)_model\.(?:(lm_head\..*)|(?:model\.)?(.*))", name
        )
        if found:
            names[found[1] or f"model.{found[2]}"] = name
    if not names and "embed_tokens.weight" in tensors.shapes:  # saved without its head
        names = {f"model.{name}": name for name in tensors.shapes if name != "lm_head.weight"}
    if not names:
        return tensors
    if "lm_head.weight" in tensors.shapes:
        names.setdefault("lm_head.weight", "lm_head.weight")
    shapes = {name: tensors.shapes[old] for name, old in names.items()}
    return Tensors(tensors.origin, shapes, lambda name: tensors.read(names[name]))


def renamed(tensors: Tensors, declared_name: Callable[[str], str | None]) -> Tensors:
    """A checkpoint under the names of a declaration, without what has none."""
    names = {declared_name(name): name for name in tensors.shapes}
    shapes = {new: tensors.shapes[old] for new, old in names.items() if new is not None}
    return Tensors(tensors.origin, shapes, lambda name: tensors.read(names[name]))


def split_experts(tensors: Tensors) -> Tensors:
    """A checkpoint that has all experts of a layer in one tensor, as one with a tensor for each.

    ``x.experts.gate_up_proj`` [E, 2 M, D] holds the gates' rows first; it may come as two.
    ``x.experts.down_proj`` is [E, D, M].
    """
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, tuple[str, int, slice]] = {}
    for name, shape in tensors.shapes.items():
        found = re.fullmatch(r"(.*\.experts)\.(\w+_proj)(?:\.weight)?", name)
        if not found or len(shape) != 3:
            shapes[name] = shape
            continue
        experts, rows, width = shape
        half = rows // 2
        parts = {"gate_proj": slice(0, half), "up_proj": slice(half, rows)}
        if found[2] != "gate_up_proj":
            parts = {found[2]: slice(0, rows)}
        for expert, (part, cut) in itertools.product(range(experts), parts.items()):
            one = f"{found[1]}.{expert}.{part}.weight"
            shapes[one] = (len(range(rows)[cut]), width)
            places[one] = (name, expert, cut)

    # The experts of a tensor are read one after the other.
    read_whole = functools.lru_cache(maxsize=1)(tensors.read)

    def read(name: str) -> np.ndarray:
        if name not in places:
            return tensors.read(name)
        whole, expert, cut = places[name]
        return read_whole(whole)[expert, cut]

    return Tensors(tensors.origin, shapes, read) if places else tensors
