"""The tokenizer of a GGUF file, rebuilt out of its vocabulary as llama.cpp reads it."""

from __future__ import annotations

import logging
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from dspark_jax.characters import first_line
from dspark_jax.checkpoints.ends import known_ends
from dspark_jax.checkpoints.gguf import GgufFile
from dspark_jax.checkpoints.gguf_splits import CUTS, DEFAULT
from dspark_jax.checkpoints.library import quiet
from dspark_jax.checkpoints.pieces import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Pieces,
    make_cutter,
    piece_tokenizer,
)
from dspark_jax.checkpoints.tensors import LoadError

logger = logging.getLogger(__name__)

KINDS = ("gpt2", "llama", "gemma4")
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# Of SentencePiece vocabularies whose files do not say.
USUAL_IDS = {"bos": 1, "eos": 2, "unk": 0}


def gguf_tokenizer(file: GgufFile, origin: str) -> Any:
    """The tokenizer of a GGUF file, with its special tokens and chat template.

    Args:
        file: opened.
        origin: its name, for messages.

    Raises:
        LoadError: another kind of tokenizer, or a broken one.
    """
    kind = file.value("tokenizer.ggml.model", str)
    if kind not in KINDS:
        raise LoadError(
            f"{origin}: tokenizer.ggml.model is {kind!r}, and only {', '.join(KINDS)} are "
            "supported: use the model's Hugging Face directory"
        )
    split = _split(file, origin) if kind == "gpt2" else kind
    with quiet():
        from transformers import PreTrainedTokenizerFast
    try:
        tokens, types = _vocabulary(file)
        ids = _role_ids(file, kind, len(tokens), origin)
        begin = _begin(file, ids, kind, kind != "gpt2" or CUTS[split].bos)
        pieces = None
        if kind == "llama":
            pieces = _pieces(file, tokens, types)
            built = piece_tokenizer(pieces, begin)
        else:
            merges = file.value("tokenizer.ggml.merges", list)
            if merges is None:
                raise LoadError("tokenizer.ggml.merges is missing")
            merges = [tuple(merge.split(" ", 1)) for merge in merges]
            vocabulary = {token: index for index, token in enumerate(tokens)}
            if kind == "gemma4":
                built = _spaced_bpe(vocabulary, merges, types)
            else:
                built = _byte_level_bpe(vocabulary, merges, split)
            _add_special(built, tokens, types)
            if begin is not None:
                built.post_processor = processors.TemplateProcessing(
                    single=f"{tokens[begin]} $A", special_tokens=[(tokens[begin], begin)]
                )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=built,
            clean_up_tokenization_spaces=False,
            **{f"{role}_token": tokens[index] for role, index in ids.items()},
        )
        if pieces is not None:
            tokenizer.backend_tokenizer.pre_tokenizer = make_cutter(pieces)
        tokenizer.chat_template = file.value("tokenizer.chat_template", str)
    except Exception as error:  # the Rust library raises bare exceptions
        raise LoadError(f"{origin}: broken tokenizer ({first_line(error)})") from None
    return tokenizer


def _split(file: GgufFile, origin: str) -> str:
    """The pre-tokenizer's name."""
    split = file.value("tokenizer.ggml.pre", str)
    if split is None:
        logger.warning(
            "%s: no tokenizer.ggml.pre says how texts are cut: %r is assumed, as llama.cpp does; "
            "convert the model anew if its answers are poor",
            origin,
            DEFAULT,
        )
        return DEFAULT
    if split not in CUTS:
        raise LoadError(
            f"{origin}: tokenizer.ggml.pre {split!r} is not supported: use the model's Hugging "
            "Face directory"
        )
    return str(split)


def _vocabulary(file: GgufFile) -> tuple[list[str], list[int]]:
    """Tokens and their types. What is known to end a text is a control token, as in llama.cpp."""
    tokens = file.value("tokenizer.ggml.tokens", list, [])
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise LoadError("tokenizer.ggml.tokens holds no texts")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    types = file.value("tokenizer.ggml.token_type", list, [NORMAL] * len(tokens))
    if len(types) < len(tokens):
        raise LoadError(f"tokenizer.ggml.token_type has {len(types)} of {len(tokens)} types")
    ends = known_ends(tokens)
    kinds = [CONTROL if index in ends else kind for index, kind in enumerate(types[: len(tokens)])]
    return tokens, kinds


def _role_ids(file: GgufFile, kind: str, count: int, origin: str) -> dict[str, int]:
    """The ids of the special tokens by their roles."""
    ids = {}
    for role, key in ROLES.items():
        usual = USUAL_IDS.get(role) if kind == "llama" else None
        found = file.value(f"tokenizer.ggml.{key}_token_id", int)
        if found is not None and not 0 <= found < count:
            logger.warning(
                "%s: tokenizer.ggml.%s_token_id is %d, and there are %d tokens: it is left out",
                *(origin, key, found, count),
            )
            found = None
        found = usual if found is None else found
        if found is not None and found < count:
            ids[role] = found
    return ids


def _begin(file: GgufFile, ids: dict[str, int], kind: str, default: bool) -> int | None:
    """The id that a text begins with; Gemma 4's files deny it wrongly."""
    stated = file.value("tokenizer.ggml.add_bos_token", bool) if kind != "gemma4" else None
    if stated and "bos" not in ids:
        raise LoadError(
            "tokenizer.ggml.add_bos_token is true, but no tokenizer.ggml.bos_token_id says which"
        )
    return ids.get("bos") if (default if stated is None else stated) else None


def _byte_level_bpe(vocabulary: dict[str, int], merges: list[Any], split: str) -> Tokenizer:
    """Vocabulary, merges and pre-tokenizer put together."""
    cut = CUTS[split]
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=cut.whole_words))
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _spaced_bpe(vocabulary: dict[str, int], merges: list[Any], types: list[int]) -> Tokenizer:
    """Merges over characters, with U+2581 for spaces, as Gemma 4 has them."""
    unknown = next((token for token, i in vocabulary.items() if types[i] == UNKNOWN), None)
    model = BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _add_special(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Match control and user-defined tokens in the text before everything else."""
    named = list(zip(tokens, types, strict=True))
    special = [token for token, kind in named if kind in (CONTROL, UNKNOWN)]
    defined = [token for token, kind in named if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in defined])


def _pieces(file: GgufFile, tokens: list[str], types: list[int]) -> Pieces:
    """The SentencePiece vocabulary."""
    scores = file.value("tokenizer.ggml.scores", list, [0.0] * len(tokens))
    if len(scores) < len(tokens):
        raise LoadError(f"tokenizer.ggml.scores has {len(scores)} of {len(tokens)} scores")
    prefix = file.value("tokenizer.ggml.add_space_prefix", bool, True)
    # User-defined pieces are found in the text as it stands, their spaces included.
    defined = {
        index: AddedToken(token, normalized=False)
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == USER_DEFINED
    }
    kinds = [NORMAL if kind == UNUSED else kind for kind in types]
    prefix = "every" if prefix else "none"
    return Pieces(tokens, scores[: len(tokens)], kinds, prefix=prefix, added=defined)
