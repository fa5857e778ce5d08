"""A whole decoding round with the kernels that one config value names, lowered for a GPU on a
machine without one: Qwen3-4B and its drafter in bfloat16, 32 requests, two chunks of prompts."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dspark_jax.axes import abstract_params
from dspark_jax.config import DrafterConfig
from dspark_jax.engine.inputs import Chunks, RoundConfig, RoundInput, Weights
from dspark_jax.engine.round import decode_round
from dspark_jax.engine.state import StateConfig, make_state
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.targets.llama import Config as LlamaConfig
from dspark_jax.models.targets.llama import declare as declare_target
from dspark_jax.models.vocab import Vocab
from pallas_kernels import dispatch
from tests import cuda_compile

pytestmark = [
    pytest.mark.smoke,
    pytest.mark.skipif(
        dispatch.version_problem() is not None, reason=str(dispatch.version_problem())
    ),
]
SIZES = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
}
TARGET = LlamaConfig(**SIZES, num_layers=36, qk_norm=True, tied=True)
DRAFTER = DrafterConfig(
    **SIZES,
    num_layers=5,
    num_target_layers=36,
    target_layer_ids=(1, 9, 17, 25, 33),
    mask_token_id=151669,
    markov_rank=256,
    confidence=True,
)
SLOTS, POSITIONS, CHUNKS, ROWS_PER_CHUNK = 32, 4096, 2, 128


def program_of_a_round(kernels, **sizes):
    """The program of a round, lowered for a GPU or a mesh of GPUs."""
    cfg = RoundConfig(TARGET, DRAFTER, DRAFTER.block_size, kernels=kernels)
    target, drafter = (
        abstract_params(declare(sizes), jnp.bfloat16)
        for declare, sizes in ((declare_target, TARGET), (declare_drafter, DRAFTER))
    )
    weights = Weights(target, drafter, Vocab(target.vocab.embed_VD, target.vocab.embed_VD))
    form = StateConfig(
        TARGET, DRAFTER, SLOTS, POSITIONS, 8, 2, (jnp.bfloat16, jnp.bfloat16), (True, True)
    )
    state = jax.eval_shape(lambda: make_state((), form))
    integer = jax.ShapeDtypeStruct((CHUNKS,), jnp.int32)
    chunks = Chunks(integer, integer, integer, jax.ShapeDtypeStruct((CHUNKS,), jnp.bool_))
    given = RoundInput(jax.ShapeDtypeStruct((SLOTS,), jnp.bool_), chunks)
    step = functools.partial(
        decode_round, cfg=cfg, num_rows=SLOTS * 8, rows_per_chunk=ROWS_PER_CHUNK
    )
    mesh = cuda_compile.mesh_of_gpus(**sizes)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(step).trace(weights, state, given).lower(lowering_platforms=("cuda",))
    return lowered.as_text()


def kernels_of_a_round(kernels, **sizes):
    """The calls of Mosaic GPU kernels in the program of a round."""
    lines = program_of_a_round(kernels, **sizes).splitlines()
    return [line for line in lines if "custom_call @mosaic_gpu" in line]


# Attention of the target's rows and chunks and of the drafter's blocks; layers are scanned.
ATTENTION = 3


def test_a_round_holds_the_kernels_of_its_configuration(monkeypatch):
    # The program is not run here.
    monkeypatch.setattr(dispatch, "device_problem", lambda device=None: None)
    assert len(kernels_of_a_round("mosaic_gpu")) > ATTENTION
    assert not kernels_of_a_round("xla")


def test_on_a_mesh_the_kernels_have_a_shard_each(monkeypatch):
    """Half of the key heads, and half of the logits, as they lie: no copy with padding."""
    monkeypatch.setattr(dispatch, "device_problem", lambda device=None: None)
    calls = kernels_of_a_round("mosaic_gpu", data=1, tensor=2)
    half_cache = f"x{SLOTS}x{SIZES['num_kv_heads'] // 2}x{POSITIONS}x128xbf16"
    assert sum(half_cache in call for call in calls) == ATTENTION
    lanes = f"x{151936 // 2 // 64}x64xf32>"
    judged, drafted = f"tensor<{SLOTS * 8}{lanes}", f"tensor<{SLOTS}{lanes}"
    assert sum(judged in call or drafted in call for call in calls) == len(calls) - ATTENTION - 1
