"""Look-alikes of control tokens: which tokenizers take other text for one."""

from __future__ import annotations

import time
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dtt_plugin.errors import DttError
from dtt_plugin.prompt.token_probes import first_disguise, look_alikes
from tests.checkpoints import SPECIAL_TOKENS, default_vocab_tokens


def byte_level(normalizer: Any = None, *, tokens: Any = SPECIAL_TOKENS, **flags: bool) -> Tokenizer:
    vocabulary = {token: row for row, token in enumerate(default_vocab_tokens())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken(token, special=True, **flags) for token in tokens])
    return tokenizer


def sentencepiece(normalizer: Any) -> Tokenizer:
    """Unigram with its control tokens among the pieces, as SentencePiece has them."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((chr(i), -3.0) for i in range(33, 127))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    return tokenizer


def controls(tokenizer: Tokenizer) -> dict[str, int]:
    return {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}


TRANSFORMING = {
    "NFKC": normalizers.NFKC(),
    "NFKD": normalizers.NFKD(),
    "lower case": normalizers.Lowercase(),
    "accents": normalizers.StripAccents(),
    "accents of letters": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "BERT's": normalizers.BertNormalizer(),
    "Nmt": normalizers.Nmt(),
    "no spaces": normalizers.Replace(" ", ""),
    "no zero-width spaces": normalizers.Replace("\u200b", ""),
    "no soft hyphens": normalizers.Replace("\xad", ""),
    "a tag character that is no look-alike of the list": normalizers.Replace("\U000e0041", ""),
    "a rare character by pattern": normalizers.Replace(Regex("[\u2065-\u206f\ufe01]"), ""),
    "an entity": normalizers.Replace("&lt;", "<"),
    "a word": normalizers.Replace("END", "end"),
    "typographic signs": normalizers.Replace("\u2758", "|"),
    "deep inside": normalizers.Sequence([normalizers.NFC(), normalizers.Sequence([normalizers.Replace("¦", "|")])]),
}


@pytest.mark.parametrize("name", TRANSFORMING)
def test_a_normaliser_that_makes_control_tokens_is_found(name: str) -> None:
    tokenizer = byte_level(TRANSFORMING[name], normalized=True)
    found = first_disguise(tokenizer, controls(tokenizer))
    assert found is not None
    assert found.token not in found.text
    assert controls(tokenizer)[found.token] in tokenizer.encode(found.text).ids


@pytest.mark.parametrize("name", TRANSFORMING)
def test_tokens_that_are_matched_before_normalisation_are_safe(name: str) -> None:
    tokenizer = byte_level(TRANSFORMING[name], normalized=False)
    assert first_disguise(tokenizer, controls(tokenizer)) is None


@pytest.mark.parametrize(
    "normalizer",
    [None, normalizers.NFC(), normalizers.NFD(), normalizers.Strip(), normalizers.Prepend("▁"),
     normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])],
)  # fmt: skip
@pytest.mark.parametrize("normalized", [True, False])
def test_harmless_normalisers_are_accepted(normalizer: Any, normalized: bool) -> None:
    tokenizer = byte_level(normalizer, normalized=normalized)
    assert first_disguise(tokenizer, controls(tokenizer)) is None


PATTERNS = [("~~", "|"), ("&(lt|LT);", "<"), (r"<\s+", "<"), (r"(.)\1", "$1"), ("(?i)zero-?width", "")]


@pytest.mark.parametrize(("pattern", "result"), PATTERNS)
def test_a_pattern_whose_result_stands_in_a_normalised_token_is_taken_for_a_danger(pattern: str, result: str) -> None:
    """What it matches can't be listed."""
    for normalized in (True, False):
        tokenizer = byte_level(normalizers.Replace(Regex(pattern), result), normalized=normalized)
        assert (first_disguise(tokenizer, controls(tokenizer)) is not None) is normalized
    assert first_disguise(sentencepiece(normalizers.Replace(Regex(" {2,}"), " ")), {"<s>": 1}) is None


def test_a_token_with_a_space_that_is_written_otherwise_is_found() -> None:
    spaces = normalizers.Replace(" ", "▁")
    tokenizer = byte_level(spaces, tokens=("<|end of turn|>",), normalized=True)
    found = first_disguise(tokenizer, controls(tokenizer))
    assert found == ("<|end▁of▁turn|>", "<|end of turn|>")


def test_unigram_pieces_that_are_control_tokens_are_found() -> None:
    """`＜/ｓ＞` is no added token before NFKC, and a piece of the vocabulary afterwards."""
    tokenizer = sentencepiece(normalizers.NFKC())
    found = first_disguise(tokenizer, controls(tokenizer))
    assert found is not None
    assert found.token in ("<s>", "</s>")
    plain = sentencepiece(normalizers.NFC())
    assert first_disguise(plain, controls(plain)) is None


def test_only_one_of_many_tokens_that_is_normalised_is_found() -> None:
    tokenizer = byte_level(normalizers.Lowercase(), tokens=[f"<|reserved_{i}|>" for i in range(300)])
    tokenizer.add_special_tokens([AddedToken("<|tool|>", special=True, normalized=True)])
    found = first_disguise(tokenizer, controls(tokenizer))
    assert found is not None
    assert found.token == "<|tool|>"


def test_white_space_tokens_are_ordinary_text() -> None:
    tokenizer = byte_level(normalizers.Replace("\t", "  "), tokens=("  ",), normalized=True)
    assert first_disguise(tokenizer, controls(tokenizer)) is None


def test_a_tokenizer_that_cannot_encode_a_text_is_refused_in_a_sentence() -> None:
    tokenizer = Tokenizer(models.WordPiece(vocab={"a": 0}, unk_token="[UNK]"))
    tokenizer.add_special_tokens([AddedToken("<x>", special=True)])
    with pytest.raises(DttError, match="can't encode every text"):
        first_disguise(tokenizer, controls(tokenizer))


def test_no_look_alike_is_the_token_and_none_is_given_twice() -> None:
    for token in (*SPECIAL_TOKENS, "</s>", "[INST]", "<unk>", "a", "①", "<｜User｜>"):
        texts = look_alikes(token)
        assert token not in texts
        assert len(set(texts)) == len(texts) > 30


def test_llama_3_s_256_tokens_are_probed_in_a_second(llama3_tokenizer: Any) -> None:
    backend = llama3_tokenizer.backend_tokenizer
    assert len(controls(backend)) == 256
    first_disguise(byte_level(), {"<x>": 265})  # the tables of Unicode
    started = time.thread_time()
    assert first_disguise(backend, controls(backend)) is None
    assert time.thread_time() - started < 1


@pytest.mark.parametrize("fixture", ["smollm2_tokenizer", "qwen_tokenizer"])
def test_real_tokenizers_are_accepted(fixture: str, request: pytest.FixtureRequest) -> None:
    backend = request.getfixturevalue(fixture).backend_tokenizer
    assert first_disguise(backend, controls(backend)) is None
