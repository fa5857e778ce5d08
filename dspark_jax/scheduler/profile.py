"""What rounds cost on this device with these models: seconds of every size that is compiled.

The scheduler weighs tokens against these seconds, so that they must never fall where a round grows:
by construction, a round costs at least as much as any with fewer rows, positions or chunks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_jax.files import read_json, write_atomically
from dspark_jax.scheduler.budget import RoundCosts
from dspark_jax.scheduler.shape import Shape, Sizes, holds

FORMAT = 1
REMEDY = "measure it anew with `dspark profile`"


@dataclass(frozen=True)
class Profile:
    """Seconds of rounds, as made by :func:`make_profile`.

    Attributes:
        setting: what they belong to, see :func:`setting_of`; more names may be among it.
        round_s: seconds of a whole round.
        draft_s: seconds of drafting for all slots, part of a round that drafts; empty where
            nothing drafts.
    """

    setting: Mapping[str, Any]
    round_s: Mapping[Shape, float]
    draft_s: Mapping[Sizes, float]

    def costs(self, sizes: Sizes, num_chunks: int = 0, num_shards: int = 1) -> RoundCosts:
        """The costs that a round of a drafting engine chooses among.

        Args:
            sizes: of the state.
            num_chunks: pieces of prompts that the round reads, a compiled number of them. What
                reading them adds to a round without a draft is left out of all choices: it is due
                in any case, and would make drafts look cheap.
            num_shards: data shards, whose rows count together.

        Raises:
            KeyError: it was not measured.
        """
        drafted = {
            shape.num_rows: seconds
            for shape, seconds in self.round_s.items()
            if shape.sizes == sizes and shape.num_draft and shape.num_chunks == num_chunks
        }
        draft_s = self.draft_s[sizes]
        undrafted_s = self.round_s[Shape(sizes, 0, sizes.slots, 0)]
        above_s = draft_s + self.round_s[Shape(sizes, 0, sizes.slots, num_chunks)] - undrafted_s
        return RoundCosts(
            buckets=tuple(num_shards * rows for rows in sorted(drafted)),
            verify_s_K=tuple(max(undrafted_s, drafted[rows] - above_s) for rows in sorted(drafted)),
            draft_s=draft_s,
            undrafted_s=undrafted_s,
        )

    def of(self, setting: Mapping[str, Any]) -> Mapping[Shape, float]:
        """The seconds of whole rounds, for an engine of this setting.

        Raises:
            ValueError: the profile belongs to another one; names the field that differs.
        """
        for field, value in setting.items():
            found = self.setting.get(field)
            if found != value:
                raise ValueError(
                    f"the profile does not belong here: its {field} is {found!r:.80} and not "
                    f"{value!r:.80}: {REMEDY}"
                )
        return self.round_s


def learnt_profile(setting: Mapping[str, Any], round_s: Mapping[Shape, float]) -> Profile | None:
    """A profile of whole rounds alone: what their drafts take is not known apart. Sizes without
    plain rounds are left out; None where nothing is left."""
    plain = {shape.sizes for shape in round_s if not (shape.num_draft or shape.num_chunks)}
    known_s = {shape: seconds for shape, seconds in round_s.items() if shape.sizes in plain}
    drafted = {shape.sizes for shape in known_s if shape.num_draft}
    return make_profile(setting, known_s, dict.fromkeys(drafted, 0.0)) if known_s else None


def make_profile(
    setting: Mapping[str, Any], round_s: Mapping[Shape, float], draft_s: Mapping[Sizes, float]
) -> Profile:
    """A profile of measured seconds, made monotone; what is monotone stays as it is.

    A round's seconds become the mean of two monotone bounds, the most that any smaller round took
    and the least that any larger one did: noise is spread to both sides. Drafting takes no more
    than what a drafted round costs above one that does not draft.
    """
    smooth = {
        shape: 0.5
        * (
            max(s for other, s in round_s.items() if holds(shape, other))
            + min(s for other, s in round_s.items() if holds(other, shape))
        )
        for shape in round_s
    }
    within = {}
    for sizes, seconds in draft_s.items():
        undrafted_s = smooth[Shape(sizes, 0, sizes.slots, 0)]
        drafted_s = min(
            s for shape, s in smooth.items() if shape.sizes == sizes and shape.num_draft
        )
        within[sizes] = min(seconds, drafted_s - undrafted_s)
    return Profile(setting, smooth, within)


def describe(shape: Shape) -> str:
    """A size of rounds for people."""
    drafted = "drafted" if shape.num_draft else "undrafted"
    return (
        f"{shape.sizes.slots} slots x {shape.sizes.positions} positions, {shape.num_rows} rows "
        f"{drafted}, {shape.num_chunks} chunks"
    )


def format_profile(profile: Profile) -> str:
    """A profile as a short table for people."""
    lines = [f"{'slots':>6}{'positions':>11}{'chunks':>8}{'draft':>10}  milliseconds of rounds"]
    keys = dict.fromkeys((shape.sizes, shape.num_chunks) for shape in profile.round_s)
    for sizes, chunks in keys:
        draft_s = profile.draft_s.get(sizes)
        draft = "-" if draft_s is None else f"{1000 * draft_s:.2f}"
        rounds = [
            f"{shape.num_rows} {'rows' if shape.num_draft else 'undrafted'} {1000 * seconds:.2f}"
            for shape, seconds in profile.round_s.items()
            if (shape.sizes, shape.num_chunks) == (sizes, chunks)
        ]
        lines.append(
            f"{sizes.slots:>6}{sizes.positions:>11}{chunks:>8}{draft:>10}  {', '.join(rounds)}"
        )
    return "\n".join(lines)


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile as JSON, atomically."""
    write_atomically(path, json.dumps(profile_json(profile), indent=1) + "\n")


def profile_json(profile: Profile) -> dict[str, Any]:
    """A profile as JSON values."""
    return {
        "format": FORMAT,
        "setting": dict(profile.setting),
        "rounds": [
            {
                "slots": shape.sizes.slots,
                "positions": shape.sizes.positions,
                "num_draft": shape.num_draft,
                "num_rows": shape.num_rows,
                "num_chunks": shape.num_chunks,
                "seconds": seconds,
            }
            for shape, seconds in profile.round_s.items()
        ],
        "drafts": [
            {"slots": sizes.slots, "positions": sizes.positions, "seconds": seconds}
            for sizes, seconds in profile.draft_s.items()
        ],
    }


def read_profile(path: Path) -> Profile:
    """A profile from a file; whether it belongs is for :meth:`Profile.check` to say.

    Raises:
        ValueError: the file is missing or damaged; the message says what is wrong.
    """
    content = read_json(path, "profile")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no profile of format {FORMAT}: {REMEDY}")
    try:
        if not isinstance(content.get("setting"), dict):
            raise ValueError("setting is no object")
        round_s = {
            Shape(Sizes(slots, positions), num_draft, num_rows, num_chunks): seconds
            for slots, positions, num_draft, num_rows, num_chunks, seconds in _rows(
                content, "rounds", ("num_draft", "num_rows", "num_chunks")
            )
        }
        draft_s = {Sizes(slots, positions): s for slots, positions, s in _rows(content, "drafts")}
        every = {shape.sizes for shape in round_s}
        if any(Shape(sizes, 0, sizes.slots, 0) not in round_s for sizes in every):
            raise ValueError("rounds has no undrafted ones of some sizes")
        if len({shape.num_draft for shape in round_s} - {0}) > 1:
            raise ValueError("rounds has several num_draft")
        if set(draft_s) != {shape.sizes for shape in round_s if shape.num_draft}:
            raise ValueError("drafts and drafted rounds are not of the same sizes")
    except ValueError as error:
        raise ValueError(f"{path}: {error}: {REMEDY}") from None
    return make_profile(content["setting"], round_s, draft_s)


def _rows(content: Any, field: str, sizes: tuple[str, ...] = ()) -> list[tuple[Any, ...]]:
    """The entries of a list in a file as tuples; ValueError says which is wrong."""
    entries, names = content.get(field), ("slots", "positions", *sizes)
    if not isinstance(entries, list):
        raise ValueError(f"{field} is no list")
    rows: list[tuple[Any, ...]] = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or set(entry) != {*names, "seconds"}:
            raise ValueError(f"{field}[{index}] needs exactly {', '.join(names)} and seconds")
        for name in names:
            least = 0 if name in ("num_draft", "num_chunks") else 1
            if type(entry[name]) is not int or not least <= entry[name] < 2**31:
                raise ValueError(f"{field}[{index}]: {name} is {entry[name]!r:.40}, not a size")
        seconds = entry["seconds"]
        lowest = 0.0 if field == "drafts" else math.ulp(0.0)
        if type(seconds) not in (int, float) or not lowest <= seconds < 1e9:
            raise ValueError(f"{field}[{index}]: seconds is {seconds!r:.40}, not positive seconds")
        rows.append((*(entry[name] for name in names), float(seconds)))
    if len({row[:-1] for row in rows}) < len(rows):
        raise ValueError(f"{field} has two entries of the same size")
    return rows
