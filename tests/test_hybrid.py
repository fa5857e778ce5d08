"""DSpark with prompt lookup beside it: who drafts, in which vocabulary, and the text."""

import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax import load
from dspark_jax.models.drafters import hybrid
from dspark_jax.models.drafters.heads import DraftBlock
from dspark_jax.models.vocab import Vocab
from pallas_kernels.accept_block.rule import ONE_HOT
from tests.tiny_model import write_drafter, write_target


def found(token_BG, count_B):
    token_BG = jnp.array(token_BG, jnp.int32)
    return DraftBlock(token_BG, token_BG, ONE_HOT, None, jnp.array(count_B, jnp.int32))


def test_drafts_end_before_the_first_that_a_reduced_vocabulary_has_not():
    vocab = Vocab(None, None, jnp.array([9, 4, 7]))
    block = found([[7, 9, 4], [4, 5, 9], [5, 4, 4], [9, 9, 9]], [3, 3, 2, 1])
    index_BG, count_B = hybrid.places(block, vocab)
    assert count_B.tolist() == [3, 1, 0, 1]
    np.testing.assert_array_equal(index_BG[0], [2, 0, 1])
    index_BG, count_B = hybrid.places(block, Vocab(None))
    np.testing.assert_array_equal(index_BG, block.token_BG)
    assert count_B.tolist() == [3, 3, 2, 1]


def test_long_matches_win_and_their_law_is_certain(monkeypatch):
    """Of three texts one has a long match, one a short one, one a long one with nothing behind."""
    shape, ours = (3, 2, 5), jnp.full((3, 2), 3, jnp.int32)
    logits_BGU = jnp.broadcast_to(jnp.arange(5.0), shape)
    own = DraftBlock(ours, ours, logits_BGU, jnp.zeros((3, 2)))
    theirs = found([[1, 2]] * 3, [1, 2, 0]).replace(confidence_logit_BG=jnp.ones((3, 2)))
    monkeypatch.setattr(hybrid.dspark, "draft", lambda *_, **__: own)
    monkeypatch.setattr(hybrid.lookup, "draft", lambda *_, **__: theirs)

    class Known:
        match_B = jnp.array([6, 3, 6])

    cfg = hybrid.Config(Block(), None, least_match=4)
    context = hybrid.Context(None, Known())
    given = hybrid.Weights(None), Vocab(None), context, *[None] * 4
    block = hybrid.draft(*given, cfg, kernels="xla")
    np.testing.assert_array_equal(block.token_BG, [[1, 2], [3, 3], [3, 3]])
    assert block.count_B.tolist() == [1, 2, 2]
    np.testing.assert_array_equal(block.confidence_logit_BG[:, 0], [1, 0, 0])
    np.testing.assert_array_equal(block.logits_BGU[0, 0], [-np.inf, 0] + [-np.inf] * 3)
    np.testing.assert_array_equal(block.logits_BGU[1:], logits_BGU[1:])


class Block:
    """In the place of a configuration."""

    block_size = 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return write_target(folder / "target"), write_drafter(folder / "drafter")


@pytest.mark.parametrize("policy", ["block", pytest.param("delayed", marks=pytest.mark.full)])
def test_greedy_text_is_the_targets_own(folders, policy):
    target, drafter = folders
    given = {"max_new_tokens": 40, "temperature": 0, "seed": 0}
    (plain,) = load(target, "none").generate("abcabcabc", **given)
    model = load(target, f"{drafter}+lookup:1-3")
    (result,) = model.generate("abcabcabc", policy=policy, **given)
    assert result.token_ids == plain.token_ids
    assert model.drafter.endswith("+lookup")
    assert result.accepted_length > 1


def test_pairs_that_there_are_not_are_refused(folders):
    target, drafter = folders
    for name, message in (
        ("lookup+lookup", "lookup goes with a drafter that has weights"),
        (f"{drafter}+lookup:3-1", "give lengths from 1 to 16"),
        ("nowhere+lookup", "nowhere: no such directory"),
    ):
        with pytest.raises(ValueError, match=message):
            load(target, name)
