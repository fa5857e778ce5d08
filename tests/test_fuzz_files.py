"""Files as nobody would write them: read, or refused in one line that names them.

Every example is a valid file with a few values or bytes changed. Whatever comes of it, nothing but
an error of our own escapes, nothing hangs, and nothing is left behind.
"""

import copy
import json
import shutil
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dspark_jax.checkpoints.conversations import read_answered, read_conversations, read_questions
from dspark_jax.checkpoints.deepspec import drafter_config, load_drafter
from dspark_jax.checkpoints.gguf import load_gguf_target, open_gguf
from dspark_jax.checkpoints.hf import load_hf_target, target_config
from dspark_jax.checkpoints.load import load_target
from dspark_jax.checkpoints.speculators import speculators_config_dict
from dspark_jax.checkpoints.tokenizer import load_tokenizer
from tests import tiny_model

pytestmark = pytest.mark.full

DATA = Path(__file__).parent / "data"
TARGETS = sorted(path.parent for path in DATA.glob("hf_targets/*/checkpoint/config.json"))
DRAFTERS = sorted(path.parent for path in DATA.glob("*_train*/checkpoint/config.json"))


def fuzz(examples):
    """Settings of a fuzzer: the same examples every time."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=checks,
    )


# Values that a reader might not expect: of other types, extreme, empty, nested.
SCALARS = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, -(10**30)),
        *(0.0, -0.5, 1e-320, 1e308, float("nan"), float("inf")),
        *("", "0", "llama", "default", "full_attention", "\ud800", "\n"),
    ]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_type", "factor", "quant_method", "0", ""]), inner)
    ),
    max_leaves=5,
)


@st.composite
def changed(draw, value):
    """A JSON value with one to three of its parts, at any depth, replaced, removed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        holder = value
        while True:
            keys = sorted(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(holder[key], dict | list) and holder[key] and draw(st.booleans()):
                holder = holder[key]
                continue
            change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "double"]))
            if change == "replace":
                holder[key] = draw(VALUES)
            elif change == "remove":
                del holder[key]
            elif isinstance(holder[key], list | str | int):
                holder[key] = holder[key] * 2
            break
    return value


@st.composite
def damaged(draw, content, within=None):
    """Bytes with a few of them changed, put in or taken out, or the end cut off."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        end = min(len(content), within or len(content))
        place = draw(st.integers(0, max(end - 1, 0)))
        change = draw(st.sampled_from(["set", "set", "fill", "insert", "cut", "end"]))
        if change == "set" and content:
            content[place] = draw(st.integers(0, 255))
        elif change == "fill":
            content[place : place + 8] = draw(st.sampled_from([b"\xff" * 8, bytes(8), b"\x7f" * 8]))
        elif change == "insert":
            content[place:place] = draw(st.binary(max_size=9))
        elif change == "cut":
            del content[place : place + draw(st.integers(1, 9))]
        elif draw(st.integers(0, 3)) == 0:
            del content[place:]
    return bytes(content)


def read(function, *arguments, names=""):
    """Call a reader: it may refuse, in one line that names the file."""
    try:
        function(*arguments)
    except (ValueError, OSError) as error:
        message = str(error)
        assert message
        assert "\n" not in message
        assert names in message


def fuzz_file(path, content, function, *arguments, names=None):
    """Put this in the place of a file of a model, and read the model."""
    intact = path.read_bytes()
    before = sorted(path.parent.iterdir())
    try:
        path.write_bytes(content)
        read(function, *arguments, names=str(path.parent) if names is None else names)
        assert sorted(path.parent.iterdir()) == before
    finally:
        path.write_bytes(intact)


@pytest.mark.parametrize("folder", TARGETS, ids=lambda path: path.parent.name)
@fuzz(150)
@given(data=st.data())
def test_configurations_of_targets(folder, data):
    config = json.loads((folder / "config.json").read_text())
    if data.draw(st.booleans()):
        config = {"model_type": "llava", "text_config": config}
    read(target_config, data.draw(changed(config)))


@pytest.mark.parametrize("folder", DRAFTERS, ids=lambda path: path.parent.name)
@fuzz(150)
@given(data=st.data())
def test_configurations_of_drafters(folder, data):
    config = json.loads((folder / "config.json").read_text())
    read(drafter_config, data.draw(changed(config)))


@fuzz(150)
@given(data=st.data())
def test_configurations_of_drafters_of_speculators(data):
    verifier = {"name_or_path": "x", "architectures": ["LlamaForCausalLM"]}
    config = speculators_config_dict(tiny_model.DRAFTER, verifier)
    read(drafter_config, data.draw(changed(config)))


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tiny_model.write_target(tmp_path_factory.mktemp("fuzz") / "target")


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    return tiny_model.write_drafter(tmp_path_factory.mktemp("fuzz") / "drafter")


@fuzz(200)
@given(data=st.data())
def test_changed_values_in_the_files_of_a_target(target, data):
    names = ["config.json", "tokenizer_config.json", "tokenizer.json"]
    path = target / data.draw(st.sampled_from(names))
    value = data.draw(changed(json.loads(path.read_text())))
    fuzz_file(path, json.dumps(value).encode(), load_target, target)


@fuzz(200)
@given(data=st.data())
def test_damaged_bytes_in_the_files_of_a_target(target, data):
    names = ["config.json", "tokenizer_config.json", "tokenizer.json"]
    path = target / data.draw(st.sampled_from(names))
    fuzz_file(path, data.draw(damaged(path.read_bytes())), load_target, target)


@fuzz(200)
@given(data=st.data())
def test_values_of_generation_configurations(target, data):
    path = target / "generation_config.json"
    value = {"eos_token_id": [1, 2], "suppress_tokens": [3], "bos_token_id": 0}
    path.write_text(json.dumps(value))
    content = json.dumps(data.draw(changed(value))).encode()
    fuzz_file(path, content, load_target, target, names="")
    path.unlink()


def header_of(content):
    """Where the header of a safetensors file ends."""
    return 8 + int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("part", ["target", "drafter"])
@fuzz(300)
@given(data=st.data())
def test_headers_of_safetensors(part, target, drafter, data):
    folder = {"target": target, "drafter": drafter}[part]
    function = {"target": load_hf_target, "drafter": load_drafter}[part]
    path = folder / "model.safetensors"
    content = path.read_bytes()
    end = header_of(content)
    if data.draw(st.booleans()):
        header = data.draw(changed(json.loads(content[8:end])))
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + content[end:]
    else:
        content = data.draw(damaged(content, end))
    fuzz_file(path, content, function, folder, jnp.float32)


@fuzz(200)
@given(data=st.data())
def test_indices_of_shards(tmp_path_factory, target, data):
    folder = tmp_path_factory.mktemp("shards") / "target"
    shutil.copytree(target, folder)
    tensors = np.zeros(3, np.float32)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file({"a": tensors}, folder / "model-00002-of-00002.safetensors")
    places = {"model.norm.weight": "model-00001-of-00002.safetensors", "a": "b.safetensors"}
    path = folder / "model.safetensors.index.json"
    path.write_text("{}")
    content = json.dumps(data.draw(changed({"metadata": {}, "weight_map": places}))).encode()
    fuzz_file(path, content, load_hf_target, folder, jnp.float32)
    shutil.rmtree(folder)


GGUF_VALUES = {
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.rope.freq_base": 1e4,
    "llama.rope.scaling.type": "linear",
    "llama.rope.scaling.factor": 2.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<end>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}
PLAIN_GGUF_VALUES = st.one_of(
    st.sampled_from([True, "", "x", "yarn", "llama", "\n", 0.0, -1.0, 1e38, float("nan")]),
    st.sampled_from([0, 1, 2**31, 2**63, [], [1], ["a"], [0.5], [[1], [2]], [1, 2, 3, 4]]),
)


def write_gguf(path, values):
    """A tiny Llama with this metadata."""
    writer = gguf.GGUFWriter(path, "llama")
    kinds = {bool: "BOOL", str: "STRING", float: "FLOAT32", int: "UINT64", list: "ARRAY"}
    for key, value in values.items():
        if value != []:  # which the writer refuses
            writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
    shapes = {"token_embd": (4, 32), "output_norm": (32,), "blk.0.attn_norm": (32,)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.ffn_{part}": (32, 32) for part in ("gate", "up", "down")}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else None
        value = np.ones(shape, np.float32)
        value = value if kind is None else gguf.quantize(value, kind)
        writer.add_tensor(f"{name}.weight", value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load_gguf(path):
    """Everything that is read of a GGUF file."""
    load_gguf_target(path, jnp.float32)
    load_tokenizer(path)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", GGUF_VALUES)
    load_gguf(path)
    return path


@fuzz(300)
@given(data=st.data())
def test_metadata_of_gguf_files(gguf_file, data):
    values = dict(GGUF_VALUES)
    for key in data.draw(st.sets(st.sampled_from(sorted(values)), min_size=1, max_size=3)):
        if data.draw(st.integers(0, 4)) == 0:
            del values[key]
        else:
            values[key] = data.draw(PLAIN_GGUF_VALUES)
    path = write_gguf(gguf_file.with_name("changed.gguf"), values)
    read(load_gguf, path, names=str(path))


@fuzz(500)
@given(data=st.data())
def test_damaged_gguf_files(gguf_file, data):
    content = gguf_file.read_bytes()
    path = gguf_file.with_name("damaged.gguf")
    path.write_bytes(data.draw(damaged(content, open_gguf(gguf_file).data_offset)))
    read(load_gguf, path, names=str(path))


ROWS = [
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"turns": ["a", "b"]},
    {"prompt": "a", "response_ids": [1, 2], "finish": "length"},
]


@pytest.mark.parametrize("function", [read_answered, read_conversations, read_questions])
@fuzz(300)
@given(data=st.data())
def test_files_of_conversations(function, tmp_path_factory, data):
    lines = [json.dumps(data.draw(changed(row))) for row in ROWS]
    content = "\n".join(lines).encode()
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_bytes(content)
    read(function, path, names=str(path))
