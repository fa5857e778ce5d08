"""SentencePiece vocabularies: pieces with scores, out of a ``tokenizer.model`` or a GGUF file.

The sentencepiece library cuts a text into pieces; the tokenizers library does the rest (special
tokens, ids, byte fallback, and where every token lies in the text).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import (
    AddedToken,
    NormalizedString,
    PreTokenizedString,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from dspark_jax.checkpoints.tensors import LoadError, read_json

# Types of pieces; SentencePiece and GGUF number them alike.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
SQUEEZED = (("^ +| +$", ""), (" {2,}", " "))
BLOCK = 256  # pieces; cutting a long text in two steps saves time that grows with its square


@dataclass(frozen=True)
class Pieces:
    """A vocabulary; piece i has the id i.

    Attributes:
        texts: of the pieces; spaces are written as U+2581.
        scores: one of each piece.
        kinds: likewise.
        model_type: SentencePiece's: BPE joins the neighbours whose piece has the highest score.
        prefix: where a space is put in front: of ``"every"`` text between special tokens, of the
            ``"first"`` if the text begins with it, or of ``"none"``.
        squeeze: whether spaces are trimmed, and several become one.
        charsmap: SentencePiece's compiled normalisation; empty for none.
        added: further tokens by their ids; may give pieces other names.
    """

    texts: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    model_type: int = ModelProto().trainer_spec.BPE
    prefix: str = "every"
    squeeze: bool = False
    charsmap: bytes = b""
    added: dict[int, AddedToken] = field(default_factory=dict)


@dataclass(frozen=True)
class Cutter:
    """A pre-tokenizer that cuts where the sentencepiece library does."""

    processor: SentencePieceProcessor
    prefix: str

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        """Called by the tokenizers library with what lies between special tokens."""
        blocks: list[list[int]] = []

        def into_blocks(place: int, part: NormalizedString) -> list[NormalizedString]:
            if not part.normalized:
                return [part]
            part.replace(" ", SPACE)
            if self.prefix == "every" or (self.prefix == "first" and place == 0):
                part.prepend(SPACE)
            pieces = self.processor.encode(part.normalized, out_type=str)
            sizes = [len(piece) for piece in pieces]
            found = [sizes[first : first + BLOCK] for first in range(0, len(sizes), BLOCK)]
            blocks.extend(found)
            return list(_cut(part, map(sum, found)))

        text.split(into_blocks)
        sizes = iter(blocks)
        text.split(lambda place, part: list(_cut(part, next(sizes))))


def _cut(text: NormalizedString, sizes: Any) -> Iterator[NormalizedString]:
    """Parts of these sizes, one behind the other."""
    first = 0
    for size in sizes:
        part = text[first : first + size]
        assert part is not None
        yield part
        first += size


def make_cutter(pieces: Pieces) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of a vocabulary.

    Raises:
        RuntimeError: the sentencepiece library does not take the pieces.
    """
    model = ModelProto()
    model.trainer_spec.model_type = pieces.model_type
    # The text has been normalised when it comes here.
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = False
    model.pieces.add(piece="<unk>", type=UNKNOWN)
    for text, score, kind in zip(pieces.texts, pieces.scores, pieces.kinds, strict=True):
        if kind in (NORMAL, USER_DEFINED, UNUSED) and text not in ("", "<unk>"):
            model.pieces.add(piece=text, score=score, type=kind)
    processor = SentencePieceProcessor(model_proto=model.SerializeToString())
    return pre_tokenizers.PreTokenizer.custom(Cutter(processor, pieces.prefix))


def piece_tokenizer(pieces: Pieces, bos: int | None) -> Tokenizer:
    """All of a tokenizer but its cutter, which cannot be copied.

    Args:
        pieces: the vocabulary.
        bos: the id that a text begins with.
    """
    texts = dict(enumerate(pieces.texts)) | {i: t.content for i, t in pieces.added.items()}
    kinds = pieces.kinds
    unknown = next((texts[i] for i, kind in enumerate(kinds) if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        BPE(
            {text: index for index, text in texts.items()},
            [],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=BYTE in kinds,
            ignore_merges=True,
        )
    )
    steps: list[Any] = [normalizers.Precompiled(pieces.charsmap)] if pieces.charsmap else []
    if pieces.squeeze:
        steps += [normalizers.Replace(Regex(pattern), to) for pattern, to in SQUEEZED]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    trim = [decoders.Strip(" ", 1, 0)] if pieces.prefix != "none" else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *trim]
    )
    special = [texts[i] for i, kind in enumerate(kinds) if kind in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    added = pieces.added.values()
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{texts[bos]} $A", special_tokens=[(texts[bos], bos)]
        )
    return tokenizer


def read_pieces(path: Path, config: Mapping[str, Any]) -> tuple[Pieces, dict[str, str], int | None]:
    """The vocabulary of a ``tokenizer.model``.

    Args:
        path: the file.
        config: the ``tokenizer_config.json`` beside it.

    Returns:
        The vocabulary; names of the special tokens by their roles (``bos_token``, ...); and the id
        that a text begins with.

    Raises:
        LoadError: it is no SentencePiece model.
    """
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:  # the protocol buffers' own
        model = ModelProto()
    if not model.pieces:
        raise LoadError("this is no SentencePiece model")
    spec, normal = model.trainer_spec, model.normalizer_spec
    first = "every" if config.get("legacy") is not False else "first"
    prefix = normal.add_dummy_prefix and config.get("add_prefix_space") is not False
    pieces = Pieces(
        [piece.piece for piece in model.pieces],
        [piece.score for piece in model.pieces],
        [piece.type for piece in model.pieces],
        spec.model_type,
        first if prefix else "none",
        normal.remove_extra_whitespaces,
        normal.precompiled_charsmap,
        _added_tokens(path.parent, config),
    )
    own = {"bos": spec.bos_id, "eos": spec.eos_id, "unk": spec.unk_id, "pad": spec.pad_id}
    roles = {
        f"{role}_token": pieces.texts[index]
        for role, index in own.items()
        if 0 <= index < len(pieces.texts)
    }
    named = config.get("bos_token") or roles.get("bos_token")
    name = named["content"] if isinstance(named, Mapping) else named
    texts = {t: i for i, t in enumerate(pieces.texts)}
    texts |= {t.content: i for i, t in pieces.added.items()}
    return pieces, roles, None if name is None else texts.get(name)


def _added_tokens(directory: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Tokens besides the pieces, of ``added_tokens.json`` and ``tokenizer_config.json``."""
    path, found = directory / "added_tokens.json", {}
    if path.is_file():
        found = {
            index: AddedToken(text, normalized=False) for text, index in read_json(path).items()
        }
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        special = bool(token.get("special"))
        found[int(index)] = AddedToken(token["content"], special=special, normalized=False)
    return found
