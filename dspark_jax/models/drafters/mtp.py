"""MTP: the layer that some models are trained with to see one token further, as a drafter
(DeepSeek-V3, arXiv 2412.19437, section 2.2; on a frozen target as FastMTP, arXiv 2509.18362).

Entry i pairs the target's last state at position i, normalised, with token i + 1:

    m_i = W [rms(embed(x_{i+1})) ; rms(h_i)]          s_i = layer(m_i)

One decoder layer of the target's kind, causal over the entries, at rotary position i. Its output
predicts token i + 2, through a norm of its own and the target's LM head, and takes the place of h
in a chain of drafts (:mod:`.chain`): as it is, or behind that norm. The entry at position 0 has an
embedding of zeros, as serving engines compute it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import Param, declare, map_params
from dspark_jax.config import DrafterConfig, TargetConfig, TransformerConfig
from dspark_jax.models.drafters import chain
from dspark_jax.models.drafters.chain import ChainConfig, Entry, Links
from dspark_jax.models.drafters.chain import declare_context as declare_context
from dspark_jax.models.drafters.chain import for_decoding as for_decoding
from dspark_jax.models.drafters.dspark import sections as sections
from dspark_jax.models.drafters.family import Lessons, Reads
from dspark_jax.models.layers import matmul, rms_norm
from dspark_jax.models.stacks import only_layer, place_of, stacks_of
from dspark_jax.models.targets.table import draft_blocks_of
from dspark_jax.models.vocab import Vocab, embed

lessons: Lessons = "chains"
reads: Reads = "state"

CHAIN = 3  # drafts a round: a target's files do not say, and each is one more pass of the layer


@dataclass(frozen=True)
class Config(ChainConfig):
    """Sizes of a drafter; feature layers mean nothing."""

    @property
    def file_layer(self) -> str:
        """What the names of all tensors begin with: a layer behind those of the target."""
        return f"model.layers.{self.num_target_layers}."


def of_recipe(fields: Mapping[str, Any]) -> Config:
    """The configuration of a drafter that is trained.

    Args:
        fields: of a ``DrafterConfig``, without a confidence head.
    """
    return Config(**{**fields, "confidence": True})


def inside(
    hf: Mapping[str, Any], target: TargetConfig, names: Collection[str]
) -> DrafterConfig | None:
    """The configuration of the drafter in a target's checkpoint; None where it holds none.

    Args:
        hf: the target's ``config.json``.
        target: its configuration.
        names: of its tensors that are not the target's: those of DeepSeek-V3 and GLM, or those of
            Qwen3-Next, whose chains go on with the normalised state.
    """
    after_norm = "mtp.fc.weight" in names
    if not after_norm and f"model.layers.{target.num_layers}.eh_proj.weight" not in names:
        return None
    kept = {field.name for field in dataclasses.fields(TransformerConfig)} - {"windows"}
    fields = {name: getattr(target, name) for name in kept}
    return Config(
        **fields | {"num_layers": 1},
        block_size=CHAIN,
        num_target_layers=target.num_layers,
        owns_vocab=False,
        norm_output=after_norm,
    )


@struct.dataclass
class Params:
    """Weights of a drafter.

    Attributes:
        token_norm_D: norm of the embedding.
        state_norm_D: norm of the state.
        entry_ID: W, which reads both, the embedding first.
        layers: the layer, a stack of one.
        norm_D: final norm.
        head: None; others have a sequential one.
        confidence: None, likewise.
    """

    token_norm_D: Any
    state_norm_D: Any
    entry_ID: Any
    layers: Any
    norm_D: Any
    head: Any = None
    confidence: Any = None


def declare_drafter(cfg: Config) -> Params:
    """Declaration of every trainable parameter under its name in DeepSeek-V3's checkpoints."""
    sizes = cfg.sizes | {"I": 2 * cfg.hidden_size}
    (stack,) = stacks_of(sections(cfg))

    def behind_the_target(param: Param) -> Param:
        number = cfg.num_target_layers
        return replace(param, name=f"model.{param.name}", layers=range(number, number + 1))

    def norm(name: str) -> Param:
        return declare("D", sizes, f"{cfg.file_layer}{name}.weight", init="ones")

    return Params(
        token_norm_D=norm("enorm"),
        state_norm_D=norm("hnorm"),
        entry_ID=declare("ID", sizes, f"{cfg.file_layer}eh_proj.weight", out="D"),
        layers=(map_params(behind_the_target, draft_blocks_of(cfg).declare(cfg, stack)),),
        norm_D=norm("shared_head.norm"),
    )


def last_state(drafter: Params, feature_XFD: jax.Array) -> jax.Array:
    """``h`` [X, D], the one feature there is."""
    return feature_XFD[..., 0, :]


def begin_entry(
    drafter: Params,
    vocab: Vocab,
    token_X: jax.Array,
    state_XD: jax.Array,
    position_X: jax.Array,
    cfg: Config,
) -> Entry:
    """Entries up to their attention; arguments as in :class:`~.chain.Links`."""
    blocks, layer = draft_blocks_of(cfg), only_layer(drafter.layers)
    e_XD = embed(vocab, token_X).astype(drafter.norm_D.dtype)
    e_XD = jnp.where(position_X[..., None] == 0, 0, e_XD)
    e_XD = rms_norm(e_XD, drafter.token_norm_D, cfg.rms_norm_eps)
    h_XD = rms_norm(state_XD.astype(e_XD.dtype), drafter.state_norm_D, cfg.rms_norm_eps)
    m_XD = matmul(jnp.concatenate([e_XD, h_XD], axis=-1), drafter.entry_ID)
    place, shared = place_of(sections(cfg), 0), blocks.shared(position_X, cfg)
    return Entry(m_XD, *blocks.project(layer, m_XD, place, shared, cfg))


_LINKS = Links(last_state, begin_entry)

observe = functools.partial(chain.observe, _LINKS)
draft = functools.partial(chain.draft, _LINKS)
train_blocks = functools.partial(chain.train_blocks, _LINKS)
