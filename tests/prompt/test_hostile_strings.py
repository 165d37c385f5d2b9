"""Hostile data over many families of tokenizers and templates: no control token in any prompt, or a refusal.

Each family is a small real checkpoint. It is baked, loaded by transformers, and asked for prompts with hostile data
in every place: contents, parts, fields, documents, the wrapper. Token ids are compared with those of harmless data.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dtt_plugin.bake import bake
from dtt_plugin.errors import DttError
from dtt_plugin.prompt.formats import defensive_token_names
from dtt_plugin.prompt.renderer import PromptRenderer
from tests.bake_helpers import random_tokens
from tests.checkpoints import default_vocab_tokens, make_checkpoint
from tests.prompt.test_control_tokens import controls_of, hostile_string

# How a template of the family renders a content: text, parts (each trimmed or not), anything else as JSON.
CONTENT = (
    "{%- macro text(c) -%}{%- if c is string -%}{{ c TRIM }}{%- elif c is mapping -%}{{ c | tojson }}{%- else -%}"
    "{%- for p in c or [] -%}{{ (p if p is string else p['text']) TRIM }}JOIN{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
)
FIELDS = "{% if m['name'] %}{{ m['name'] }}{% endif %}{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}"
DOCUMENTS = "{% for d in documents or [] %}{{ d['title'] }}{{ d['text'] TRIM }}{% endfor %}{{ (tools or '') | tojson }}"


@dataclass
class Family:
    """How a checkpoint of a family differs from the plain one of the tests."""

    tokens: list[str]
    turn: str
    """Of the template: one message; ROLE, TEXT and FIELDS are filled in."""
    start: str = ""
    trim: str = ""
    join: str = ""
    flags: dict[str, bool] = field(default_factory=dict)
    normalizer: dict[str, Any] | None = None
    edit: Callable[[dict[str, Any]], None] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    refused: bool = False
    """Whether its tokenizer turns other text into control tokens, so that baking must refuse it."""

    @property
    def template(self) -> str:
        turn = self.turn.replace("ROLE", "{{ m['role'] }}").replace("TEXT", "{{ text(m['content']) }}")
        loop = "{% for m in messages %}" + turn.replace("FIELDS", FIELDS) + "{% endfor %}"
        parts = CONTENT + self.start + DOCUMENTS + loop
        return parts.replace("TRIM", self.trim).replace("JOIN", self.join)


CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML_TURN = "<|im_start|>ROLE\nFIELDSTEXT<|im_end|>\n"


def chatml(*more: str, **options: Any) -> Family:
    return Family([*CHATML, *more], CHATML_TURN, **options)


def normalised(*normalizers: dict[str, Any], **options: Any) -> Family:
    """A tokenizer whose added tokens are looked for in the normalised text."""
    normalizer = {"type": "Sequence", "normalizers": list(normalizers)}
    return chatml(normalizer=normalizer, flags={"normalized": True}, refused=True, **options)


def replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def unigram(tokenizer: dict[str, Any]) -> None:
    """SentencePiece's model in place of the byte-level one; the special tokens are pieces of it, too."""
    added = [entry["content"] for entry in tokenizer["added_tokens"]]
    letters = [chr(code) for code in range(32, 127)] + ["\u2581", "\n", "\u00fc"]
    pieces = [["<unk>", 0.0], *[[letter, -5.0] for letter in letters]]
    pieces += [[f"<extra{n}>", -20.0] for n in range(len(default_vocab_tokens()) - len(pieces))]
    pieces += [[token, -1.0] for token in added]
    tokenizer["model"] = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}
    tokenizer["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": "never",
        "split": False,
    }
    tokenizer["decoder"] = tokenizer["pre_tokenizer"]


def sentencepiece_spaces(tokenizer: dict[str, Any]) -> None:
    """Llama 2's way: spaces become U+2581 before anything else."""
    tokenizer["pre_tokenizer"] = None
    tokenizer["normalizer"] = replace(" ", "\u2581")


LLAMA3 = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
]
GEMMA_HTML = ["<table>", "<td>", "<h1>", "</h1>", "<strong>", "<unused0>", "<unused1>", "[@BOS@]"]
FAMILIES: dict[str, Family] = {
    "Llama 3": Family(
        [*LLAMA3, "<|python_tag|>", *[f"<|reserved_special_token_{n}|>" for n in range(20)]],
        "<|start_header_id|>ROLE<|end_header_id|>\n\nFIELDSTEXT<|eot_id|>",
        start="{{ '<|begin_of_text|>' }}",
        trim="| trim",
    ),
    "Qwen2.5": chatml(
        "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|vision_start|>", normalizer={"type": "NFC"}, join="\n"
    ),
    "ChatML": chatml(),
    "ChatML, trimmed": chatml(trim="| trim"),
    "ChatML, trimmed left": chatml(trim="| string | replace('', '')", join=" "),
    "Mistral v3": Family(
        ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]"],
        "{% if m['role'] == 'assistant' %} TEXTFIELDS</s>{% else %}[INST] FIELDSTEXT[/INST]{% endif %}",
        start="<s>",
        trim="| trim",
    ),
    "Llama 2": Family(
        ["<unk>", "<s>", "</s>"],
        "{% if m['role'] == 'assistant' %} TEXTFIELDS </s>{% else %}<s>[INST] FIELDSTEXT [/INST]{% endif %}",
        trim="| trim",
        edit=sentencepiece_spaces,
    ),
    "Phi-3": Family(
        ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|placeholder1|>", "<|tool|>"],
        "<|ROLE|>\nFIELDSTEXT<|end|>\n",
        flags={"rstrip": True},
    ),
    "Gemma": Family(
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", *GEMMA_HTML],
        "<start_of_turn>ROLE\nFIELDSTEXT<end_of_turn>\n",
        start="<bos>",
        trim="| trim",
    ),
    "DeepSeek": Family(
        [
            f"<\uff5c{name}\uff5c>"
            for name in ("begin\u2581of\u2581sentence", "end\u2581of\u2581sentence", "User", "Assistant")
        ]
        + ["<think>", "</think>"],
        "{% if m['role'] == 'assistant' %}<\uff5cAssistant\uff5c>{% else %}<\uff5cUser\uff5c>{% endif %}FIELDSTEXT",
        start="<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    ),
    "Granite": Family(
        ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>", "<fim_prefix>", "<filename>"],
        "<|start_of_role|>ROLE<|end_of_role|>FIELDSTEXT<|end_of_text|>\n",
    ),
    "Falcon 3": Family(
        [">>TITLE<<", ">>ABSTRACT<<", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"],
        "<|ROLE|>\nFIELDSTEXT\n",
        trim="| trim",
    ),
    "Command-R": Family(
        ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>"],
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>FIELDSTEXT<|END_OF_TURN_TOKEN|>",
        start="<BOS_TOKEN>",
    ),
    "SmolLM2": chatml("<repo_name>", "<reponame>", "<file_sep>", "<filename>", "<jupyter_start>", "<empty_output>"),
    "tokens that overlap": chatml("aXa", "XaX", "<|", "|>", "<|im_end|><|im_start|>", "abab"),
    # Data that ends with "<" would take the first character of <|im_end|>.
    "a token that overlaps the template's own": chatml("<<", refused=True),
    "a token of JSON's brackets": chatml("[[", refused=True),
    "single characters": chatml("#", "\u2026", "%"),
    "tokens with spaces": chatml("<|end of text|>", "[ end ]", "< x>"),
    "whole words": chatml("ENDTURN", flags={"single_word": True}, refused=True),
    "tokens that eat spaces": chatml("<mask>", flags={"lstrip": True, "rstrip": True}),
    "no special tokens": chatml("<tool_call>", flags={"special": False}),
    "no added tokens": Family([], "ROLE: FIELDSTEXT\n\n"),
    "tokens in the configuration only": chatml(config={"additional_special_tokens": ["<|tool|>", "<|im_end|>"]}),
    "Unigram": chatml("<s>", "</s>", edit=unigram),
    "Unigram, NFKC": chatml("<s>", "</s>", edit=unigram, normalizer={"type": "NFKC"}, refused=True),
    "BERT": normalised(
        {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        }
    ),
    "NFKC": normalised({"type": "NFKC"}),
    "lower case": normalised({"type": "Lowercase"}),
    "accents stripped": normalised({"type": "NFD"}, {"type": "StripAccents"}),
    "spaces removed": normalised(replace(" ", "")),
    "zero width removed": normalised(replace("\u200b", "")),
    "full width to ASCII": normalised(replace("\uff1c", "<"), replace("\uff1e", ">")),
}


def checkpoint_of(family: Family, folder: Path) -> Path:
    make_checkpoint(folder, special=tuple(family.tokens), extra_rows=4)
    path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    for entry in tokenizer["added_tokens"]:
        entry.update(family.flags)
    tokenizer["normalizer"] = family.normalizer
    if family.edit:
        family.edit(tokenizer)
        tokenizer["normalizer"] = family.normalizer or tokenizer["normalizer"]
    path.write_text(json.dumps(tokenizer))
    config = json.loads(config_path.read_text())
    named = [name for name in ("eos_token", "pad_token") if config[name] not in family.tokens]
    config = {key: value for key, value in config.items() if key not in named}
    config_path.write_text(json.dumps({**config, "chat_template": family.template, **family.config}))
    return folder


class Prompts:
    """Prompts of one baked checkpoint, and which of them hold more control tokens than harmless ones."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        names = self.tokenizer.get_added_vocab()
        self.control_ids = {i for text, i in names.items() if text.strip()} | set(self.tokenizer.all_special_ids)
        self.rng = rng
        self.counts: Counter[str] = Counter()
        self.leaks: list[Any] = []

    def controls(self, text: str) -> Counter[int]:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return Counter(i for i in ids if i in self.control_ids)

    def compare(self, kind: str, make: Callable[[Callable[[str], str]], str], text: str) -> None:
        """Compare the prompt of `text` with that of harmless words; `make` gets a function for each of its texts."""
        self.counts[kind] += 1
        harmless = self.controls(make(lambda _text: "data"))
        try:
            prompt = make(lambda text: text)
        except DttError:
            self.counts["refused"] += 1
            return
        if surplus := self.controls(prompt) - harmless:
            self.leaks.append((kind, text, self.tokenizer.convert_ids_to_tokens(list(surplus)), prompt))

    def rendered(self, message: dict[str, Any], **variables: Any) -> str:
        messages = [{"role": "system", "content": "Do it."}, message]
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **variables
        )
        return text

    def pieces(self, text: str) -> list[str]:
        cuts = sorted(self.rng.randint(0, len(text)) for _ in range(self.rng.randint(1, 3)))
        spaces = [self.rng.choice(["", "", " ", "\n", "\t "]) for _ in range(2 * len(cuts) + 2)]
        bounds = [0, *cuts, len(text)]
        return [f"{spaces.pop()}{text[a:b]}{spaces.pop()}" for a, b in itertools.pairwise(bounds)]

    def try_everywhere(self, text: str, wrapper: PromptRenderer) -> None:
        parts = self.pieces(text)
        for role in ("user", "tool", "assistant"):
            self.compare("texts", lambda of, role=role: self.rendered({"role": role, "content": of(text)}), text)  # type: ignore[misc]
        self.compare(
            "parts",
            lambda of: self.rendered({"role": "user", "content": [{"type": "text", "text": of(p)} for p in parts]}),
            text,
        )
        self.compare("parts", lambda of: self.rendered({"role": "tool", "content": [of(p) for p in parts]}), text)
        self.compare(
            "fields",
            lambda of: self.rendered(
                {
                    "role": "assistant",
                    "name": of(parts[0]),
                    "content": of(parts[1]),
                    "tool_calls": [{"function": {"name": of(text), "arguments": {of(text): [of(p) for p in parts]}}}],
                }
            ),
            text,
        )
        self.compare("fields", lambda of: self.rendered({"role": "tool", "content": {of(text): [[of(text)]]}}), text)
        self.compare(
            "documents",
            lambda of: self.rendered(
                {"role": "user", "content": "Read."},
                documents=[{"title": of(parts[0]), "text": of(parts[1])}, {"text": of(parts[-1]), "title": of(text)}],
                tools=[{"type": "function", "function": {"name": "f", "description": of(text)}}],
            ),
            text,
        )
        self.compare(
            "wrapper",
            lambda of: (
                wrapper.render([{"role": "system", "content": "Do it."}, {"role": "user", "content": of(text)}]).text
            ),
            text,
        )


def try_family(name: str, folder: Path, strings: int) -> None:
    family = FAMILIES[name]
    base = checkpoint_of(family, folder / "base")
    if family.refused:
        with pytest.raises(DttError):
            bake(str(base), random_tokens(32), folder / "baked")
        print(f"{name}: refused")
        return
    bake(str(base), random_tokens(32), folder / "baked")
    rng = random.Random(f"hostile {name}")
    prompts = Prompts(folder / "baked", rng)
    controls = controls_of(prompts.tokenizer)
    wrapper = PromptRenderer(
        prompts.tokenizer, prompt_format="model", model_template=family.template, defenses=("tokens",), k=5
    )
    texts = [hostile_string(rng, controls) for _ in range(strings)]
    dangerous = sum(bool(prompts.controls(text)) for text in texts)
    assert dangerous > strings / 3, f"{dangerous} of {strings} strings are dangerous: this shows nothing"
    for text in texts:
        prompts.try_everywhere(text, wrapper)
    told = f"{name}: {dangerous} of {strings} strings dangerous; {dict(prompts.counts)}; {len(prompts.leaks)} leaks"
    print(told)
    assert not prompts.leaks, (told, prompts.leaks[:3])
    expected = Counter(prompts.controls(prompts.rendered({"role": "user", "content": "data"})))
    assert sum(expected[i] for i in prompts.tokenizer.convert_tokens_to_ids(defensive_token_names(5))) == 5


@pytest.mark.parametrize("name", FAMILIES)
def test_hostile_data_yields_no_control_token_or_the_model_is_refused(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    try_family(name, tmp_path, strings=40)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_many_hostile_strings_yield_no_control_token(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    try_family(name, tmp_path, strings=1000)
