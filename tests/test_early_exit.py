"""The target's own first layers as drafter: what they compute, and whose cache they read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax import load
from dspark_jax.checkpoints.load import load_drafter_for, load_target
from dspark_jax.config import TrainConfig
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.request import Request
from dspark_jax.models.cache import Beside, Room, Rows
from dspark_jax.models.drafters.table import without_checkpoint
from dspark_jax.models.targets.table import family_of
from dspark_jax.training import fit
from tests.marks import rest_full
from tests.tiny_model import TARGET, random_params, write_letters, write_target

DEEP = dataclasses.replace(TARGET, num_layers=4)
WINDOWED = dataclasses.replace(DEEP, windows=(0, 6, 0, 6))


@pytest.mark.parametrize("cfg", rest_full([DEEP, WINDOWED], (DEEP,)))
@pytest.mark.parametrize("count", rest_full([1, 3], (3,)))
def test_rows_beside_see_what_they_are_told_to_and_leave_nothing(cfg, count):
    """A chain behind what was read is what one pass over the whole text has."""
    family = family_of(cfg)
    params = random_params(1, family.declare(cfg))
    text_S = np.random.default_rng(0).integers(0, cfg.vocab_size, 12).astype(np.int32)
    buffers = family.declare_cache(cfg, Room(1, 64, 8, jnp.float32))
    cache = jax.tree.map(lambda x: jnp.full(x.shape, 7.0, x.dtype), buffers)
    whole = jax.jit(lambda token: family.encode(params, token, cfg, (count - 1,))[1])
    expected_SD = whole(text_S[None])[0, :, 0]

    @jax.jit
    def run(cache):
        rows = Rows(text_S[:9], jnp.zeros(9, jnp.int32), jnp.arange(9, dtype=jnp.int32))
        _, _, cache = family.extend(params, cache, rows, cfg, rows_per_slot=9)
        place_W = jnp.arange(3, dtype=jnp.int32)
        seen_WW = place_W <= place_W[:, None]
        rows = Beside(jnp.asarray(text_S[None, 9:]), 9 + place_W[None], jnp.array([9]), seen_WW)
        return family.beside(params, cache, rows, cfg, count)

    within = cfg.windows == () or count == 1
    found_WD = run(cache)[0]
    np.testing.assert_allclose(found_WD[0], expected_SD[9], rtol=1e-4, atol=1e-5)
    if within:  # a window is counted back from the first row
        np.testing.assert_allclose(found_WD, expected_SD[9:], rtol=1e-4, atol=1e-5)


def silent(params, first):
    """The target with layers that add nothing, from this one on."""
    quiet = {"o_NHD", "down_MD"}

    def cut(path, leaf):
        return leaf.at[first:].set(0) if path[-1].name in quiet else leaf

    layers = jax.tree_util.tree_map_with_path(cut, jax.tree.map(jnp.asarray, params.layers))
    return params.replace(layers=layers)


def test_layers_behind_which_nothing_happens_are_accepted_whole():
    """Every draft stands, behind prompts in chunks and in several slots: the target's cache has
    what a draft reads, after blocks that were accepted whole too."""
    params = silent(random_params(2, family_of(DEEP).declare(DEEP)), 1)
    drafter = *without_checkpoint("first:1", DEEP, params), params.vocab
    config = EngineConfig(
        slots=2, slot_buckets=(2,), positions=128, chunk_buckets=(1,), chunk_rows=16,
        row_buckets=(10,), position_buckets=(192,), policy="block",
    )  # fmt: skip
    with Engine(make_decoder((DEEP, params), drafter), config) as engine:
        running = [engine.submit(request) for request in requests()]
        found = [stream.wait() for stream in running]
    for result in found:
        assert set(result.accepted_lengths[1:-1]) == {5}, result.accepted_lengths


def requests():
    return [Request(prompt, 22, temperature=0) for prompt in ([3], [5, 9, 2], list(range(40)))]


@pytest.mark.parametrize(
    ("name", "message"),
    [("first:0", "give 1 to 3"), ("first:4", "the target has 4 layers, give 1 to 3")],
)
def test_exits_that_there_are_not_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        without_checkpoint(name, DEEP, None)


@pytest.mark.full
def test_training(tmp_path):
    """The norm learns, is read again, and the text is the target's own."""
    config = TrainConfig(
        method="early_exit",
        target=str(write_target(tmp_path / "target", DEEP)),
        data=str(write_letters(tmp_path / "data.jsonl", 24)),
        out=str(tmp_path / "out"),
        num_layers=2,
        block_size=3,
        markov_rank=0,
        confidence=False,
        max_length=40,
        length_buckets=(40,),
        tokens_per_batch=160,
        num_anchors=20,
        steps=10,
        learning_rate=3e-2,
        eval_sequences=4,
        eval_every=5,
        log_every=1,
    )
    out = fit.fit(config)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines if "split" not in line]
    assert log[-1]["loss"] < log[0]["loss"]
    drafter = load_drafter_for(load_target(config.target), out)
    assert (drafter.cfg.num_layers, drafter.cfg.block_size) == (2, 3)
    given = {"max_new_tokens": 12, "temperature": 0, "seed": 0}
    texts = [
        load(config.target, name).generate("abc", **given)[0].token_ids
        for name in ("none", str(out), "first:2")
    ]
    assert texts[0] == texts[1] == texts[2]
