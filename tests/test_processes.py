"""One engine over several processes: what process 0 tells, the others do; and what becomes of the
rest when one of them is gone."""

import dataclasses
import threading
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Client, Listener

import jax
import numpy as np
import pytest

from dspark_jax.engine import engine as engine_module
from dspark_jax.engine import peers
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.grammar import Grammar
from dspark_jax.engine.launch import Launcher, follow
from dspark_jax.engine.peers import Peers
from tests.marks import rest_full
from tests.test_engine import CONFIG, costs, decoder, requests


@pytest.fixture
def together(monkeypatch):
    """An engine that tells another process what it does, and the end of the line there."""

    def make(**changes):
        near, far = Pipe()
        monkeypatch.setattr(engine_module, "meet", lambda mesh: Peers([near]))
        made = Engine(decoder(), dataclasses.replace(CONFIG, **changes), costs(True))
        assert far.recv() == (made.config.pages,)
        return made, Peers([far])

    return make


@pytest.mark.parametrize("policy", rest_full(["delayed", "causal"], ("causal",)))
def test_who_follows_has_the_state_of_who_decides(together, policy):
    """Through moves, admissions, prompts in pieces, drafts that are made ahead, and grammars."""
    engine, heard = together(policy=policy)
    launcher = Launcher(engine._programs, engine._loop.launcher.weights)
    follower = threading.Thread(target=follow, args=(launcher, heard.hear))
    follower.start()
    asked = requests(5)
    if policy == "causal":
        asked.append(dataclasses.replace(asked[0], grammar=Grammar("regex", "[A-Z]{50,}")))
    streams = [engine.submit(request) for request in asked]
    engine.run()
    expected = engine._loop.launcher.state
    engine.close()
    follower.join()
    assert {stream.result.finish_reason for stream in streams} == {"length"}
    jax.tree.map(np.testing.assert_array_equal, launcher.state, expected)


def test_nobody_goes_on_without_a_process(together):
    engine, heard = together()
    stream = engine.submit(requests()[0])
    engine.step()
    heard.close()
    engine.run()
    assert "another process is gone" in str(stream.result.error)
    with pytest.raises(ValueError, match="the engine is closed"):
        engine.submit(requests()[0])
    engine, heard = together()
    engine._peers.close()
    with pytest.raises(RuntimeError, match="process 0 is gone: start all of them again"):
        heard.hear()


def test_weights_over_several_processes_stay(together):
    engine, _ = together()
    with pytest.raises(ValueError, match="make another engine"):
        engine.update_params(engine._loop.launcher.weights)


def test_strangers_are_no_peers():
    """They come before the others, with another key or none at all."""
    key, found = bytes(range(16)), []
    with Listener(("localhost", 0), authkey=key) as listener:
        waits = threading.Thread(target=lambda: found.extend(peers._accept(listener, 1)))
        waits.start()
        with pytest.raises(AuthenticationError):
            Client(listener.address, authkey=b"another")
        Client(listener.address).close()
        place = ["localhost"], listener.address[1], key.hex()
        other = Peers([peers._reach(*place)])
        waits.join()
    Peers(found).tell("all", "is well")
    assert other.hear() == ("all", "is well")
    with pytest.raises(RuntimeError, match=r"cannot be reached at localhost, port \d+"):
        peers._reach(*place)
