"""Layers of several kinds, stacked over the period in which they repeat.

A model of layers SSSFSSSFSS (S: sliding window, F: full attention) has two sections: two rounds of
the period SSSF, and two more of S. In a section every place of the period is a stack: all of its
layers have one shape and lie on a leading axis L, so that the rounds can be scanned. Parameters and
caches are tuples with one entry a stack.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any

MAX_PERIOD = 8


@dataclass(frozen=True)
class Stack:
    """Layers of one kind.

    Attributes:
        kind: what they have in common; hashable.
        layers: their numbers in the model.
    """

    kind: Any
    layers: range


Sections = tuple[tuple[Stack, ...], ...]


@dataclass(frozen=True)
class Place:
    """Where a layer is.

    Attributes:
        kind: of its stack.
        stack: number of the stack in the model.
        index: in the stack; traced where it is scanned.
        layer: number in the model; traced where it is scanned.
    """

    kind: Any
    stack: int
    index: Any
    layer: Any


class Whole:
    """Weights that a scan leaves in their stack, because not all of a layer's are read."""

    def at(self, index: jax.Array) -> Whole:
        """The layer at this place of the stack."""
        raise NotImplementedError


def is_whole(tree: Tree) -> bool:
    """Whether a scan leaves it in its stack."""
    return isinstance(tree, Whole)


@functools.cache
def make_sections(kinds: tuple[Hashable, ...]) -> Sections:
    """The sections of a model whose layers are of these kinds: longest repetition first."""
    sections: list[tuple[Stack, ...]] = []
    start = 0
    while start < len(kinds):
        rest = kinds[start:]
        periods = range(1, min(MAX_PERIOD, len(rest)) + 1)
        covered = [period * _rounds(rest, period) for period in periods]
        covered = [n if n > period else 0 for n, period in zip(covered, periods, strict=True)]
        size = max(covered)
        period = covered.index(size) + 1 if size else 1
        end = start + (size or 1)
        sections.append(
            tuple(Stack(kinds[start + i], range(start + i, end, period)) for i in range(period))
        )
        start = end
    return tuple(sections)


def _rounds(kinds: Sequence[Hashable], period: int) -> int:
    """How often the first ``period`` kinds stand here in a row."""
    count = 1
    while kinds[count * period : (count + 1) * period] == kinds[:period]:
        count += 1
    return count


def stacks_of(sections: Sections) -> tuple[Stack, ...]:
    """All stacks in their order."""
    return tuple(stack for section in sections for stack in section)


def map_stacks(function: Callable[[Stack], Tree], sections: Sections) -> tuple[Tree, ...]:
    """A tuple with ``function(stack)`` for every stack."""
    return tuple(map(function, stacks_of(sections)))


def place_of(sections: Sections, layer: int) -> Place:
    """Where a layer is."""
    stacks = stacks_of(sections)
    number = next(n for n, stack in enumerate(stacks) if layer in stack.layers)
    stack = stacks[number]
    return Place(stack.kind, number, stack.layers.index(layer), layer)


def is_unstacked(layers: tuple[Tree, ...]) -> bool:
    """Whether every stack is a tuple of single layers."""
    return isinstance(layers[0], tuple)


def only_layer(layers: tuple[Tree, ...]) -> Tree:
    """The layer of a model that has one, out of a stack or by itself."""
    (held,) = layers
    return held[0] if isinstance(held, tuple) else jax.tree.map(lambda leaf: leaf[0], held)


def loop_layers(
    body: Callable[[Tree, Tree, Place], Tree],
    carry: Tree,
    layers: tuple[Tree, ...],
    sections: Sections,
) -> Tree:
    """``carry = body(carry, layer, place)`` over all layers in their order.

    Stacks are scanned, tuples of layers are unrolled. State that is written per layer, like a
    cache, belongs in the carry: a scan that takes it in and gives it out per layer copies all of it
    each step.
    """
    first = 0
    for section in sections:
        numbers = range(first, first + len(section))
        first += len(section)
        count = len(section[0].layers)
        stacks = [layers[number] for number in numbers]
        if count > 1 and not is_unstacked(layers):
            carry = _scan(body, carry, stacks, section, numbers)
            continue
        for index in range(count):
            for number, stack, held in zip(numbers, section, stacks, strict=True):
                if not isinstance(held, tuple):
                    held = jax.tree.map(lambda leaf: leaf[0], held)
                else:
                    held = held[index]
                place = Place(stack.kind, number, index, stack.layers[index])
                carry = body(carry, held, place)
    return carry


def _scan(
    body: Callable[[Tree, Tree, Place], Tree],
    carry: Tree,
    stacks: list[Tree],
    section: tuple[Stack, ...],
    numbers: range,
) -> Tree:
    """One section, a period at a time."""
    leaves, structure = jax.tree.flatten(stacks, is_leaf=is_whole)
    whole = {n: leaf for n, leaf in enumerate(leaves) if is_whole(leaf)}
    sliced = [None if n in whole else leaf for n, leaf in enumerate(leaves)]

    def step(carry: Tree, xs: tuple[list[Tree], jax.Array]) -> tuple[Tree, None]:
        parts, index = xs
        parts = [whole[n].at(index) if n in whole else part for n, part in enumerate(parts)]
        period = jax.tree.unflatten(structure, parts)
        for number, stack, layer in zip(numbers, section, period, strict=True):
            at = stack.layers.start + stack.layers.step * index
            carry = body(carry, layer, Place(stack.kind, number, index, at))
        return carry, None

    count = len(section[0].layers)
    return jax.lax.scan(step, carry, (sliced, jnp.arange(count, dtype=jnp.int32)))[0]
