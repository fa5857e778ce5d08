r"""How llama.cpp's named pre-tokenizers cut a text before the merges: facts about the models.

A cut is a list of regular expressions: each isolates its matches in what the one before left
whole. They are those of the models' own ``tokenizer.json``; llama.cpp writes some of them in other
words, because its regular expressions know no ``\p{Lu}``.
"""

from __future__ import annotations

from dataclasses import dataclass

CONTRACTED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SPACES = r"\s+(?!\S)|\s+"
BREAKS = rf"\s*[\r\n]+|{SPACES}"
SYMBOLS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BREAKS}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*",
)
SLASHED = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BREAKS}"

GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{SPACES}"
LLAMA3 = rf"{CONTRACTED}|{WORD}|\p{{N}}{{1,3}}|{SYMBOLS}"
QWEN2 = rf"{CONTRACTED}|{WORD}|\p{{N}}|{SYMBOLS}"
QWEN35 = (
    rf"{CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{BREAKS}"
)
TEKKEN = rf"{CASED[0]}|{CASED[1]}|\p{{N}}|{SLASHED}"
GPT4O = rf"{CASED[0]}{CONTRACTED}?|{CASED[1]}{CONTRACTED}?|\p{{N}}{{1,3}}|{SLASHED}"
SEED = rf"{CONTRACTED}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{BREAKS}"
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{BREAKS}"
)
# Letters of scripts with two cases, by their code points.
CASED_LETTERS = """
    41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f
    386 388-38a 38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd
    1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45
    1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4
    1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115
    2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184
    2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d a680-a69b a722-a76f a771-a787
    a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3
    104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943
"""
EAST_ASIAN = "[一-龥ࠀ-一가-퟿]+"


def _letters(ranges: str) -> str:
    """Code points and ranges of them, for a set of a regular expression."""
    words = (word.split("-") for word in ranges.split())
    return "".join("-".join(chr(int(end, 16)) for end in word) for word in words)


@dataclass(frozen=True)
class Cut:
    """A named pre-tokenizer.

    Attributes:
        patterns: in their order.
        whole_words: whether a word that is in the vocabulary is taken whole, whatever the merges.
        bos: whether a text begins with the bos token where the file does not say.
        nfc: whether the model's own tokenizer normalises.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False
    nfc: bool = False


DEFAULT = "default"  # what llama.cpp assumes where a file names none
CUTS = {
    DEFAULT: Cut((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": Cut((GPT2,)),
    "smollm": Cut((r"\p{N}", GPT2)),
    "falcon": Cut((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    "llama-bpe": Cut((LLAMA3,), whole_words=True, bos=True),
    "smaug-bpe": Cut((LLAMA3,)),
    "minicpm5": Cut((r"\p{N}{1,3}", rf"{CONTRACTED}|{WORD}|\p{{N}}+|{SYMBOLS}"), whole_words=True),
    "qwen2": Cut((QWEN2,), nfc=True),
    "deepseek-r1-qwen": Cut((QWEN2,)),
    "qwen35": Cut((QWEN35,), nfc=True),
    "ufakzeka": Cut((rf"{WORD}|\p{{N}}|{SYMBOLS}",)),
    "laguna": Cut((r"[^\n]+|[\n]+", QWEN2)),
    "tekken": Cut((TEKKEN,), whole_words=True, bos=True),
    "gpt-4o": Cut((GPT4O,)),
    "tiny_aya": Cut((r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O)),
    "seed-coder": Cut((SEED,)),
    "deepseek-llm": Cut(
        (
            "[\r\n]",
            rf"\s?[{_letters(CASED_LETTERS)}]+",
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            EAST_ASIAN,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": Cut(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", EAST_ASIAN, r"\p{N}")),
    "deepseek-v3": Cut((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3)),
    "viking": Cut((r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}")),
    "poro-chat": Cut((r" ?[^(\s|.,!?…。，、।۔،)]+",)),
}
SAME = {
    "gpt-2": "phi-2 mpt olmo jais trillion granite-docling exaone4 mellum gigachat a.x-4.0",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    "smaug-bpe": "dbrx glm4 chatglm-bpe",
    "deepseek-r1-qwen": "kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    "gpt-4o": "llama4 kanana2 talkie minimax-m2",
    "tiny_aya": "cohere2moe",
    "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
    "poro-chat": "bloom gpt3-finnish",
}
CUTS |= {name: CUTS[like] for like, names in SAME.items() for name in names.split()}
