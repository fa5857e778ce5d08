"""Counter-based random numbers: Threefry-2x32 with 20 rounds.

A number is a pure function of (key, counter), so a tile of a kernel and the whole-array reference
draw the same bits without sharing any state:

    word(key, i)             = Threefry(key, (i, 0))[0]           the i-th 32 bits below a key
    fold_in(key, data, tag)  = Threefry(key, (data, 1 + tag))     a child key

The second counter word separates the two uses, so no child key is ever also a drawn word.
Everything here is elementwise uint32 and float32 arithmetic (no gather, no 64-bit integers, no
log1p, which Mosaic GPU lacks): the same function bodies run inside a Pallas kernel.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

Decoding draws from three independent streams (draft, accept, residual), keyed by the position of
the round's anchor and the slot in the block: a position that was rejected and is drafted again
meets fresh noise. Coupled acceptance reads one noise field instead, keyed by absolute position.

Axes: X any leading axes, B requests, U explicit indices, 2 the two words of a key.
"""

import jax
import jax.numpy as jnp

# What a random number is for, folded into a request's key together with a slot: 4 * slot + stream.
DRAFT, ACCEPT, RESIDUAL, FIELD = 1, 2, 3, 4

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA  # the key-schedule constant of Threefry (Skein's C240, low word)

Words = tuple[jax.Array, jax.Array]


def threefry2x32(key: Words, counter: Words) -> Words:
    """Encrypts two counter words under two key words; uint32 arrays that broadcast together."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x0 = counter[0] + schedule[0]
    x1 = counter[1] + schedule[1]
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ _rotate_left(x1, distance)
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1


def _rotate_left(x: jax.Array, distance: int) -> jax.Array:
    return (x << jnp.uint32(distance)) | (x >> jnp.uint32(32 - distance))


def seed_key(seed: int) -> jax.Array:
    """The root key uint32[2] of a seed: its high and its low 32 bits."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}: give an integer in [0, 2**64)")
    return jnp.array([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)


def fold_in(key_X2: jax.Array, data_X: jax.Array | int, tag_X: jax.Array | int = 0) -> jax.Array:
    """A child key [X, 2] for each pair of integers; key, data and tag broadcast over X.

    One block cipher call takes in both: folding twice would cost two, in time and in compilation.
    `tag` is below 2^32 - 1.
    """
    data_X, tag_X = jnp.asarray(data_X), jnp.asarray(tag_X)
    counter = (data_X.astype(jnp.uint32), tag_X.astype(jnp.uint32) + jnp.uint32(1))
    words = threefry2x32((key_X2[..., 0], key_X2[..., 1]), counter)
    return jnp.stack(words, axis=-1)


def stream_key(
    key_B2: jax.Array, stream: int, anchor_position_B: jax.Array, slot: jax.Array | int
) -> jax.Array:
    """Key [B, 2] of one draw of a round: `stream` is DRAFT, ACCEPT or RESIDUAL.

    Folding the anchor's position and the slot, not their sum: the same token position in a later
    round is another draw, which no earlier confidence has seen. This is condition (d) of a lossless
    schedule (``dspark_jax/scheduler/schedule.py``). Arguments broadcast.
    """
    return fold_in(key_B2, anchor_position_B, 4 * slot + stream)


def noise_key(key_B2: jax.Array, position_B: jax.Array) -> jax.Array:
    """Key [B, 2] of the coupled field at an absolute token position.

    Target, drafter, prefill and plain decoding all read `gumbel` (or `gumbel_at`, for a reduced
    vocabulary) of this key over the ids of the whole target vocabulary.
    """
    return fold_in(key_B2, position_B, FIELD)


def bits_at(key_X2: jax.Array, index_XU: jax.Array) -> jax.Array:
    """uint32 [X, U]: the words of each key at the given indices. `index_XU` may be [U]."""
    key = (key_X2[..., :1], key_X2[..., 1:])
    return threefry2x32(key, (index_XU.astype(jnp.uint32), jnp.uint32(0)))[0]


def bits(key_X2: jax.Array, n: int) -> jax.Array:
    """uint32 [X, n]. Element i depends on (key, i) alone: a larger n keeps the prefix."""
    return bits_at(key_X2, jnp.arange(n, dtype=jnp.uint32))


def uniform(key_X2: jax.Array, n: int) -> jax.Array:
    """float32 [X, n], multiples of 2^-24 in [0, 1)."""
    return (bits(key_X2, n) >> jnp.uint32(8)).astype(jnp.float32) * jnp.float32(2.0**-24)


def gumbel(key_X2: jax.Array, n: int) -> jax.Array:
    """float32 [X, n], standard Gumbel, always finite; the prefix rule of `bits` holds."""
    return gumbel_from_bits(bits(key_X2, n))


def gumbel_at(key_X2: jax.Array, index_XU: jax.Array) -> jax.Array:
    """float32 [X, U]: `gumbel(key, n)[..., index]` for any n, without drawing the rest.

    A reduced draft vocabulary reads the target's noise field at its target ids this way.
    """
    return gumbel_from_bits(bits_at(key_X2, index_XU))


def gumbel_from_bits(word_X: jax.Array) -> jax.Array:
    """-log(E) with E = -log(1 - u) exponential and u in [2^-33, 1 - 2^-24].

    Large noise decides an argmax over a large vocabulary, and it comes from small E, hence from
    small u, where a float32 is finest: all 32 bits count, values reach 22.8, and two tokens tie
    with a chance of about 2^-32. (Taking u near 1 instead stops at 16.6 in steps of 1.)
    """
    u_X = (word_X.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
    u_X = jnp.minimum(u_X, jnp.float32(1.0 - 2.0**-24))
    # Below 2^-6 the rounding of 1 - u would show; four terms of the series are exact to float32.
    series_X = u_X * (1.0 + u_X * (1 / 2 + u_X * (1 / 3 + u_X * (1 / 4))))
    return -jnp.log(jnp.where(u_X < 2.0**-6, series_X, -jnp.log(1.0 - u_X)))
