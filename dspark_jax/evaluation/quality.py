"""How far a quantised target is from the plain one: divergence of its laws, and accepted lengths.

Both targets answer the prompts greedily. Then both read the plain target's answers, and at every
token of an answer their laws of the next one are compared: ``KL(plain || quantised)`` in nats, and
whether both would choose the same token. Blocks are verified whole, so that accepted lengths are
the drafter's with either target, and no policy's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.engine.config import round_up
from dspark_jax.engine.decoder import Decoder
from dspark_jax.engine.generate import generate
from dspark_jax.engine.request import Request
from dspark_jax.engine.setting import device_name
from dspark_jax.evaluation.prompts import Prompt, make_request_sets
from dspark_jax.evaluation.results import mean_accepted_length, sound
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import unembed
from dspark_jax.progress import progress
from pallas_kernels.dispatch import Kernels

LENGTHS = 128  # of what is read are multiples of it, so that few programs are compiled


def bench_quality(
    plain: Decoder,
    quantised: Decoder,
    sets: Mapping[str, Sequence[Prompt]],
    limits: Request,
    *,
    seed: int = 0,
    batch: int = 8,
    acceptance: Literal["rejection", "coupled"] = "rejection",
    kernels: Kernels = "auto",
) -> dict[str, Any]:
    """Compare a target with itself quantised, on the answers of some prompts.

    Args:
        plain: a model, with a drafter or without.
        quantised: the same one, quantised.
        sets: the prompts of each set by its name.
        limits: all of a request but prompt and key; greedy.
        seed: root of the keys.
        batch: prompts decoded together.
        acceptance: of ``EngineConfig``.
        kernels: likewise.

    Returns:
        ``rows``, one for each set and, of several, one for ``all`` of them: ``kl``, ``top1`` (share
        of the tokens at which both choose the same), ``tokens`` that were compared, ``same_text``
        (share of the prompts) and ``accepted_length`` of either, None without a drafter; the bytes
        of both models' weights, and the setting. JSON values.

    Raises:
        ValueError: a prompt cannot be used.
        FloatingPointError: a target's logits are not finite.
    """
    asked = make_request_sets(sets, plain, limits, seed)
    requests = [request for group in asked.values() for request in group]

    def answers(decoder: Decoder) -> list[Any]:
        policy = "none" if decoder.drafter is None else "block"
        options: dict[str, Any] = {"policy": policy, "acceptance": acceptance, "slots": batch}
        options["kernels"] = kernels
        return [sound(result) for result in generate(decoder, requests, **options)]

    both = list(zip(requests, answers(plain), answers(quantised), strict=True))
    pairs: dict[str, list[Any]] = {}
    compared = iter(progress(both, unit="prompt"))
    for name, group in asked.items():
        pairs[name] = []
        for request, ours, theirs in (next(compared) for _ in group):
            laws = compare_laws(plain, quantised, request.prompt_ids, ours.token_ids)
            pairs[name].append((ours, theirs, *laws))
    if len(pairs) > 1:
        pairs["all"] = [pair for group in pairs.values() for pair in group]
    drafts = plain.drafter is not None
    return {
        "rows": [{"set": name, **_summarise(group, drafts)} for name, group in pairs.items()],
        "weight_bytes": {"plain": _bytes_of(plain), "quantised": _bytes_of(quantised)},
        "max_new_tokens": limits.max_new_tokens,
        "device": device_name(),
        "jax": jax.__version__,
    }


def compare_laws(
    plain: Decoder, quantised: Decoder, prompt: Sequence[int], answer: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Both targets' laws at every token of an answer.

    Args:
        plain: of some sizes.
        quantised: of the same.
        prompt: ids.
        answer: ids.

    Returns:
        float32 divergences ``KL(plain || quantised)`` in nats, and bool whether both choose the
        same token; an entry for every token of the answer.
    """
    ids = [*prompt, *answer]
    token_S = np.zeros(round_up(len(ids), LENGTHS), np.int32)
    token_S[: len(ids)] = ids
    targets = plain.weights.target, quantised.weights.target
    kl_S, same_S = _compare(*targets, token_S[None], plain.target)
    answered = slice(len(prompt) - 1, len(ids) - 1)
    return np.asarray(kl_S)[answered], np.asarray(same_S)[answered]


def _divergence(plain: Any, quantised: Any, token_BS: jax.Array, cfg: Any) -> Any:
    family = family_of(cfg)

    def law(target: Any) -> jax.Array:
        hidden_BSD, _ = family.encode(target, token_BS, cfg)
        return jax.nn.log_softmax(unembed(target.vocab, hidden_BSD[0]))

    ours_SV, theirs_SV = law(plain), law(quantised)
    kl_S = jnp.sum(jnp.exp(ours_SV) * (ours_SV - theirs_SV), axis=-1)
    return kl_S, jnp.argmax(ours_SV, -1) == jnp.argmax(theirs_SV, -1)


_compare = jax.jit(_divergence, static_argnums=3)


def _summarise(group: Sequence[tuple[Any, ...]], drafts: bool) -> dict[str, Any]:
    ours, theirs, divergences, choices = zip(*group, strict=True)
    kl_X, same_X = np.concatenate(divergences), np.concatenate(choices)
    lengths = {"plain": mean_accepted_length(ours), "quantised": mean_accepted_length(theirs)}
    texts = zip(ours, theirs, strict=True)
    return {
        "prompts": len(group),
        "tokens": len(kl_X),
        "kl": float(f"{kl_X.mean():.4g}"),
        "top1": round(float(same_X.mean()), 4),
        "same_text": round(float(np.mean([a.token_ids == b.token_ids for a, b in texts])), 4),
        "accepted_length": lengths if drafts else None,
    }


def _bytes_of(decoder: Decoder) -> int:
    """Of all weights, those that are shared once."""
    return sum({id(leaf): leaf.nbytes for leaf in jax.tree.leaves(decoder.weights)}.values())


def format_quality(report: Mapping[str, Any]) -> str:
    """A report as a short table for people."""
    held = report["weight_bytes"]
    lines = [
        f"{report['target']} + {report['drafter']}: {report['weights']} against plain weights on "
        f"{report['device']}, jax {report['jax']}",
        f"{held['quantised'] / 1e6:.0f} MB against {held['plain'] / 1e6:.0f}; greedy answers of "
        f"at most {report['max_new_tokens']} tokens, whole blocks verified",
        "",
        f"{'':<16}{'prompts':>8}{'tokens':>8}{'KL':>10}{'top 1':>8}{'same text':>11}"
        f"{'length':>8}{'plain':>8}",
    ]
    for row in report["rows"]:
        lengths = row["accepted_length"] or {}
        said = [f"{lengths[k]:.2f}" if lengths else "-" for k in ("quantised", "plain")]
        lines.append(
            f"{row['set']:<16}{row['prompts']:>8}{row['tokens']:>8}{row['kl']:>10.4g}"
            f"{row['top1']:>8.3f}{row['same_text']:>11.2f}{said[0]:>8}{said[1]:>8}"
        )
    return "\n".join(lines)
