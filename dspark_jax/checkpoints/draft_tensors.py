"""A drafter's tensors as others store them, turned into those of the reference layout.

Names lose the prefixes of modules around a drafter. A reduced draft vocabulary becomes sorted
target ids: ``d2t`` holds offsets (target id = place + d2t[place]) or the ids themselves, in any
order, and ``t2d`` marks the same tokens in a mask over the target's vocabulary.
"""

from __future__ import annotations

import re

import numpy as np

from dspark_jax.checkpoints.tensors import LoadError, Tensors

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
D2T, T2D = "d2t", "t2d"
MEDUSA = re.compile(r"\d+\.\d+\.weight")  # LM heads of their own
W2 = "markov_head.markov_w2.weight"
# Copies of the target's weights that older files carry for training.
VERIFIER_TENSORS = ("verifier_lm_head.weight", "verifier_norm.weight")

# Prefixes of modules around a drafter, and other names of its parts.
PREFIX = re.compile(r"(?:_orig_mod|module|model|drafter|draft_model|draft|dspark|dflash)\.")
NAMES = (
    (re.compile(r"midlayer\."), "layers.0."),
    (re.compile(r"markov_w([12])\.weight"), r"markov_head.markov_w\1.weight"),
    (re.compile(r"markov_head\.w([12])\.weight"), r"markov_head.markov_w\1.weight"),
    (re.compile(r"confidence_(?:proj|head)\.(weight|bias)"), r"confidence_head.proj.\1"),
)


def plain_names(tensors: Tensors) -> Tensors:
    """A drafter's tensors under the names of the reference layout.

    Raises:
        LoadError: two tensors have the same name there.
    """
    names: dict[str, str] = {}
    for old in tensors.shapes:
        name = old
        while found := PREFIX.match(name):
            name = name[found.end() :]
        for pattern, plain in NAMES:
            if found := pattern.match(name):
                name = found.expand(plain) + name[found.end() :]
                break
        if name in VERIFIER_TENSORS:
            continue
        if name in names:
            raise LoadError(f"{tensors.origin}: {names[name]} and {old} are both {name}: keep one")
        names[name] = old
    shapes = {name: tensors.shapes[old] for name, old in names.items()}
    return Tensors(tensors.origin, shapes, lambda name: tensors.read(names[name]))


def draft_vocabulary(
    tensors: Tensors, size: int | None, vocab_size: int
) -> tuple[np.ndarray | None, Tensors]:
    """The target ids of a reduced draft vocabulary, and the tensors in the order of these ids.

    Args:
        tensors: under the names of the reference layout.
        size: ``draft_vocab_size``; None where the configuration names none.
        vocab_size: of the target.

    Returns:
        Sorted int32 ids, None for the whole vocabulary; the other tensors, whose rows are sorted
        like the ids where a file has them in another order.

    Raises:
        LoadError: there is no table, or none that can be understood.
    """
    rest = tensors.without(D2T, T2D)
    if not {D2T, T2D} & tensors.shapes.keys():
        if size is not None:
            raise LoadError(f"{tensors.origin}: draft_vocab_size is {size}, but {D2T} is missing")
        return None, rest
    id_U = _table(tensors, vocab_size)
    if len(id_U) != (size or len(id_U)):
        raise LoadError(
            f"{tensors.origin}: the table of draft tokens ({D2T}, {T2D}) has {len(id_U)}, but "
            f"draft_vocab_size is {size}"
        )
    order_U = np.argsort(id_U)
    if len(id_U) == vocab_size and (order_U == np.arange(vocab_size)).all():
        return None, rest
    if (order_U == np.arange(len(id_U))).all():
        return id_U.astype(np.int32), rest

    def read(name: str) -> np.ndarray:
        value = rest.read(name)
        by_draft = (name in (W2, HEAD) or MEDUSA.fullmatch(name)) and len(value) == len(id_U)
        return np.asarray(value[order_U] if by_draft else value)

    return id_U[order_U].astype(np.int32), Tensors(rest.origin, rest.shapes, read)


def _table(tensors: Tensors, vocab_size: int) -> np.ndarray:
    """The target ids of the draft vocabulary by place, int64."""
    marked = None
    if T2D in tensors.shapes:
        mask_V = tensors.read(T2D)
        marked = np.flatnonzero(mask_V)
        fits = mask_V.ndim == 1 and np.isin(mask_V, (0, 1)).all() and len(marked)
        if not fits or marked[-1] >= vocab_size:
            raise LoadError(
                f"{tensors.origin}: {T2D} has shape {list(mask_V.shape)} and dtype {mask_V.dtype}: "
                f"it must mark some of the {vocab_size} tokens with true or false"
            )
    if D2T not in tensors.shapes:
        assert marked is not None
        return marked
    said = tensors.read(D2T)
    if said.ndim != 1 or said.dtype.kind != "i":
        raise LoadError(
            f"{tensors.origin}: {D2T} has dtype {said.dtype} and shape {list(said.shape)}: it must "
            "be a list of int32 or int64"
        )
    own = said.dtype == np.int32  # files of this package hold ids
    said = said.astype(np.int64)
    inside = len(said) and said.min() >= 0 and said.max() < vocab_size
    shifted = said + np.arange(len(said)) if inside else said
    readings = []
    if inside and shifted[-1] < vocab_size and (np.diff(shifted) > 0).all():
        readings.append(shifted)
    if inside and len(np.unique(said)) == len(said):
        readings.append(said)
    if not readings:
        raise LoadError(
            f"{tensors.origin}: {D2T} must hold different ids below the vocab_size {vocab_size}, "
            "or offsets, such that place + offset are increasing ids below it"
        )
    if marked is not None:
        readings = [ids for ids in readings if np.array_equal(np.sort(ids), marked)]
        if not readings:
            raise LoadError(f"{tensors.origin}: {T2D} marks other tokens than {D2T}")
    elif len(readings) > 1 and own:
        readings.reverse()
    elif len(readings) > 1 and said.any():
        raise LoadError(
            f"{tensors.origin}: {D2T} may hold offsets or ids, both make a table, and there is no "
            f"{T2D} to decide: add it, or store ids as int32"
        )
    return readings[0]
