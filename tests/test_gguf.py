"""GGUF files: the weights of the safetensors they were made of, and broken files by name."""

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dspark_jax.checkpoints.gguf import is_gguf, load_gguf_target, open_gguf
from dspark_jax.checkpoints.hf import load_hf_target
from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.config import RopeConfig
from dspark_jax.models.targets.llama import encode
from dspark_jax.models.vocab import unembed

GOLDEN = Path(__file__).parent / "data" / "hf_targets"
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
F32 = gguf.GGMLQuantizationType.F32


def interleave(rows, heads):
    """Rows of every head from two halves to pairs, as converters to GGUF do for Llama."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def llama3_divisors(config):
    """What converters store of a Llama-3 scaling: by how much every frequency is divided."""
    rope, head_dim = config["rope_parameters"], config["head_dim"]
    context, low, high = (
        rope[key]
        for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    divisors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / head_dim)
        smooth = min(max((context / wavelength - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def write_gguf(path, case, *, kind=F32, dtype=np.float32, metadata=(), tensors=()):
    """The golden target ``case`` as a GGUF file, with metadata and tensors changed or added."""
    config = json.loads((GOLDEN / case / "checkpoint" / "config.json").read_text())
    family, layers = config["model_type"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, family)
    values = {
        "block_count": layers,
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_parameters"]["rope_theta"],
    }
    if "head_dim" in config:
        values["attention.key_length"] = config["head_dim"]
    for key, value in (values | dict(metadata)).items():
        if isinstance(value, str):
            writer.add_string(f"{family}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{family}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{family}.{key}", value)
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], layers)
    stored = load_file(GOLDEN / case / "checkpoint" / "model.safetensors")
    for name, value in stored.items():
        if family == "llama" and ".q_proj." in name:
            value = interleave(value, heads)
        if family == "llama" and ".k_proj." in name:
            value = interleave(value, kv_heads)
        writer_kind = kind if value.ndim == 2 else F32
        if dtype != np.float32:
            name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(name, value.astype(dtype))
            continue
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")),
            gguf.quantize(value, writer_kind),
            raw_dtype=writer_kind,
        )
    if config["rope_parameters"]["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config))
    for name, value in dict(tensors).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(path):
    """The message with which a file is refused: one line, an error of our own."""
    with pytest.raises(LoadError) as caught:
        load_gguf_target(path, jnp.float32)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.smoke
@pytest.mark.parametrize("case", ["llama_tied", "llama3_rope_untied", "qwen3", "qwen2_bias"])
def test_a_gguf_file_is_the_checkpoint_that_it_was_made_of(case, tmp_path):
    cfg, target = load_gguf_target(write_gguf(tmp_path / "model.gguf", case), jnp.float32)
    expected_cfg, expected = load_hf_target(GOLDEN / case / "checkpoint", jnp.float32)
    assert replace(cfg, rms_norm_eps=expected_cfg.rms_norm_eps) == expected_cfg
    assert cfg.rms_norm_eps == pytest.approx(expected_cfg.rms_norm_eps, rel=1e-6)
    jax.tree.map(np.testing.assert_array_equal, target, expected)


def test_logits_of_a_gguf_file_are_those_of_transformers(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama3_rope_untied")
    cfg, target = load_gguf_target(path, jnp.float32)
    golden = np.load(GOLDEN / "llama3_rope_untied" / "io.npz")
    hidden_BSD, _ = jax.jit(encode, static_argnums=2)(target, jnp.asarray(golden["input_ids"]), cfg)
    logits_BSV = unembed(target.vocab, hidden_BSD)
    np.testing.assert_allclose(logits_BSV, golden["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "Q4_0", "Q5_1"])
def test_quantised_weights_are_dequantised_exactly(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "model.gguf", "qwen2_bias", kind=kind)
    _, target = load_gguf_target(path, jnp.float32)
    stored = load_file(GOLDEN / "qwen2_bias" / "checkpoint" / "model.safetensors")

    def rounded(name):
        return gguf.dequantize(gguf.quantize(stored[name], kind), kind)

    np.testing.assert_array_equal(target.vocab.embed_VD, rounded("model.embed_tokens.weight"))
    down = rounded("model.layers.2.mlp.down_proj.weight")
    np.testing.assert_array_equal(target.layers[0].mlp.down_MD[2], down.T)
    query = rounded("model.layers.3.self_attn.q_proj.weight").reshape(4, 16, 64)
    np.testing.assert_array_equal(target.layers[0].q_DNH[3], query.transpose(2, 0, 1))


def test_weights_load_as_bfloat16(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama_tied")
    _, target = load_gguf_target(path, jnp.bfloat16)
    _, expected = load_hf_target(GOLDEN / "llama_tied" / "checkpoint", jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, target, expected)


def test_defaults_of_missing_metadata(tmp_path):
    missing = {"rope.freq_base": None, "attention.head_count_kv": None}
    path = write_gguf(tmp_path / "model.gguf", "llama_tied", metadata=missing)
    assert "has shape" in refusal(path)  # as many key heads as heads, which the weights deny
    path = write_gguf(path, "llama_tied", metadata={"rope.freq_base": None})
    assert load_gguf_target(path, jnp.float32)[0].rope == RopeConfig(10000.0)


EXTRA = {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}
UNSUPPORTED = {
    "experts": ({"expert_count": 8}, {}, "expert_count is 8"),
    "another RoPE": ({"rope.scaling.type": "longrope"}, {}, "'longrope' is not supported"),
    "partial RoPE": ({"rope.dimension_count": 8}, {}, "rope.dimension_count 8"),
    "other divisors": ({}, {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}, "llama3"),
    "a missing key": ({"embedding_length": None}, {}, "llama.embedding_length is missing"),
    "a key of text": ({"embedding_length": "48"}, {}, "embedding_length is not of type int"),
    "a size of no use": ({"attention.head_count": 0}, {}, "num_attention_heads is 0"),
    "another size": ({"feed_forward_length": 95}, {}, "the configuration says [95, 48]"),
    "too many layers": ({"block_count": 4_000_000_000}, {}, "num_hidden_layers is 4000000000"),
    "too few layers": ({"block_count": 3}, {}, "are left over"),
    "an extra tensor": ({}, EXTRA, "blk.0.attn_sinks.weight is left over"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_not_supported_is_named(case, tmp_path):
    metadata, tensors, expected = UNSUPPORTED[case]
    path = write_gguf(tmp_path / "m.gguf", "llama_tied", metadata=metadata, tensors=tensors)
    assert expected in refusal(path)


def test_another_architecture_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "general.architecture 'mamba'" in refusal(tmp_path / "m.gguf")


def test_parts_of_a_split_file_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "one of 3 parts" in refusal(tmp_path / "m.gguf")


def test_missing_and_foreign_files_are_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "nowhere.gguf")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1f\nsize 5\n"
    for content, expected in (
        (b"", "broken or truncated GGUF file"),
        (b"GGUF", "broken or truncated GGUF file"),
        (b"GGUF\x03\0\0\0", "broken or truncated GGUF file"),
        (b"PK\x03\x04" * 100, "a zip archive"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (pointer, "git lfs pull"),
        (bytes(100), "no GGUF file"),
        (b"GGUF\x01\0\0\0" + bytes(20), "GGUF version 1: only 2 and 3 are read"),
        (b"GGUF\0\0\0\x03" + bytes(20), "big-endian"),
    ):
        (tmp_path / "m.gguf").write_bytes(content)
        assert expected in refusal(tmp_path / "m.gguf")
    link = tmp_path / "link.gguf"
    link.symlink_to("../blobs/1f")
    assert "a link to ../blobs/1f, which is not there" in refusal(link)


def set_type(path, name, kind):
    """Overwrite the type of a tensor in a file's table."""
    content = path.read_bytes()
    # A tensor's entry: the length of its name, the name, dimensions, sizes, type, offset.
    start = content.index(len(name).to_bytes(8, "little") + name.encode()) + 8 + len(name)
    place = start + 4 + 8 * int.from_bytes(content[start : start + 4], "little")
    path.write_bytes(content[:place] + kind.to_bytes(4, "little") + content[place + 4 :])


def test_types_of_tensors_that_nobody_reads_are_named(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama_tied")
    set_type(path, "blk.2.ffn_up.weight", 4242)
    assert "tensor blk.2.ffn_up.weight has type 4242, which is unknown" in refusal(path)
    set_type(path, "blk.2.ffn_up.weight", gguf.GGMLQuantizationType.I32)
    assert "tensor blk.2.ffn_up.weight has type I32" in refusal(path)
    assert "turn into floats" in refusal(path)


def test_double_precision_is_read(tmp_path):
    path = write_gguf(tmp_path / "double.gguf", "llama_tied", dtype=np.float64)
    _, target = load_gguf_target(path, jnp.float32)
    _, expected = load_hf_target(GOLDEN / "llama_tied" / "checkpoint", jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, target, expected)


def test_a_file_is_known_by_how_it_begins(tmp_path):
    path = write_gguf(tmp_path / "sha256-1f", "llama_tied")
    assert is_gguf(path)
    assert is_gguf("NOWHERE.GGUF")
    assert not is_gguf(tmp_path)
    assert not is_gguf("owner/name")


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A GGUF file's path, and where its header and its last tensor end."""
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", "llama_tied")
    file = open_gguf(path)
    end = max(tensor.data_offset + tensor.n_bytes for tensor in file.tensors)
    return path, file.data_offset, end


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_truncated_file_is_always_refused(intact, data):
    path, header, end = intact
    kept = data.draw(st.one_of(st.integers(0, header), st.integers(0, end - 1)))
    broken = path.with_name("truncated.gguf")
    broken.write_bytes(path.read_bytes()[:kept])
    refusal(broken)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_refused_or_harmless(intact, data):
    path, header, _ = intact
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    broken = path.with_name("damaged.gguf")
    broken.write_bytes(content)
    with contextlib.suppress(LoadError):
        load_gguf_target(broken, jnp.float32)


def family_values(case, config):
    """What llama.cpp's converters say of a family beside what all say, and their architecture."""
    full = config.get("per_layer_config", {}).get("3", {})
    slides = [name == "sliding_attention" for name in config.get("layer_types", ())]
    window = {"attention.sliding_window": config.get("sliding_window") or 0}
    ropes = config["rope_parameters"]
    if case == "smollm3":
        return "smollm3", {}
    if case == "mistral_window":
        return "llama", window
    if case == "llama_linear":
        return "llama", {"rope.scaling.type": "linear", "rope.scaling.factor": ropes["factor"]}
    if case == "llama_yarn":
        length = ropes["original_max_position_embeddings"]
        scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": ropes["factor"]}
        return "llama", scaling | {"rope.scaling.original_context_length": length}
    if case == "qwen3_moe":
        counts = {"expert_count": 8, "expert_used_count": 2}
        return "qwen3moe", counts | {"expert_feed_forward_length": config["moe_intermediate_size"]}
    if case == "gemma2":
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        return "gemma2", window | {key: config[key] for key in caps}
    if case == "gemma3":
        return "gemma3", window | {"attention.sliding_window_pattern": 4}
    values = window | {
        "attention.sliding_window_pattern": slides,
        "attention.key_length": full["head_dim"],
        "attention.key_length_swa": config["head_dim"],
        "attention.shared_kv_layers": 0,
        "final_logit_softcapping": config["final_logit_softcapping"],
        "rope.freq_base_swa": 1e4,
    }
    if "num_key_value_heads" in full:
        heads = [config["num_key_value_heads"], full["num_key_value_heads"]]
        values["attention.head_count_kv"] = [heads[not slide] for slide in slides]
    if config["enable_moe_block"]:
        values |= {"expert_count": 8, "expert_used_count": 2}
        values["expert_feed_forward_length"] = config["moe_intermediate_size"]
    return "gemma4", values


def family_tensors(arch, config, stored):
    """The tensors as llama.cpp's converters name and change them."""
    names = gguf.get_tensor_name_map(
        next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch),
        config["num_hidden_layers"],
    )
    whole, experts = {}, {}
    for name, value in stored.items():
        if arch in ("llama", "smollm3"):
            heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
            for part, key in heads.items():
                if f".{part}." in name:
                    value = interleave(value, config[key])
        if arch in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            value = value + 1
        layer = name.split(".")[2] if ".layers." in name else ""
        if ".mlp.experts." in name:
            *_, expert, part, _ = name.split(".")
            experts.setdefault(f"blk.{layer}.ffn_{part[:-5]}_exps.weight", {})[int(expert)] = value
        elif name.endswith("router.scale"):
            whole[f"blk.{layer}.ffn_gate_inp.scale"] = value
        elif name.endswith("per_expert_scale"):
            whole[f"blk.{layer}.ffn_down_exps.scale"] = value
        elif name.endswith("layer_scalar"):
            whole[f"blk.{layer}.layer_output_scale.weight"] = value
        else:
            name = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            # gguf-py has no name for the MLP of a layer without experts among others with them.
            whole[known or f"blk.{layer}.ffn_{name.split('.')[-2][:-5]}.weight"] = value
    stacked = {name: np.stack([parts[e] for e in sorted(parts)]) for name, parts in experts.items()}
    if arch == "gemma4":
        turning = config["per_layer_config"]["3"]["head_dim"] // 8
        divisors = np.full(4 * turning, 1e30, np.float32)
        divisors[:turning] = 1
        stacked["rope_freqs.weight"] = divisors
    return whole | stacked


@pytest.mark.parametrize(
    "case",
    [
        "mistral_window", "llama_linear", "llama_yarn", "smollm3", "qwen3_moe", "gemma2", "gemma3",
        "gemma4", "gemma4_moe",
    ],
)  # fmt: skip
def test_files_of_other_families(case, tmp_path):
    folder = GOLDEN / case / "checkpoint"
    config = json.loads((folder / "config.json").read_text())
    arch, values = family_values(case, config)
    ropes = config["rope_parameters"]
    common = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": config.get("head_dim", 12),
        "rope.freq_base": float(ropes.get("full_attention", ropes)["rope_theta"]),
    }
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", arch)
    for key, value in (common | values).items():
        add = {str: writer.add_string, float: writer.add_float32, list: writer.add_array}
        add.get(type(value), writer.add_uint32)(f"{arch}.{key}", value)
    stored = load_file(folder / "model.safetensors")
    for name, value in family_tensors(arch, config, stored).items():
        writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    cfg, target = load_gguf_target(tmp_path / "model.gguf", jnp.float32)
    expected_cfg, expected = load_hf_target(folder, jnp.float32)
    if case == "gemma2":  # whose scale no file has: the width of a head
        assert cfg.scale == 16**-0.5
        cfg = replace(cfg, scale=expected_cfg.scale)
    assert replace(cfg, rms_norm_eps=expected_cfg.rms_norm_eps) == expected_cfg
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), target, expected)
