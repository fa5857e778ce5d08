"""GGUF files of targets.

The metadata and the tensors, dequantised to float32, are given their Hugging Face names; from there
on they take the same way as a directory. Two things are special to GGUF: the q and k rows of Llama
files are permuted for interleaved RoPE, which is undone here, and Llama-3 RoPE scaling is stored
as a tensor of divisors, which is turned back into its four parameters.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
from jax.sharding import Mesh

from dspark_jax.checkpoints.tensor_names import split_experts
from dspark_jax.checkpoints.tensors import LoadError, Tensors, read_params
from dspark_jax.config import RopeConfig, TargetConfig
from dspark_jax.files import absent, foreign
from dspark_jax.models.quantised import PLAIN
from dspark_jax.models.rope import rope_frequencies
from dspark_jax.models.targets.config_json import rope_config_dict
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.targets.gguf_dialects import DIALECTS, GLOBAL_NAMES, Dialect
from dspark_jax.models.targets.table import FAMILIES, family_of

ROPE_FACTORS = "rope_freqs.weight"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
NOT_ROTATED = 1e20  # divisors above it stop a channel
# What the gguf package and numpy raise, from wherever it happens to be, on a broken file.
BROKEN = (
    ValueError, LookupError, TypeError, ArithmeticError, MemoryError, NotImplementedError,
    RecursionError,
)  # fmt: skip


class _Bytes:
    """The bytes of a file; a slice that reaches past the end is an error, not shorter.

    Being no ``np.memmap``, it also makes the reader, which slices once for every string of the
    vocabulary, three times faster.
    """

    def __init__(self, mapped: np.ndarray) -> None:
        self._array = mapped.view(np.ndarray)

    def __getitem__(self, part: slice) -> np.ndarray:
        if part.stop > self._array.size:
            raise IndexError("it ends in the middle of its contents")
        return self._array[part]


class GgufFile(gguf.GGUFReader):
    """A memory-mapped GGUF file: metadata and tensor table; tensors are views of the mapping.

    Attributes:
        path: where it lies.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        super().__init__(path)

    @property
    def data(self) -> Any:
        """The bytes of the file, as the reader slices them."""
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = _Bytes(mapped)

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        """The reader's table of tensors, whose types are all known."""
        known = {kind.value for kind in gguf.GGMLQuantizationType}
        for tensor in fields:
            _, name, _, _, (kind,), _ = tensor.parts
            if int(kind) not in known:
                raise LoadError(
                    f"{self.path}: tensor {bytes(name).decode()} has type {kind}, which is unknown "
                    f"to the installed gguf package: update it, or take another quantisation"
                )
        super()._build_tensors(start_offs, fields)

    def value(self, key: str, kind: Any, default: Any = None) -> Any:
        """A metadata value.

        Args:
            key: its key.
            kind: the type that it must have, or several; an integer will do for a float.
            default: what a missing key gives; None is a default, too.

        Raises:
            LoadError: the value is of another type, or broken.
        """
        found = self.fields.get(key)
        if found is None:
            return default
        try:
            value = found.contents()
        except BROKEN as error:
            raise LoadError(f"{self.path}: metadata {key} is broken ({error})") from None
        if kind is float and isinstance(value, int):
            return float(value)
        if not isinstance(value, kind):
            name = getattr(kind, "__name__", kind)
            raise LoadError(f"{self.path}: metadata {key} is not of type {name}")
        return value


def open_gguf(path: str | Path) -> GgufFile:
    """Read a GGUF file's metadata and tensor table; the tensors stay mapped.

    Raises:
        LoadError: there is no such file, or it is broken, truncated, or one part of several.
    """
    if not Path(path).is_file():
        raise LoadError(f"{path}: {absent(path)}; name an existing GGUF file")
    try:
        _check_start(Path(path))
        with np.errstate(over="raise"):
            file = GgufFile(path)
        parts = file.value("split.count", int, 1)
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror or error}") from None
    except LoadError:
        raise
    except BROKEN as error:
        raise LoadError(f"{path}: broken or truncated GGUF file ({error})") from None
    if parts > 1:
        raise LoadError(f"{path}: one of {parts} parts; merge them into one GGUF file first")
    return file


def is_gguf(path: str | Path) -> bool:
    """Whether this names a GGUF file, by its ending or by how it begins."""
    if str(path).lower().endswith(".gguf"):
        return True
    try:
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:  # a directory, or none
        return False


def _check_start(path: Path) -> None:
    """Name what is no GGUF file, or of a version or byte order that is not read."""
    with path.open("rb") as file:
        start = file.read(8)
    if len(start) == 8 and start[:4] != MAGIC:
        raise LoadError(f"{path}: this is {foreign(path) or 'no GGUF file: download it again'}")
    version = int.from_bytes(start[4:], "little")
    if version and not version % 2**16:
        raise LoadError(
            f"{path}: a big-endian GGUF file, which is not read: take a little-endian one"
        )
    if len(start) == 8 and version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise LoadError(
            f"{path}: GGUF version {version}: only {known} are read, convert the model anew"
        )


def load_gguf_target(
    path: str | Path,
    dtype: Any,
    mesh: Mesh | None = None,
    weights: str = PLAIN,
    *,
    file: GgufFile | None = None,
) -> tuple[TargetConfig, TargetParams]:
    """A target out of a GGUF file.

    Args:
        path: the file.
        dtype: dtype of the parameters; dequantisation itself is in float32.
        mesh: as in :func:`~dspark_jax.checkpoints.tensors.read_params`.
        weights: likewise.
        file: the same file where it is open already.

    Raises:
        LoadError: the file is broken or its model is not supported.
    """
    file = open_gguf(path) if file is None else file
    cfg = gguf_config(file, path)
    try:
        tensors = _tensors(file, cfg, str(path))
        return cfg, read_params(family_of(cfg).declare(cfg), tensors, dtype, mesh, weights)
    except LoadError:
        raise
    except BROKEN as error:
        raise LoadError(f"{path}: broken tensors ({error})") from None


def gguf_config(file: GgufFile, path: str | Path) -> TargetConfig:
    """The target's configuration out of the metadata.

    Raises:
        LoadError: an architecture or a RoPE scaling that is not supported, or a missing key.
    """
    try:
        return _config(file)
    except LoadError:
        raise
    except BROKEN as error:
        raise LoadError(f"{path}: {error}") from None


def _config(file: GgufFile) -> TargetConfig:
    name, dialect = _dialect(file)

    def get(key: str, default: Any = None, kind: Any = int) -> Any:
        value = file.value(f"{name}.{key}", kind, default)
        if value is None:
            raise ValueError(f"metadata {name}.{key} is missing")
        return value

    shapes = {tensor.name: _shape(tensor) for tensor in file.tensors}
    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // max(heads, 1))
    for key in ("rope.dimension_count", "attention.value_length"):
        if get(key, head_dim) != head_dim:
            raise ValueError(
                f"{name}.{key} {get(key)} is not the head dimension {head_dim}: not supported"
            )
    config = {
        "model_type": dialect.model_type,
        "vocab_size": shapes.get("token_embd.weight", (0,))[0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length", kind=(int, list)),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads, (int, list)),
        "head_dim": head_dim,
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", kind=float),
        "max_position_embeddings": get("context_length"),
        "attention_bias": "blk.0.attn_output.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    config |= dialect.fields(get, shapes)
    rope = _rope(file, name, head_dim)
    if dialect.by_window:
        local = {"rope_theta": config.pop("rope_local_base"), "rope_type": "default"}
        rope = {"full_attention": rope, "sliding_attention": local}
    if get("expert_count", 0) and "num_experts" not in config:
        raise ValueError(f"{name}.expert_count is {get('expert_count')}: not supported")
    return FAMILIES[dialect.model_type].config(config | {"rope_parameters": rope})


def _dialect(file: GgufFile) -> tuple[str, Dialect]:
    """The architecture of a file, and how its files are read."""
    name = file.value("general.architecture", str)
    if name not in DIALECTS:
        raise ValueError(
            f"general.architecture {name!r} is not supported: use a model of {', '.join(DIALECTS)}"
        )
    return name, DIALECTS[name]


def _rope(file: GgufFile, name: str, head_dim: int) -> dict[str, Any]:
    """``rope_parameters``; Llama-3 scaling and a part that is not rotated are recognised by the
    divisors that they leave."""
    theta = file.value(f"{name}.rope.freq_base", float, 10000.0)
    kind = file.value(f"{name}.rope.scaling.type", str, "none")
    factor = file.value(f"{name}.rope.scaling.factor", float, 0.0)
    factor = factor or file.value(f"{name}.rope.scale_linear", float, 1.0)
    if not theta > 0:
        raise ValueError(f"{name}.rope.freq_base is {theta}: it must be positive")
    plain = {"rope_theta": theta, "rope_type": "default"}
    if kind == "yarn":
        length = file.value(f"{name}.rope.scaling.original_context_length", int)
        scaled = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
        attention = file.value(f"{name}.rope.scaling.attn_factor", float)
        return plain | scaled | ({} if attention is None else {"attention_factor": attention})
    if kind not in ("none", "linear"):
        raise ValueError(f"{name}.rope.scaling of type {kind!r} is not supported")
    divisors = [tensor for tensor in file.tensors if tensor.name == ROPE_FACTORS]
    if not divisors:
        return plain if factor == 1.0 else plain | {"rope_type": "linear", "factor": factor}
    wanted = _floats(divisors[0]).reshape(-1)
    rotated = wanted == 1.0
    if (wanted[~rotated] > NOT_ROTATED).all() and rotated.any() and not rotated.all():
        share = int(rotated.sum()) / len(rotated)
        return plain | {"rope_type": "proportional", "partial_rotary_factor": share}
    frequency = rope_frequencies(RopeConfig(theta), head_dim)
    # Every Llama-3 model has the band 1..4; the original context is a power of two.
    for positions in (2**power for power in range(4, 21)):
        rope = RopeConfig(theta, "llama3", float(wanted.max()), 1.0, 4.0, positions)
        if wanted.shape == frequency.shape and np.allclose(
            frequency / rope_frequencies(rope, head_dim), wanted, rtol=1e-4
        ):
            return rope_config_dict(rope)
    raise ValueError(
        f"tensor {ROPE_FACTORS} is no RoPE scaling of type llama3: it is not supported"
    )


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """Shape with the slowest axis first, as everywhere but in GGUF."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _tensors(file: GgufFile, cfg: TargetConfig, origin: str) -> Tensors:
    """The file's tensors under their Hugging Face names, dequantised when read."""
    _, dialect = _dialect(file)
    by_name = {
        _hf_name(tensor.name, dialect): tensor
        for tensor in file.tensors
        if tensor.name != ROPE_FACTORS
    }

    def read(name: str) -> np.ndarray:
        tensor = by_name[name]
        values = _floats(tensor).reshape(_shape(tensor))
        if dialect.shift and name.endswith("norm.weight"):
            return values - np.float32(dialect.shift)
        if dialect.pairs and ".q_proj." in name:
            return _halves(values, cfg.num_heads)
        if dialect.pairs and ".k_proj." in name:
            return _halves(values, cfg.num_kv_heads)
        return values

    for tensor in by_name.values():
        _check_type(tensor, origin)
    shapes = {name: _shape(tensor) for name, tensor in by_name.items()}
    return split_experts(Tensors(origin, shapes, read))


def _floats(tensor: gguf.ReaderTensor) -> np.ndarray:
    """The numbers of a tensor, float32 but where the file has more."""
    if tensor.tensor_type == gguf.GGMLQuantizationType.F64:
        return tensor.data
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def _check_type(tensor: gguf.ReaderTensor, origin: str) -> None:
    """Name a tensor that cannot be dequantised, before any is."""
    kind = tensor.tensor_type
    _, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        if kind != gguf.GGMLQuantizationType.F64:
            gguf.dequantize(np.zeros(size, np.uint8), kind)
    except NotImplementedError:
        raise LoadError(
            f"{origin}: tensor {tensor.name} has type {kind.name}, which the installed gguf "
            f"package does not turn into floats: update it, or take another quantisation"
        ) from None


def _hf_name(name: str, dialect: Dialect) -> str:
    """A GGUF tensor name as Hugging Face calls it; unknown names stay and are left over."""
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias|scale)", name)
    if match is None:
        return name
    whole = f"{match[2]}.{match[3]}"
    if whole in dialect.parts:
        return f"model.layers.{match[1]}.{dialect.parts[whole]}"
    if match[2] not in dialect.names:
        return name
    return f"model.layers.{match[1]}.{dialect.names[match[2]]}.{match[3]}"


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of every head from interleaved pairs back to two halves, rotated against each other."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return cast(np.ndarray, pairs.swapaxes(1, 2).reshape(rows.shape))
