"""Which beginnings of texts are stored, and where: the bookkeeping of the host.

A text is a path of a tree with a node for every :data:`PAGE` of its tokens; the last one may have
fewer. A node is found by its tokens, never by a hash alone, and has a page of memory with the state
of its positions. State that only knows the latest positions (rings) cannot be cut into pages: of
that a node may have a snapshot, which is of use to texts that go on exactly behind the node.

Whenever a path is used it becomes the newest, from its end to its root. So a node is always newer
than those behind it, and the oldest of all is a leaf: it goes first where pages run short.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from pallas_kernels.ragged_attention.pages import PAGE

Ids = tuple[int, ...]


@dataclass(eq=False)
class Node:
    """A page of a text.

    Attributes:
        parent: the page before; None of the root.
        ids: its tokens, at most :data:`PAGE`.
        page: where the state of its positions lies.
        snapshot: where that of the positions up to its end lies; -1 for nowhere.
        anchor: the token behind these positions when the snapshot was taken, of which a drafter's
            context may know.
        children: by their tokens.
    """

    parent: Node | None
    ids: Ids
    page: int = -1
    snapshot: int = -1
    anchor: int = -1
    children: dict[Ids, Node] = field(default_factory=dict)


@dataclass(frozen=True)
class Prefix:
    """The beginning of a text that is stored.

    Attributes:
        count: positions.
        pages: that hold them, in their order.
        snapshot: of the state behind them; -1 where none is needed.
        copy: where slots hold pages, the stored page that the text shares in part alone, and its
            own page in the place of that; -1 for none.
    """

    count: int = 0
    pages: tuple[int, ...] = ()
    snapshot: int = -1
    copy: tuple[int, int] = (-1, -1)


NOTHING = Prefix()


@dataclass(frozen=True)
class Kept:
    """What is to be stored of a text that was not stored before.

    Attributes:
        first: page of the text that comes first.
        pages: where it and those behind it shall lie, unless they do already.
        snapshot: where a snapshot shall lie; -1 for none.
    """

    first: int = 0
    pages: tuple[int, ...] = ()
    snapshot: int = -1


class Prefixes:
    """The stored beginnings of texts of one data shard. Not thread-safe.

    Attributes:
        snapshots: how many there is room for; 0 where all state lies in pages.
        held_Q: bool, the pages that are in use.
    """

    def __init__(self, pages: int, snapshots: int = 0, among: int = 0) -> None:
        """Empty.

        Args:
            pages: that there is room for.
            snapshots: likewise.
            among: pages of the slots, which give the store theirs; 0 where it has its own.
        """
        self._most, self.snapshots, self._among = pages, snapshots, among
        self.clear()

    def __len__(self) -> int:
        """Pages that are in use."""
        return len(self._used)

    def clear(self) -> None:
        """Forget everything."""
        self._root = Node(None, ())
        self._used: OrderedDict[Node, None] = OrderedDict()  # oldest first
        self._with_snapshot: OrderedDict[Node, None] = OrderedDict()
        self.held_Q = np.zeros(self._among or self._most, bool)
        self._free_snapshots = list(range(self.snapshots))[::-1]

    def find(self, ids: Ids) -> Prefix:
        """The longest stored beginning of a text, short of its last token, which decoding reads.

        A drafter's context of a position may know the token behind it: a position counts where
        that token is the same, too.
        """
        path = self._whole_pages(ids)
        if self.snapshots:
            path = self._to_snapshot(path, ids)
            count = _count(path)
        else:
            rest = ids[PAGE * len(path) :][:PAGE]
            children = _end(path, self._root).children.values()
            best = max(children, key=lambda child: _common(child.ids, rest), default=None)
            more = 0 if best is None else _common(best.ids, rest)
            count = max(0, _count(path) + more - 1)
            path = [*path, best] if best is not None and more else path
        self._touch(path)
        pages = tuple(node.page for node in path[: -(-count // PAGE)])
        return Prefix(count, pages, path[-1].snapshot if path else -1)

    def keep(self, ids: Ids, anchor: int | None = None, own: Sequence[int] = ()) -> Kept:
        """Make room for the beginning of a text, or for as much of it as there can be.

        Args:
            ids: tokens whose positions were read.
            anchor: the token behind them, where the state is that of exactly these positions; None
                where it has gone further.
            own: pages of the slot, which lie where they are; empty for a store with its own.
        """
        path = self._whole_pages(ids)
        self._touch(path)
        first, pages = len(path), list[int]()
        for at in range(PAGE * first, len(ids), PAGE):
            before, part = _end(path, self._root), ids[at : at + PAGE]
            there = self._holding(before, part)
            if there is None:
                if len(self._used) == self._most and not self.give_up(path):
                    return Kept(first, tuple(pages))
                page = own[at // PAGE] if own else int(self.held_Q.argmin())
                there = before.children[part] = Node(before, part, page)
                self._used[there], self.held_Q[page] = None, True
                pages += [] if own else [page]
            path.append(there)
        snapshot = -1
        if self.snapshots and anchor is not None and path:
            snapshot = self._take_snapshot(path[-1], anchor)
        self._touch(path)
        return Kept(first, tuple(pages), snapshot)

    def give_up(self, but: Collection[Node] = ()) -> bool:
        """Forget the oldest page, unless it is one of some; returns whether there was one."""
        oldest = next(iter(self._used), None)
        if oldest is None or oldest in but:
            return False
        self._drop(oldest)
        return True

    def _whole_pages(self, ids: Ids) -> list[Node]:
        """The nodes that a text begins with and fills."""
        path: list[Node] = []
        for at in range(0, len(ids) - PAGE + 1, PAGE):
            found = _end(path, self._root).children.get(ids[at : at + PAGE])
            if found is None:
                break
            path.append(found)
        return path

    def _to_snapshot(self, path: list[Node], ids: Ids) -> list[Node]:
        """Of the paths along or beside one of whole pages, the longest that the text goes on from
        as it did when there was a snapshot; empty for none."""
        for depth in range(len(path), -1, -1):
            rest, before = ids[PAGE * depth :], path[:depth]
            children = _end(before, self._root).children.values()
            ends = [[*before, child] for child in children if child.ids == rest[: len(child.ids)]]
            ends = [end for end in ends if _goes_on(end, ids)]
            if ends:
                return max(ends, key=_count)
        return []

    def _holding(self, before: Node, part: Ids) -> Node | None:
        """The node that holds a part of a text already. Without snapshots a longer one will do, and
        shorter ones that the part goes on from are of no use any more."""
        if self.snapshots:
            return before.children.get(part)
        for child in list(before.children.values()):
            if child.ids[: len(part)] == part:
                return child
            if child.ids == part[: len(child.ids)]:
                self._drop(child)
        return None

    def _take_snapshot(self, node: Node, anchor: int) -> int:
        """Where the snapshot of a node shall lie; -1 where there is the same already."""
        if node.snapshot >= 0 and node.anchor == anchor:
            return -1
        if node.snapshot < 0:
            if not self._free_snapshots:
                self._drop_snapshot(next(iter(self._with_snapshot)))
            node.snapshot = self._free_snapshots.pop()
        node.anchor = anchor
        return node.snapshot

    def _touch(self, path: list[Node]) -> None:
        """Make a path the newest."""
        for node in reversed(path):
            self._used.move_to_end(node)
        if path and path[-1].snapshot >= 0:
            self._with_snapshot[path[-1]] = None
            self._with_snapshot.move_to_end(path[-1])

    def _drop(self, leaf: Node) -> None:
        """Forget a leaf."""
        assert leaf.parent is not None
        del leaf.parent.children[leaf.ids], self._used[leaf]
        self.held_Q[leaf.page] = False
        if leaf.snapshot >= 0:
            self._drop_snapshot(leaf)

    def _drop_snapshot(self, node: Node) -> None:
        self._free_snapshots.append(node.snapshot)
        node.snapshot = -1
        del self._with_snapshot[node]


def _end(path: list[Node], root: Node) -> Node:
    return path[-1] if path else root


def _count(path: list[Node]) -> int:
    """Positions of a path, of which all but the last node are whole."""
    return PAGE * (len(path) - 1) + len(path[-1].ids) if path else 0


def _goes_on(path: list[Node], ids: Ids) -> bool:
    """Whether a text goes on from a path as it did when there was a snapshot."""
    count, last = _count(path), path[-1]
    return last.snapshot >= 0 and count < len(ids) and last.anchor == ids[count]


def _common(one: Ids, other: Ids) -> int:
    """How many tokens are the same in front."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
