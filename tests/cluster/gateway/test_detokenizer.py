"""Detokenizing piece by piece gives exactly what the tokenizer gives at once."""

import random
from collections.abc import Callable, Sequence

import pytest
from fake_scheduler import DEMO_MODEL
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from quire.cluster.gateway.detokenizer import Detokenizer, DetokenizerFactory

NUM_CASES = 3000
ALPHABETS = (
    'the quick brown fox said: "no!" 12,345.67\n\t  ',
    "😀👩‍👩‍👧‍👦🏳️‍🌈🤷🏽‍♀️🇫🇷",
    "你好世界这是一个测试漢字かなカナ한국어",
    "e\u0301a\u0308o\u0302n\u0303\u200d\ufe0f\u0e01\u0e33",
    "Ωπ→∑\u00a0\u2028\ufffd\x00\x7f₿𝕏𐍈",
)


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(rng.randrange(0, 24)))


def random_ids(rng: random.Random, tokenizer: Tokenizer, byte_ids: Sequence[int]) -> list[int]:
    """Text, random bytes, or any ids at all, special and unknown ones among them."""
    size = tokenizer.get_vocab_size()
    ids: list[int] = []
    for _ in range(rng.randrange(1, 4)):
        match rng.randrange(4):
            case 0 | 1:
                ids += tokenizer.encode(random_text(rng), add_special_tokens=False).ids
            case 2:
                ids += [rng.choice(byte_ids) for _ in range(rng.randrange(0, 12))]
            case _:
                ids += [rng.randrange(size + 2) for _ in range(rng.randrange(0, 6))]
        if rng.random() < 0.2:
            ids.append(rng.randrange(3))
    return ids


def one_by_one(detokenizer: Detokenizer, ids: Sequence[int], _: random.Random) -> list[str]:
    return [detokenizer.push([token_id]) for token_id in ids] + [detokenizer.flush()]


def in_groups(detokenizer: Detokenizer, ids: Sequence[int], rng: random.Random) -> list[str]:
    pieces = []
    start = 0
    while start < len(ids):
        size = rng.randrange(1, 6)
        pieces.append(detokenizer.push(ids[start : start + size]))
        start += size
    return [*pieces, detokenizer.flush()]


def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))


def byte_fallback_tokenizer(decoder: decoders.Decoder | None = None) -> Tokenizer:
    """As Llama 2 has it: Metaspace words, and bytes for what the vocabulary lacks."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder or decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox said no", "a lazy dog, a quick cat; 12 345", "你好 世界"] * 20, trainer)
    made = Tokenizer.from_str(tokenizer.to_str())
    return _without_special_bytes(made)


def _without_special_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """The trainer marks the byte tokens as special; in real tokenizers they are plain vocabulary."""
    import json

    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(spec))


def metaspace_tokenizer() -> Tokenizer:
    tokenizer = byte_fallback_tokenizer(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.normalizer = None
    return tokenizer


def word_piece_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox said: \"no!\" isn't it , they 're"] * 20, trainer)
    return tokenizer


def odd_byte_level_tokenizer() -> Tokenizer:
    """ByteLevel inside a Sequence, with added tokens that are outside the byte alphabet or look like bytes of it."""
    tokenizer = demo_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    tokenizer.add_tokens(["né", "<two words>", "漢字", AddedToken("Ġé", normalized=False)])
    tokenizer.add_special_tokens(["<｜特別｜>"])
    return tokenizer


def mixed_tokenizer() -> Tokenizer:
    """A decoder that is neither: bytes, then a replacement in the whole text."""
    tokenizer = demo_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("q", "Q")])
    return tokenizer


@pytest.mark.parametrize("stream", [one_by_one, in_groups])
@pytest.mark.parametrize(
    ("make", "num_cases"),
    [
        (demo_tokenizer, NUM_CASES),
        (byte_fallback_tokenizer, NUM_CASES),
        (metaspace_tokenizer, 500),
        (word_piece_tokenizer, 500),
        (odd_byte_level_tokenizer, 500),
        (mixed_tokenizer, 500),
    ],
)
def test_the_pieces_together_are_what_the_tokenizer_decodes_at_once(
    make: Callable[[], Tokenizer], num_cases: int, stream: Callable[[Detokenizer, Sequence[int], random.Random], list[str]]
) -> None:
    tokenizer = make()
    factory = DetokenizerFactory(tokenizer)
    rng = random.Random(f"{make.__name__} {stream.__name__}")
    byte_ids = [token_id for text in byte_texts() if (token_id := tokenizer.token_to_id(text)) is not None] or [0]
    for case in range(num_cases):
        ids = random_ids(rng, tokenizer, byte_ids)
        skip = case % 2 == 0
        pieces = stream(factory.start(skip_special_tokens=skip), ids, rng)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip), (case, ids, pieces)


def byte_texts() -> list[str]:
    """Every single-byte token of either kind of tokenizer."""
    alphabet = [chr(code) for code in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)]]
    return [*alphabet, *(f"<0x{byte:02X}>" for byte in range(256))]


@pytest.mark.parametrize("make", [demo_tokenizer, byte_fallback_tokenizer])
def test_a_character_is_never_split(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    text = "family 👩‍👩‍👧‍👦 in 你好, done"
    pieces = one_by_one(DetokenizerFactory(tokenizer).start(skip_special_tokens=True), tokenizer.encode(text).ids, random.Random(0))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_of_plain_words_is_not_held_back() -> None:
    tokenizer = byte_fallback_tokenizer()
    ids = tokenizer.encode("the quick brown fox", add_special_tokens=False).ids
    detokenizer = DetokenizerFactory(tokenizer).start(skip_special_tokens=True)
    for num_tokens, token_id in enumerate(ids, start=1):
        detokenizer.push([token_id])
        assert detokenizer._num_sent_chars == len(tokenizer.decode(ids[:num_tokens]))  # type: ignore[attr-defined]


def test_bytes_that_are_no_text_cost_linear_time() -> None:
    """A decode of all pending tokens at each token would be 20,000 squared; tries are spaced out."""
    tokenizer = mixed_tokenizer()
    calls = 0
    factory = DetokenizerFactory(tokenizer)
    decode = factory.decode

    def counting(token_ids: Sequence[int]) -> str:
        nonlocal calls
        calls += len(token_ids)
        return decode(token_ids)

    factory.decode = counting  # type: ignore[method-assign]
    detokenizer = factory.start(skip_special_tokens=True)
    byte_id = tokenizer.token_to_id("ÿ")
    assert byte_id is not None
    text = "".join(detokenizer.push([byte_id]) for _ in range(5000)) + detokenizer.flush()
    assert text == "\ufffd" * 5000
    assert calls < 10 * 5000


def test_the_text_of_one_token_has_its_space_and_no_half_characters() -> None:
    tokenizer = demo_tokenizer()
    factory = DetokenizerFactory(tokenizer)
    assert [factory.text_of(token_id) for token_id in tokenizer.encode(" fox").ids] == [" fox"]
    assert "\ufffd" in factory.text_of(tokenizer.encode("😀").ids[0])
    tokenizer = byte_fallback_tokenizer()
    factory = DetokenizerFactory(tokenizer)
    first, *_ = tokenizer.encode("the", add_special_tokens=False).ids
    assert factory.text_of(first).startswith(" ")
    byte_id = tokenizer.token_to_id("<0xE4>")
    assert byte_id is not None
    assert factory.text_of(byte_id) == "\ufffd"
