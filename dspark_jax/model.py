"""Text in, text out: a target with its drafter, ready to use."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import platformdirs
from jax.sharding import Mesh

from dspark_jax.checkpoints.load import (
    Drafter,
    Target,
    default_drafter,
    load_drafter_for,
    load_target,
)
from dspark_jax.checkpoints.template import check_rendering, free_variables
from dspark_jax.checkpoints.tokenizer import chat_prompt_ids
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import Decoder, make_decoder, with_drafter
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.generate import MOST_SLOTS, config_for, serve
from dspark_jax.engine.kernels import choose_kernels
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Prompt, Request, key_of, seed_of, within_context
from dspark_jax.engine.setting import setting_of
from dspark_jax.engine.stream import Event
from dspark_jax.rendering import Rendering
from dspark_jax.rules import AcceptanceRule, Rule
from dspark_jax.scheduler.calibration import FILE_NAME, Calibration, read_calibration
from dspark_jax.scheduler.profile import read_profile, write_profile
from pallas_kernels import random
from pallas_kernels.dispatch import Kernels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """A target and its drafter on a device or a mesh, as :func:`load` gives it.

    Attributes:
        decoder: weights, sizes, tokenizer and calibration.
        target: its name.
        drafter: its name; ``"none"`` for plain decoding.
        kernels: the implementation of the operations of ``pallas_kernels``.
        template_variables: that the chat template looks at and that are free; none where it is not
            applied.

    >>> model = load()
    >>> (result,) = model.generate("Hello!", max_new_tokens=8)
    >>> len(result.token_ids) <= 8
    True
    """

    decoder: Decoder = dataclasses.field(repr=False)
    target: str
    drafter: str
    kernels: Kernels = "auto"
    template_variables: frozenset[str] = frozenset()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        n: int = 1,
        seed: int | None = None,
        policy: str | Rule = "",
        acceptance: AcceptanceRule = "rejection",
        draft_law: Rule | None = None,
        trace: bool = False,
        **limits: Any,
    ) -> list[Generation]:
        """Continue prompts, decoded together.

        Args:
            prompts: a message of the user, the turns of a conversation (``role``, ``content``), or
                several of either.
            n: samples of each prompt; above temperature 0 they differ.
            seed: of all randomness; None takes a fresh one. Each result says which it was.
            policy: which drafts are verified, as in ``EngineConfig``.
            acceptance: how they are accepted, likewise.
            draft_law: which law they are drawn from, likewise.
            trace: whether the results have every round, as ``RoundTrace``.
            **limits: of ``Request``: ``max_new_tokens``, ``temperature``, ``top_k``, ``top_p``,
                ``min_p``, ``stop_strings``, ``stop_ids`` (besides the model's own), ``logprobs``,
                ``top_logprobs``, penalties, ``logit_bias``, ``grammar``.

        Returns:
            The results, the n of a prompt one behind the other. On a mesh over several processes,
            all of which must call this alike, process 0 has them and the others have none.

        Raises:
            ValueError: a prompt or an option cannot be used; names it and the remedy.
        """
        requests, seed = self.requests(prompts, n=n, seed=seed, trace=trace, **limits)
        if not requests:
            return []
        with self.engine_for(
            requests, policy=policy, acceptance=acceptance, draft_law=draft_law
        ) as engine:
            results = list(serve(engine, requests))
        return [dataclasses.replace(result, seed=seed) for result in results]

    def stream(
        self,
        prompt: Prompt,
        *,
        seed: int | None = None,
        policy: str | Rule = "",
        acceptance: AcceptanceRule = "rejection",
        draft_law: Rule | None = None,
        **limits: Any,
    ) -> Generator[Event, None, None]:
        """Continue one prompt and give its text out as it is verified. Whoever stops reading ends
        the request.

        Args:
            prompt: as for :meth:`generate`; and so are all others.
            seed: likewise.
            policy: likewise.
            acceptance: likewise.
            draft_law: likewise.
            **limits: likewise.

        Yields:
            An ``Event`` a round that brings something to show.

        Raises:
            ValueError: the prompt or an option cannot be used; names it and the remedy.
        """
        requests, _ = self.requests([prompt], seed=seed, **limits)
        rules = {"policy": policy, "acceptance": acceptance, "draft_law": draft_law}
        return self._events(requests, rules)

    def requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        n: int = 1,
        seed: int | None = None,
        **limits: Any,
    ) -> tuple[list[Request], int]:
        """The requests of :meth:`generate`, for an ``Engine``, and the seed of their keys.

        Sample j of prompt i has the key ``fold_in(seed_key(seed), i, j)``.

        Args:
            prompts: as for :meth:`generate`; and so are all others.
            n: likewise.
            seed: likewise.
            **limits: likewise.

        Raises:
            ValueError: a prompt or an option cannot be used; names it and the remedy.
        """
        if type(n) is not int or n < 1:
            raise ValueError(f"n is {n!r}: ask for 1 or more samples of each prompt")
        own = {"prompt_ids", "prompt", "messages", "key"}
        known = {field.name for field in dataclasses.fields(Request)} - own
        for name in limits.keys() - known:
            raise ValueError(f"{name} is no option: known are {', '.join(sorted(known))}")
        root_2 = key_of(seed)
        several = _several(prompts)
        numbers = jnp.arange(len(several))[:, None], jnp.arange(n)
        key_XN2 = np.asarray(random.fold_in(jnp.asarray(root_2), *numbers))
        requests = []
        for number, prompt in enumerate(several):
            talk = isinstance(prompt, Sequence | Mapping) and not isinstance(prompt, str | bytes)
            what: Any = {"messages" if talk else "prompt": prompt}
            try:
                made = [Request(**what, key=key_2, **limits) for key_2 in key_XN2[number]]
                made = [one.resolve(self.decoder.encode, self.decoder.stop_ids) for one in made]
                made[0].check(self.decoder.target.max_positions, self.decoder.target.vocab_size)
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None
            requests += made
        requests = within_context(requests, self.decoder.target.max_positions)
        return requests, seed_of(root_2)

    @contextlib.contextmanager
    def engine_for(
        self,
        requests: Sequence[Request],
        *,
        policy: str | Rule = "",
        acceptance: AcceptanceRule = "rejection",
        draft_law: Rule | None = None,
        slots: int = MOST_SLOTS,
    ) -> Iterator[Engine]:
        """An engine that holds these requests, and no more slots than they need.

        Args:
            requests: of :meth:`requests`.
            policy: as for :meth:`generate`.
            acceptance: likewise.
            draft_law: likewise.
            slots: most requests that are decoded at once.
        """
        config = config_for(
            self.decoder,
            requests,
            policy=policy,
            acceptance=acceptance,
            draft_law=draft_law,
            kernels=self.kernels,
            slots=slots,
        )
        with self.engine_of(config) as engine:
            yield engine

    @contextlib.contextmanager
    def engine_of(self, config: EngineConfig) -> Iterator[Engine]:
        """An engine of this configuration. What rounds cost is read from the user's cache
        directory and kept there for the next one."""
        setting, profile = setting_of(self.decoder, config), None
        digest = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()
        path = cache_directory() / "rounds" / f"{digest[:16]}.json"
        with contextlib.suppress(ValueError):  # there is none yet, or it is damaged
            found = read_profile(path)
            found.of(setting)
            profile = found
        with Engine(self.decoder, config, profile) as engine:
            try:
                yield engine
            finally:
                learnt = engine.profile()
                with contextlib.suppress(OSError):  # a cache that cannot be written is no harm
                    if learnt is not None:
                        write_profile(path, learnt)

    def _events(
        self, requests: Sequence[Request], rules: dict[str, Any]
    ) -> Generator[Event, None, None]:
        with self.engine_for(requests, **rules) as engine:
            if engine.follows:
                engine.follow()
            else:
                yield from engine.submit(requests[0])


def _several(prompts: Any) -> list[Any]:
    """The prompts, which may be one: a message, or the turns of a conversation."""
    if isinstance(prompts, str | bytes | bytearray | Mapping) or not isinstance(prompts, Iterable):
        return [prompts]
    found = list(prompts)
    return [found] if found and all(isinstance(turn, Mapping) for turn in found) else found


def load(
    target: str | Path = "default",
    drafter: str | Path | None = None,
    *,
    dtype: Any = "float32",
    weights: str = "plain",
    mesh: Mesh | None = None,
    kernels: Kernels = "auto",
    system: str = "",
    chat_template: bool = True,
    template_args: Mapping[str, Any] | None = None,
    own_vocab: bool = False,
) -> Model:
    """A target and its drafter, with all that belongs to them: tokenizer and chat template, stop
    ids, the calibration beside the drafter. Compiled programs are kept in the user's cache
    directory for later processes, unless jax was given another.

    Args:
        target: ``"default"``, a Hugging Face directory or hub id, or a GGUF file.
        drafter: a directory or hub id, ``"default"``, ``"lookup"`` (prompt lookup of 2 to 4 tokens,
            ``"lookup:MIN-MAX"`` of others), a drafter with lookup where the text repeats itself
            (``"default+lookup"``), ``"first:N"`` (the target's own first N layers),
            ``"lookahead"`` (or ``"lookahead:N-W"``) or ``"none"``; None is the packaged drafter for
            the default target, the one inside the checkpoint of a target that has one, and none
            for all others.
        dtype: of the weights.
        weights: ``"plain"``; or ``"int8"`` or ``"fp8"``, which the matrices of the layers are
            turned into as they are read, with a scale for every output. Texts are then those of
            that target.
        mesh: of ``make_mesh``, onto which the weights are read; None for one device.
        kernels: the implementation of the operations of ``pallas_kernels``; "auto" is the kernels
            for GPUs wherever they can run.
        system: a system turn for prompts without one.
        chat_template: False reads prompts as plain text.
        template_args: arguments of the chat template, for instance ``{"enable_thinking": False}``.
        own_vocab: whether to draft with an embedding and LM head of the drafter's own, where it
            has them, in place of the target's.

    Raises:
        ValueError: a source is not there, broken or not supported, or the drafter does not fit.

    >>> load().drafter != "none"
    True
    """
    options: dict[str, Any] = {"own_vocab": own_vocab, "kernels": kernels}
    rendering = Rendering(system, chat_template, {} if template_args is None else template_args)
    (model,) = load_each(target, [drafter], rendering, jnp.dtype(dtype), weights, mesh, **options)
    return model


def load_each(
    target: str | Path,
    drafters: Sequence[str | Path | None],
    rendering: Rendering,
    dtype: Any,
    weights: str = "plain",
    mesh: Mesh | None = None,
    *,
    own_vocab: bool = False,
    kernels: Kernels = "auto",
) -> list[Model]:
    """One target, whose weights are there once, with each of several drafters. Arguments are those
    of :func:`load`, and how prompts are rendered."""
    use_compilation_cache()
    found = load_target(target, dtype, mesh, weights)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # its import sets another level
    check_rendering(found.tokenizer, rendering, found.name)
    bound = [_read_drafter(found, target, one, own_vocab, mesh, weights) for one in drafters]
    plain = make_decoder((found.cfg, found.params), None, found.tokenizer, mesh, donate=True)
    encode = partial(chat_prompt_ids, found.tokenizer, rendering=rendering)
    plain = dataclasses.replace(plain, encode=encode, stop_ids=found.stop_ids)
    variables, models = free_variables(found.tokenizer, rendering), []
    for loaded in bound:
        decoder, name = plain, "none"
        if loaded is not None:
            name, parts = loaded.name, (loaded.cfg, loaded.params, loaded.vocab)
            calibration = _calibration_of(loaded)
            decoder = with_drafter(plain, parts, found.params.vocab, calibration, donate=True)
        models.append(Model(decoder, found.name, name, choose_kernels(decoder, kernels), variables))
    return models


def _read_drafter(
    found: Target,
    target: str | Path,
    drafter: str | Path | None,
    own_vocab: bool,
    mesh: Mesh | None,
    weights: str,
) -> Drafter | None:
    """The drafter of a target that is asked for; None for none."""
    drafter = default_drafter(target) if drafter is None else drafter
    if str(drafter) == "none":
        return None
    return load_drafter_for(found, drafter, own_vocab=own_vocab, mesh=mesh, weights=weights)


def _calibration_of(drafter: Drafter) -> Calibration | None:
    """What lies beside a drafter."""
    if drafter.directory is None or not (drafter.directory / FILE_NAME).exists():
        return None
    return read_calibration(drafter.directory / FILE_NAME, drafter.cfg.block_size)


def use_compilation_cache() -> None:
    """Keep compiled programs for later runs, unless the user has set another place."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
        # The placing of weights is many programs of 30 ms each.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.01)


def cache_directory() -> Path:
    """The user's, for what need not be computed twice."""
    return Path(platformdirs.user_cache_dir("dspark-jax", appauthor=False))
