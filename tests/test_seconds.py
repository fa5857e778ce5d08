"""Seconds of rounds that an engine learns while it works."""

import pytest

from dspark_jax.scheduler.seconds import ENOUGH, WINDOW, Seconds
from dspark_jax.scheduler.shape import Shape, Sizes

SMALL, LARGE, WIDE = Sizes(2, 64), Sizes(2, 128), Sizes(4, 64)
ROWS = (4, 8)


def plain(sizes):
    return Shape(sizes, 0, sizes.slots, 0)


def drafted(rows, sizes=SMALL):
    return Shape(sizes, 3, rows, 0)


class Clock:
    """Rounds one after the other, as the engine reads them."""

    def __init__(self, before_s=None):
        self.seconds, self.number, self.now_s = Seconds(before_s or {}), 0, 0.0

    def run(self, shape, took_s, rounds=ENOUGH, steady=True):
        for _ in range(rounds):
            self.now_s += took_s
            self.seconds.read(self.number, shape, steady, self.now_s)
            self.number += 1

    def costs(self, sizes=SMALL, later=2, num_shards=1):
        return self.seconds.costs(self.number - 1 + later, sizes, ROWS, 3, num_shards)


def test_nothing_is_known_before_plain_rounds_were_seen():
    clock = Clock()
    clock.run(drafted(4), 2.0)
    clock.run(plain(SMALL), 1.0, ENOUGH - 1)
    assert clock.costs() is None
    clock.run(plain(SMALL), 1.0, 1)
    assert clock.costs().undrafted_s == 1.0
    assert clock.costs(WIDE) is None  # other slots say nothing


def test_what_was_never_seen_costs_what_it_cannot_undercut():
    clock = Clock()
    clock.run(plain(SMALL), 1.0)
    assert clock.costs().verify_s_K == (1.0, 1.0)  # so that it is tried
    clock.run(drafted(4), 1.5)
    assert clock.costs().verify_s_K == (1.5, 1.5)
    clock.run(drafted(8), 1.25)  # more rows never cost less: the others were slow by chance
    assert clock.costs().verify_s_K == (1.25, 1.25)
    clock.run(plain(LARGE), 1.2)
    assert clock.costs(LARGE).verify_s_K == (1.25, 1.25)
    costs = clock.costs(num_shards=3)
    assert (costs.buckets, costs.draft_s, costs.undrafted_s) == ((12, 24), 0.0, 1.0)


def test_the_lower_quartile_of_recent_rounds_counts():
    clock = Clock()
    clock.run(plain(SMALL), 1.0, WINDOW)
    clock.run(plain(SMALL), 9.0, WINDOW // 2 - 1)  # somebody else needed the machine
    assert clock.costs().undrafted_s == 1.0
    clock.run(plain(SMALL), 2.0, WINDOW)  # it is slower now
    assert clock.costs().undrafted_s == 2.0


def test_what_was_known_before_counts_until_it_is_seen_again():
    before_s = {plain(SMALL): 1.0, drafted(4): 1.5, drafted(8): 3.0}
    clock = Clock(before_s)
    assert clock.costs().undrafted_s == 1.0
    assert clock.costs().verify_s_K == (1.5, 3.0)
    clock.run(drafted(8), 2.0, ENOUGH - 1)
    assert clock.costs().verify_s_K == (1.5, 3.0)
    clock.run(drafted(8), 2.0, 1)
    clock.run(plain(LARGE), 1.25)
    assert clock.costs().verify_s_K == (1.5, 2.0)
    seen_s = {drafted(8): 2.0, plain(LARGE): 1.25}
    assert clock.seconds.known_s() == before_s | seen_s  # for later engines
    assert before_s[drafted(8)] == 3.0


def test_rounds_that_were_not_alone_do_not_count():
    clock = Clock()
    clock.run(plain(SMALL), 5.0, steady=False)
    assert clock.costs() is None
    clock.run(plain(SMALL), 1.0)
    assert clock.costs().undrafted_s == 1.0


@pytest.mark.parametrize("later", [0, 1])
def test_no_round_is_chosen_by_what_is_newer_than_two_rounds(later):
    """By number: that the times are known already changes nothing."""
    clock = Clock()
    clock.run(plain(SMALL), 1.0)
    clock.run(drafted(4), 7.0)
    assert clock.costs(later=later).verify_s_K[0] == 1.0  # two, then three of the three are known
    assert clock.costs(later=2).verify_s_K[0] == 7.0


def test_prompts_are_read_in_as_many_pieces_as_take_no_longer_than_others_shall_wait():
    counts, clock = (1, 4, 16), Clock()

    def within(limit_s, sizes=SMALL):
        return clock.seconds.chunks_within(clock.number + 2, sizes, counts, limit_s)

    def reading(count, num_draft=0):
        return Shape(SMALL, num_draft, 2, count)

    assert within(0.1) == counts  # whatever is not known is tried
    clock.run(plain(SMALL), 1.0)
    assert within(0.1) == counts
    clock.run(reading(1), 1.5)
    assert within(2.9) == within(0.1) == (1,)
    assert within(3.0) == (1, 4)  # 1.0 and four times 0.5
    clock.run(reading(4), 2.0)
    assert within(2.9) == (1, 4)  # they were cheaper than that
    assert within(5.0) == counts  # 1.0 and four times 1.0
    clock.run(reading(4, num_draft=3), 3.0)
    assert within(2.9) == (1,)  # while others draft
    assert within(0.1, LARGE) == counts
