"""The serving engine: requests arrive and leave, and share the rounds of one state.

What the rounds are is in ``loop.py``; here is who may call it and what becomes of its faults. All
rounds are run by one thread of the engine's own, so that an interrupt reaches whoever waits and
never a round that is half done. Whatever the loop raises is blamed on the request whose admission
raised it, if there is one; everybody else goes on from the tokens that the host has.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import jax

from dspark_jax.engine.compiled import Programs
from dspark_jax.engine.config import EngineConfig, make_ladder
from dspark_jax.engine.decoder import Decoder, without_drafter
from dspark_jax.engine.inputs import Weights, replace_weights
from dspark_jax.engine.launch import Launcher, follow
from dspark_jax.engine.loop import Loop
from dspark_jax.engine.memory import check_sizes, complete
from dspark_jax.engine.peers import Gone, Peers, meet, nobody
from dspark_jax.engine.programs import num_shards
from dspark_jax.engine.reader import Reader
from dspark_jax.engine.request import Request, within_context
from dspark_jax.engine.seats import Tenant
from dspark_jax.engine.setting import setting_of
from dspark_jax.engine.shaping import is_shaped
from dspark_jax.engine.stats import Stats
from dspark_jax.engine.stream import Bell, Mailbox, Stream
from dspark_jax.rules import known_acceptance
from dspark_jax.scheduler.calibration import confidence_temperatures
from dspark_jax.scheduler.policy import make_policy
from dspark_jax.scheduler.profile import Profile, learnt_profile
from dspark_jax.scheduler.seconds import Seconds
from dspark_jax.scheduler.shape import Shape
from dspark_jax.tracing import Trace

logger = logging.getLogger(__name__)


class Loaded(Protocol):
    """What holds a decoder, as ``dspark_jax.Model`` does."""

    @property
    def decoder(self) -> Decoder:
        """Weights, tokenizer and mesh."""
        ...


class Engine:
    """Serves requests with one set of weights. Use as a context manager, or call :meth:`close`.

    Every method may be called from any thread. Rounds are run while somebody iterates over a
    stream, waits for one, or calls :meth:`run`; after :meth:`start` they are run by themselves.

    >>> with Engine(load(), EngineConfig(slots=2, positions=512)) as engine:
    ...     result = engine.submit(Request(prompt="Hello!", max_new_tokens=8)).wait()
    >>> len(result.token_ids) <= 8
    True
    """

    def __init__(
        self,
        model: Loaded | Decoder,
        config: EngineConfig | None = None,
        profile: Profile | None = None,
    ) -> None:
        """Nothing is compiled before it is needed; :meth:`compile` compiles all programs ahead.

        Args:
            model: of ``dspark_jax.load``, or a decoder.
            config: sizes and policy; None for ``EngineConfig()``.
            profile: what rounds cost, as far as it is known before any of them was run.

        Raises:
            ValueError: the sizes do not fit the models, the mesh or the memory, the profile belongs
                to something else, or the kernels do not run here.
            RuntimeError: the mesh has devices of other processes, which cannot be reached.
        """
        decoder = model if isinstance(model, Decoder) else model.decoder
        config = config or EngineConfig()
        config = complete(decoder, config)
        self._peers = meet(decoder.mesh)
        if self._peers is not None:  # memory may be free for more pages here than there
            config = replace(config, pages=self._peers.agree(config.pages))
        self.config = config
        self.policy = make_policy(config.policy, decoder.drafter)
        if self.policy.kind == "none":
            decoder = without_drafter(decoder)
        ladder = make_ladder(config, self.policy, num_shards(decoder.mesh))
        check_sizes(decoder, config, ladder)
        before_s: Mapping[Shape, float] = {}
        self._setting = setting_of(decoder, config)
        if profile is not None and self.policy.needs_seconds:
            before_s = profile.of(self._setting)
        self._limits = decoder.target.max_positions, decoder.target.vocab_size
        self._encode, self._stop_ids = decoder.encode, decoder.stop_ids
        self._tokenizer, self._calibration = decoder.tokenizer, decoder.calibration
        self._block_size = 0 if decoder.drafter is None else decoder.drafter.block_size
        self._programs = Programs(decoder, config, self.policy, ladder)
        launcher = Launcher(self._programs, decoder.weights)
        tell = nobody if self._peers is None else self._peers.tell
        self._loop = Loop(launcher, Seconds(before_s), tell)
        self._arrivals = itertools.count()
        self._lock = threading.RLock()  # of the rounds: held for as long as one takes
        self._door = threading.Lock()  # of all that is told to their thread: never held for long
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dspark-engine")
        self._stepping: asyncio.Future[Any] | None = None
        self._bell: Bell | None = None
        self._started = self._closed = False
        self._lost: Gone | None = None
        self._next: Future[None] | None = None
        self._tokens_at_fault = -1
        self.trace: Trace | None = None  # of some of the rounds, where somebody asks for it

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def follows(self) -> bool:
        """Whether another process decides for the devices of this one: :meth:`follow` it."""
        return self._peers is not None and self._peers.follows

    @property
    def lost(self) -> Gone | None:
        """Why the engine has ended by itself: another process of its mesh is gone."""
        return self._lost

    def follow(self) -> None:
        """Do what process 0 decides until its engine is closed, on a mesh that has devices of
        several processes. All of them make the same engine; requests are submitted, and texts
        appear, in process 0 alone.

        Raises:
            RuntimeError: another process is not there any more.
        """
        assert self._peers is not None
        try:
            follow(self._loop.launcher, self._peers.hear)
        except jax.errors.JaxRuntimeError as error:
            raise Gone(f"a round failed ({error})") from error

    def submit(self, request: Request, priority: int = 0) -> Stream:
        """Queue a request: higher priorities first, then by arrival.

        Raises:
            ValueError: the request cannot be served by this engine, or not from this process, or
                its grammar does not compile; the message has the remedy.
            queue.Full: ``config.queue`` requests wait already.
        """
        if self.follows:
            raise ValueError("process 0 decides for these devices: submit there, and follow() here")
        request = request.resolve(self._encode, self._stop_ids)
        request.check(*self._limits)
        self.config.check(request, self._limits[0])
        (request,) = within_context([request], self._limits[0])
        reader = Reader(request, request.max_new_tokens, self._tokenizer, self._limits[1])
        reader.result.lossless = self.config.lossless
        mailbox = Mailbox(reader)
        sampled = known_acceptance(self.config.acceptance), request.temperature
        temperature_G = confidence_temperatures(self._calibration, *sampled, self._block_size)
        kind = (request.temperature == 0, is_shaped(request)), tuple(temperature_G.tolist())
        stream = Stream(mailbox, self.step, self._news, self._lock)
        with self._door:
            if self._closed:
                raise ValueError("the engine is closed: start another one")
            if self._loop.waiting >= self.config.queue:
                raise queue.Full(
                    f"{self.config.queue} requests wait already: try again later, or start the "
                    "engine with a longer queue"
                )
            arrival, length = next(self._arrivals), len(request.prompt_ids)
            self._loop.add(Tenant(mailbox, reader, kind, arrival, request, length), priority)
            self._go_on()
        return stream

    def start(self) -> Engine:
        """Run rounds from now on while there are requests, whether anybody waits for them or not.

        Returns:
            The engine itself.
        """
        with self._door:
            self._started = True
            self._go_on()
        return self

    def step(self) -> bool:
        """Plan and launch a round, after reading the round before the last.

        Returns:
            Whether anything is left to do.
        """
        with self._door:
            if self._closed:
                return False
            turn = self._thread.submit(self._step)
        return turn.result()

    def run(self) -> None:
        """Serve until every request is over."""
        while self.step():
            pass

    def settle(self) -> None:
        """Wait for the rounds in flight and read them."""
        with self._door:
            if self._closed:
                return
            turn = self._thread.submit(self._guarded, self._loop.settle)
        turn.result()

    def stats(self) -> Stats:
        """How many requests run and wait, and how fast and how well it goes; at once, whatever the
        engine is doing."""
        running, waiting = self._loop.running, self._loop.waiting
        return self._loop.tally.stats(running, waiting, time.perf_counter())

    def profile(self) -> Profile | None:
        """What rounds cost, as far as it was given or learnt, for later engines of this setting;
        None where nothing is known or the policy does not ask."""
        if not self.policy.needs_seconds:
            return None
        with self._lock:
            return learnt_profile(self._setting, self._loop.seconds.known_s())

    def update_params(self, weights: Weights) -> None:
        """Other weights from the next round on, without a new compilation.

        Requests under way go on with caches that the old weights wrote. Stored prefixes are
        forgotten.

        Raises:
            ValueError: shapes, dtypes or structure differ, or the mesh has devices of several
                processes, whose rounds would change their weights at different times.
        """
        if self._peers is not None:
            raise ValueError("a mesh over several processes keeps its weights: make another engine")
        if self.policy.kind == "none":
            weights = Weights(weights.target)
        with self._lock:
            launcher = self._loop.launcher
            launcher.weights = replace_weights(launcher.weights, weights)
            self._loop.forget_prefixes()

    def close(self) -> None:
        """Cancel everything and give the memory back; other processes are told."""
        with self._door:
            was_open, self._closed = not self._closed, True
        with self._lock:
            if self._peers is not None and was_open:
                if not self.follows:
                    with contextlib.suppress(RuntimeError):  # one is gone before us
                        self._peers.tell()
                self._peers.close()
            self._loop.close()
        self._thread.shutdown(wait=False)

    def compile(self, background: bool = False) -> None:
        """Compile all programs ahead, with a progress bar.

        Args:
            background: do it in a thread, without waiting; it ends with the engine.
        """
        if background:
            main = threading.main_thread()  # which may end before the engine is closed
            stop = (lambda: self._closed or not main.is_alive(),)
            threading.Thread(target=self._programs.compile, args=stop).start()
        else:
            self._programs.compile()

    # In the engine's own thread.

    def _step(self) -> bool:
        if self.trace is not None:
            self.trace.turn()
        self._guarded(self._loop.step)
        return self._loop.busy and not self._closed

    def _guarded(self, work: Any) -> None:
        """A part of the loop; what it raises ends one request at most."""
        with self._lock:
            if self._closed:
                return
            try:
                work()
            except Exception as error:
                if self._peers is not None:
                    self._give_up(self._peers, error)
                else:
                    self._blame(error)
            except BaseException:
                self._loop.start_over()
                raise

    def _give_up(self, peers: Peers, error: Exception) -> None:
        """End all requests and the engine: what other processes have launched, nobody knows."""
        peers.close()  # they cannot go on either
        self._closed = True
        if not isinstance(error, Gone):
            error = Gone(f"a round failed ({type(error).__name__}: {error})")
        self._loop.close(error)
        self._lost = error

    def _blame(self, error: Exception) -> None:
        """End the request that is at fault, where that is known, and let the others start over.

        Where several were admitted together, all start over one by one, so that it will be known.
        Where nobody was admitted nobody is at fault; but if that happens twice without a token in
        between, the newest request is ended, lest it goes on for ever.
        """
        loop = self._loop
        guilty, stuck = None, self._tokens_at_fault == loop.tally.tokens
        if len(loop.suspects) == 1:
            guilty = loop.suspects[0]
        elif not loop.suspects and stuck:
            guilty = loop.newest()
        logger.warning(
            "a round failed (%s: %s): %s", type(error).__name__, error,
            "its request ends, the others go on" if guilty else "all requests go on",
        )  # fmt: skip
        loop.start_over()
        if guilty is not None:
            guilty.mailbox.fail(error)
            loop.drop(guilty)
        loop.one_by_one = loop.waiting
        self._tokens_at_fault = loop.tally.tokens

    def _go_on(self) -> None:
        """One more step of a started engine, and then the next. Behind the door."""
        waits = self._next is None or self._next.done()
        if self._started and waits and self._loop.busy and not self._closed:
            self._next = self._thread.submit(self._turn)

    def _turn(self) -> None:
        try:
            self._step()
        finally:
            with self._door:
                self._next = None
                self._go_on()

    # In event loops.

    async def _news(self, mailbox: Mailbox) -> None:
        """Wait until there may be news of a request: a started engine tells, others are driven."""
        loop = asyncio.get_running_loop()
        if not self._started:
            await self._step_async(loop)
            return
        if self._bell is None or self._bell.loop is not loop:
            self._bell = Bell(loop)
        await self._bell.wait(mailbox)

    async def _step_async(self, loop: asyncio.AbstractEventLoop) -> None:
        """One step, shared by all who wait for it in this event loop."""
        turn = self._stepping
        if turn is None or turn.done() or turn.get_loop() is not loop:
            turn = self._stepping = asyncio.wrap_future(self._thread.submit(self._step), loop=loop)
        await asyncio.shield(turn)
