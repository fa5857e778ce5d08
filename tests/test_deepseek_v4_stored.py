"""DeepSeek-V4 whose matrices are stored as in the released files: in blocks, experts in e2m1."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.axes import declare, make_mesh
from dspark_jax.checkpoints.hf import load_hf_target, target_config
from dspark_jax.checkpoints.inside import open_inside, read_inside
from dspark_jax.checkpoints.tensors import file_names, file_shape, write_params
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.evaluation import footprint
from dspark_jax.models.drafters.table import INSIDE, drafter_of
from dspark_jax.models.quantised import InBlocks, declare_in_blocks, dequantise
from dspark_jax.models.targets.table import family_of
from tests.test_deepseek_v4 import GOLDEN
from tests.test_families_decoding import ENGINE, NEW, texts
from tests.tiny_model import random_params

LAYERS = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
# Widths of which there are whole blocks and groups; everything else as in the golden.
FIELDS = {
    "num_hidden_layers": 3,
    "layer_types": LAYERS,
    "hidden_size": 64,
    "q_lora_rank": 32,
    "o_lora_rank": 128,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "dspark_target_layer_ids": [0, 1, 2],
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
E4M3 = re.compile(
    r"(attn\.(indexer\.)?(wq_a|wq_b|wkv|wo_a|wo_b)|shared_experts\.w\d|compressor\.wgate|main_proj)\.weight$"
)
E2M1 = re.compile(r"\.experts\.\d+\.w\d\.weight$")
CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def stored(name, plain_OI):
    """The tensors of one matrix: dtype of the header -> array."""
    if E4M3.search(name):
        blocks = [-(-size // 128) for size in plain_OI.shape]
        scale = np.full(blocks, 127 - 6, np.uint8)
        return {name: ("F8_E4M3", (plain_OI * 64).astype(jnp.float8_e4m3fn))} | {
            name.replace(".weight", ".scale"): ("F8_E8M0", scale)
        }
    if E2M1.search(name):
        scaled = np.abs(plain_OI) * 16
        code = np.abs(scaled[..., None] - CODES).argmin(-1).astype(np.uint8) + 8 * (plain_OI < 0)
        packed = (code[:, ::2] | code[:, 1::2] << 4).astype(np.uint8)
        scale = np.full((len(plain_OI), plain_OI.shape[1] // 32), 127 - 4, np.uint8)
        return {name: ("I8", packed), name.replace(".weight", ".scale"): ("F8_E8M0", scale)}
    kind = "I32" if plain_OI.dtype.kind == "i" else "F32"
    return {name: (kind, plain_OI)}


def write_safetensors(path, tensors, *, empty=False):
    """``empty`` leaves a hole in the place of the numbers: a header, and nothing to read."""
    header, place = {}, 0
    for name, (kind, shape, size) in tensors.items():
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if empty:
            file.truncate(8 + len(text) + place)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "target"
    folder.mkdir()
    config = json.loads((GOLDEN / "checkpoint" / "config.json").read_text()) | FIELDS
    (folder / "config.json").write_text(json.dumps(config))
    cfg = target_config(config)
    declared = family_of(cfg).declare(cfg)
    inside = INSIDE["deepseek_v4"](config, cfg, [f"mtp.{i}.attn_norm.weight" for i in range(3)])
    stages = drafter_of(inside).declare_drafter(inside)
    plain = write_params(declared, random_params(5, declared))
    plain |= write_params(stages, random_params(6, stages))
    tensors = {}
    for name, array in plain.items():
        tensors |= stored(name, np.asarray(array))
    header = {name: (kind, a.shape, a.nbytes) for name, (kind, a) in tensors.items()}
    path = folder / "model.safetensors"
    write_safetensors(path, header)
    with path.open("ab") as file:
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())
    return folder


def is_stored(leaf):
    return isinstance(leaf, InBlocks)


def plain(params):
    return jax.tree.map(lambda x: dequantise(x) if is_stored(x) else x, params, is_leaf=is_stored)


@pytest.fixture(scope="module")
def target(folder):
    return load_hf_target(folder, jnp.float32)


def test_matrices_stay_as_they_are_stored(folder, target):
    cfg, params = target
    for layer in params.layers:
        held = jax.tree.leaves(layer, is_leaf=is_stored)
        assert sum(map(is_stored, held)) == 5 + 3 + 3 + (layer.indexer is not None)
        if layer.compressor is not None:  # which has a dtype of its own
            assert layer.compressor.weight_DO.dtype == np.float32
    token_BS = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 20)).astype(np.int32)
    encode = jax.jit(lambda params: family_of(cfg).encode(params, token_BS, cfg)[0])
    expected_BSD = encode(plain(params))
    np.testing.assert_allclose(encode(params), expected_BSD, atol=2e-4)


def test_the_stages_of_the_drafter_stay_so_too(folder, target):
    cfg, tensors = open_inside(folder)
    params = read_inside(cfg, tensors)
    held = jax.tree.leaves(params, is_leaf=is_stored)
    assert sum(map(is_stored, held)) == 1 + 5 + 3 + 3
    rng = np.random.default_rng(1)
    feature_BSFD = rng.normal(size=(1, 12, 3, 64)).astype(np.float32)
    previous_BAG = rng.integers(0, cfg.vocab_size, (1, 2, cfg.block_size)).astype(np.int32)
    where = np.array([[4, 9]], np.int32), np.ones((1, 2), bool)

    @jax.jit
    def hidden(params):
        token_BS = np.zeros((1, 12), np.int32)  # which blocks have no use for
        given = target[1].vocab, feature_BSFD, token_BS, previous_BAG, *where, cfg
        return drafter_of(cfg).train_blocks(params, *given, kernels="xla").hidden_BAGD

    np.testing.assert_allclose(hidden(params), hidden(plain(params)), atol=2e-4)


@pytest.mark.full
def test_texts_are_those_of_what_is_stored(target, emulated_devices):
    cfg, params = target
    found = texts(make_decoder((cfg, params)), dataclasses.replace(ENGINE, policy="none"))
    assert {len(ids) for ids in found} == {NEW}
    mesh = make_mesh(expert=2, tensor=2, devices=emulated_devices)
    decoder = make_decoder((cfg, params), mesh=mesh)
    assert found == texts(decoder, dataclasses.replace(ENGINE, policy="none"))


def test_a_file_is_read_onto_a_mesh(folder, target, emulated_devices):
    mesh = make_mesh(expert=2, tensor=2, devices=emulated_devices)
    _, params = load_hf_target(folder, jnp.float32, mesh)
    jax.tree.map(np.testing.assert_array_equal, params, target[1])
    experts = params.layers[0].experts.gate_EDM.value_OI
    assert {shard.data.nbytes for shard in experts.addressable_shards} == {experts.nbytes // 4}


def test_a_plan_needs_headers_alone(folder, tmp_path):
    """Bytes of the matrices as they are stored, of a file that has no numbers."""
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    head = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(head[:8], "little")
    header = json.loads(head[8 : 8 + size])
    shapes = {
        name: (one["dtype"], one["shape"], one["data_offsets"][1] - one["data_offsets"][0])
        for name, one in header.items()
    }
    write_safetensors(tmp_path / "model.safetensors", shapes, empty=True)
    options = {"slots": 4, "positions": 100, "memory_bytes": 10**9, "dtype": "float32"}
    report = footprint.plan(footprint.open_models(str(tmp_path), "default"), {}, **options)
    held = sum(one["data_offsets"][1] - one["data_offsets"][0] for one in header.values())
    gates = [one for name, one in header.items() if "wgate" in name]
    held -= sum(one["data_offsets"][1] - one["data_offsets"][0] for one in gates)
    held += 4 * sum(math.prod(one["shape"]) for one in gates if one["dtype"] == "F8_E4M3")
    assert report["weight_bytes"] == held


def test_groups_that_are_not_of_whole_blocks_are_refused():
    sizes = {"K": 2, "X": 2, "H": 32, "O": 64}
    param = declare("KXHO", sizes, "wo_a.weight", out="KO")
    with pytest.raises(ValueError, match="groups of 64 outputs, and scales for 128"):
        declare_in_blocks(param, (128, 128), jnp.float8_e4m3fn)


FLASH = {
    "num_hidden_layers": 43,
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "n_routed_experts": 256,
    "moe_intermediate_size": 2048,
    "index_topk": 512,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4],
}
PRO = {
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "index_topk": 1024,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4],
}
RELEASED = {
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "num_key_value_heads": 1,
    "o_lora_rank": 1024,
    "num_hash_layers": 3,
    "max_position_embeddings": 1048576,
    "tie_word_embeddings": False,
    "quantization_config": FIELDS["quantization_config"],
}


def header_of(declared):
    """Of a released file: dtype, shape and bytes of every tensor."""
    found = {}
    for param in jax.tree.leaves(declared):
        shape = file_shape(param)
        for name in file_names(param):
            scale = name.replace(".weight", ".scale")
            kind, block = "BF16", ()
            if "compressor" not in name and E4M3.search(name):
                kind, block = "F8_E4M3", (128, 128)
            elif E2M1.search(name):
                kind, block = "I8", (1, 32)
            elif param.dtype is not None:
                kind = "I64" if param.init == "choices" else "F32"
            width = {"BF16": 2, "F8_E4M3": 1, "I8": 0.5, "F32": 4, "I64": 8}[kind]
            held = (shape[0], shape[1] // 2) if kind == "I8" else shape
            found[name] = kind, held, int(width * math.prod(shape))
            if block:
                blocks = [-(-size // of) for size, of in zip(shape, block, strict=True)]
                found[scale] = "F8_E8M0", blocks, math.prod(blocks)
    return found


@pytest.mark.full
@pytest.mark.parametrize(
    ("sizes", "weights_gb", "slots"),
    [(FLASH, (148, 162), (64, 64)), (PRO, (800, 900), (0, 16))],
    ids=["Flash", "Pro"],
)
def test_what_fits_of_the_released_models(sizes, weights_gb, slots, tmp_path):
    """On eight devices of 80 and of 141 GB: at least so many slots of 32768 positions each."""
    config = RELEASED | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg = target_config(config)
    header = header_of(family_of(cfg).declare(cfg))
    write_safetensors(tmp_path / "model.safetensors", header, empty=True)
    models = footprint.open_models(str(tmp_path), "default")
    options = {"slots": 64, "positions": 32768}
    whole = footprint.plan(models, {}, memory_bytes=80 * 10**9, **options)
    assert weights_gb[0] < whole["weight_bytes"] / 1e9 < weights_gb[1]
    assert not whole["fits"]
    for memory, least in zip((80, 141), slots, strict=True):
        found = footprint.plan(models, {"tensor": 8}, memory_bytes=memory * 10**9, **options)
        assert found["most_slots"] >= least
        assert (found["most_slots"] > 0) == (least > 0)
