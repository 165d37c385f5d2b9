"""Where sentences of a text begin, for benchmarks that put an attack between two of them."""

from __future__ import annotations

from functools import lru_cache

from dtt_plugin.tasks.extra import benchmark_libraries


@lru_cache(maxsize=1024)  # a context comes under many attacks
def sentence_starts(text: str) -> tuple[int, ...]:
    """Return the places of a text's sentences, by nltk's Punkt without training, which needs no data."""
    with benchmark_libraries():
        from nltk.tokenize.punkt import PunktSentenceTokenizer
    return tuple(start for start, _ in PunktSentenceTokenizer().span_tokenize(text))
