"""DeepSeek-V4 in the words of its ``config.json``, of the released files and of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dspark_jax.config import RopeConfig, TargetConfig
from dspark_jax.models.hyper_connections import Streams
from dspark_jax.models.targets.config_json import count_field, field, rope_config, size_config

SLIDING, SPARSE, HEAVY = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
SPARSE_RATIO, HEAVY_RATIO = 4, 128
HASHED, LEARNED = "hash_moe", "moe"
MAX_STEPS = 1000  # of a loop that no weight bounds


@dataclass(frozen=True)
class Config(TargetConfig):
    """Sizes of a target; ``rope`` is that of layers without compressed entries, and every layer has
    a window.

    Attributes:
        compressed_rope: of layers with compressed entries.
        rope_dim: rotated channels of a head, the last ones.
        query_rank: I, width of the latent that queries are made of.
        output_groups: groups of heads, between heads and width.
        output_rank: outputs of each.
        ratios: of every layer, positions of a compressed entry; 0 for none.
        sparse: layers whose rows attend to the best entries alone, by an indexer.
        index_heads: heads of an indexer.
        index_dim: their width.
        index_top: the entries that it chooses.
        num_streams: of the residual (:class:`Streams`).
        mix_steps: likewise.
        mix_eps: likewise.
        num_experts: E.
        num_chosen: experts of a token.
        expert_size: the width of one.
        num_shared: experts of every token, which are one of as many times the width.
        hashed: layers whose experts follow from the token alone, by a table.
        route_scale: what the weights of a token's experts add up to.
        limit: of what goes into the products of an expert.
    """

    compressed_rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    rope_dim: int = 64
    query_rank: int = 1024
    output_groups: int = 8
    output_rank: int = 1024
    ratios: tuple[int, ...] = ()
    sparse: tuple[int, ...] = ()
    index_heads: int = 64
    index_dim: int = 128
    index_top: int = 512
    num_streams: int = 4
    mix_steps: int = 20
    mix_eps: float = 1e-6
    num_experts: int = 256
    num_chosen: int = 6
    expert_size: int = 2048
    num_shared: int = 1
    hashed: tuple[int, ...] = ()
    route_scale: float = 1.5
    limit: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_dim % 2 or self.rope_dim > min(self.head_dim, self.index_dim):
            raise ValueError(
                f"qk_rope_head_dim {self.rope_dim} must be even, and at most head_dim "
                f"{self.head_dim} and index_head_dim {self.index_dim}"
            )
        if self.mix_steps > MAX_STEPS:
            raise ValueError(
                f"hc_sinkhorn_iters is {self.mix_steps}: it must be at most {MAX_STEPS}"
            )
        if len(self.ratios) != self.num_layers:
            raise ValueError(
                f"ratios {self.ratios} must name one for each of {self.num_layers} layers"
            )
        if self.num_heads % self.output_groups:
            raise ValueError(
                f"num_attention_heads {self.num_heads} must be a multiple of o_groups "
                f"{self.output_groups}"
            )
        if not 1 <= self.num_chosen <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_chosen} must lie in 1..{self.num_experts}, the "
                "number of experts"
            )

    @property
    def streams(self) -> Streams:
        """How the residual streams are mixed."""
        return Streams(self.num_streams, self.mix_steps, self.mix_eps, self.rms_norm_eps)

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size; K are the groups of heads, M is an expert's width."""
        return super().sizes | {
            "E": self.num_experts,
            "I": self.query_rank,
            "J": self.num_streams,
            "K": self.output_groups,
            "M": self.expert_size,
            "O": self.output_rank,
        }


def config(hf: Mapping[str, Any]) -> Config:
    """The configuration out of a ``config.json``.

    Raises:
        ValueError: a field is missing or wrong, or asks for something that is not supported.
    """
    expert_size = field(hf, "moe_intermediate_size", int, 2048)
    given = {**hf, "intermediate_size": expert_size, **_stored_types(hf)}
    sizes = size_config(given, field(hf, "head_dim", int, 512))
    _check_kind(hf)
    layers = sizes["num_layers"]
    ratios, sparse = _ratios(hf, layers)
    rope_dim = _rope_dim(hf, sizes["head_dim"])
    main, compressed = _ropes(hf, rope_dim / sizes["head_dim"])
    return Config(
        **sizes,
        rope=main,
        compressed_rope=compressed,
        rope_dim=rope_dim,
        query_rank=field(hf, "q_lora_rank", int, 1024),
        output_groups=field(hf, "o_groups", int, 8),
        output_rank=field(hf, "o_lora_rank", int, 1024),
        windows=(min(field(hf, "sliding_window", int, 128), sizes["max_positions"]),) * layers,
        ratios=ratios,
        sparse=sparse,
        index_heads=field(hf, "index_n_heads", int, 64),
        index_dim=field(hf, "index_head_dim", int, 128),
        index_top=field(hf, "index_topk", int, 512),
        num_streams=field(hf, "hc_mult", int, 4),
        mix_steps=field(hf, "hc_sinkhorn_iters", int, 20),
        mix_eps=field(hf, "hc_eps", float, 1e-6),
        num_experts=field(hf, "n_routed_experts", int, 256),
        num_chosen=field(hf, "num_experts_per_tok", int, 6),
        expert_size=expert_size,
        num_shared=field(hf, "n_shared_experts", int, 1),
        hashed=_hashed(hf, layers),
        route_scale=field(hf, "routed_scaling_factor", float, 1.5),
        limit=field(hf, "swiglu_limit", float, 10.0),
        tied=field(hf, "tie_word_embeddings", bool, False),
    )


def _stored_types(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What replaces the note of the released files that their matrices are e4m3 in blocks: these
    are read, whatever it says, by their own types and scales."""
    note = hf.get("quantization_config")
    fp8 = isinstance(note, dict) and note.get("quant_method") == "fp8"
    return {"quantization_config": None} if fp8 else {}


def _check_kind(hf: Mapping[str, Any]) -> None:
    """Refuse what the released models are not."""
    only: tuple[tuple[str, Any], ...] = (
        ("hidden_act", "silu"),
        ("scoring_func", "sqrtsoftplus"),
        ("topk_method", "noaux_tc"),
        ("norm_topk_prob", True),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("num_key_value_heads", 1),
    )
    for key, value in only:
        if hf.get(key) not in (None, value):
            raise ValueError(f"{key} is {hf[key]!r}: only {value!r} is supported")


def _listed(key: str, names: Any, layers: int, known: tuple[str, ...]) -> list[str]:
    """A list with one of the known names for each layer.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(names, list) or len(names) != layers or not all(n in known for n in names):
        raise ValueError(f"{key} must list {', '.join(known)} for each of the {layers} layers")
    return names


def _ratios(hf: Mapping[str, Any], layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ratio of every layer, and the layers that are sparse.

    Raises:
        ValueError: a spelling is wrong, or the two do not agree.
    """
    listed, types = hf.get("compress_ratios"), hf.get("layer_types")
    ratios: tuple[int, ...] | None = None
    if listed is not None:
        # The stages of a drafter stand behind the layers.
        sound = isinstance(listed, list) and all(type(m) is int and m >= 0 for m in listed)
        if not sound or len(listed) < layers:
            raise ValueError(
                f"compress_ratios must list integers of 0 or more for each of the {layers} layers"
            )
        ratios = tuple(listed[:layers])
    if types is None and ratios is not None:
        return ratios, tuple(n for n, ratio in enumerate(ratios) if ratio == SPARSE_RATIO)
    if types is None:  # as transformers has it
        types = [SPARSE if n > 2 and n % 2 else HEAVY for n in range(layers)]
    types = _listed("layer_types", types, layers, (SLIDING, SPARSE, HEAVY))
    rates = field(hf, "compress_rates", dict, {})
    ratio_of = {
        SLIDING: 0,
        SPARSE: field(rates, SPARSE, int, field(hf, "compress_rate_csa", int, SPARSE_RATIO)),
        HEAVY: field(rates, HEAVY, int, field(hf, "compress_rate_hca", int, HEAVY_RATIO)),
    }
    found = tuple(ratio_of[name] for name in types)
    if ratios not in (None, found):
        raise ValueError(
            f"compress_ratios {list(ratios or ())} and layer_types, by compress_rates {found}, do "
            "not agree: leave one of them out"
        )
    return found, tuple(n for n, name in enumerate(types) if name == SPARSE)


def _hashed(hf: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """The layers whose experts follow from the token."""
    names = hf.get("mlp_layer_types")
    if names is None:
        return tuple(range(min(layers, count_field(hf, "num_hash_layers", 3))))
    names = _listed("mlp_layer_types", names, layers, (HASHED, LEARNED))
    return tuple(n for n, name in enumerate(names) if name == HASHED)


def _rope_dim(hf: Mapping[str, Any], head_dim: int) -> int:
    """How many channels of a head are rotated."""
    if hf.get("qk_rope_head_dim") is None and hf.get("partial_rotary_factor") is not None:
        return round(field(hf, "partial_rotary_factor", float) * head_dim)
    return int(field(hf, "qk_rope_head_dim", int, 64))


def _ropes(hf: Mapping[str, Any], rotated: float) -> tuple[RopeConfig, RopeConfig]:
    """RoPE of layers without and with compressed entries.

    Args:
        hf: whose ``rope_parameters`` may be those of ``main`` and ``compress``; otherwise they, or
            ``rope_scaling``, are of the compressed layers.
        rotated: the part of a head's channels.
    """
    given = field(hf, "rope_parameters", dict, field(hf, "rope_scaling", dict, {}))
    bases = {"main": ("rope_theta", 10000.0), "compress": ("compress_rope_theta", 160000.0)}
    parts: dict[str, Any] = {"main": {}, "compress": given}
    if "main" in given or "compress" in given:
        parts = {name: field(given, name, dict) for name in bases}
    found = {}
    for name, (key, default) in bases.items():
        part = {**parts[name]}
        share = part.pop("partial_rotary_factor", None)
        if share is not None and share != rotated:
            raise ValueError(f"partial_rotary_factor of {name} is {share!r}: it must be {rotated}")
        # What the compressed layers are scaled by, flat files name beside another base.
        flat = parts["compress"] is given
        base = field(hf, key, float, default)
        part["rope_theta"] = base if flat else field(part, "rope_theta", float, base)
        rope = rope_config(
            {
                "rope_parameters": {"attention_factor": 1.0, **part},
                "max_position_embeddings": hf.get("max_position_embeddings"),
            }
        )
        if rope.kind not in ("default", "yarn") or rope.attention_factor != 1:
            raise ValueError(
                f"rope of {name} is {rope.kind!r} with an attention_factor of "
                f"{rope.attention_factor}: only yarn with a factor of 1 is supported"
            )
        found[name] = replace(rope, attention_factor=1.0)
    if found["main"].kind != "default":
        raise ValueError("rope of main is scaled: only that of compress may be")
    return found["main"], found["compress"]
