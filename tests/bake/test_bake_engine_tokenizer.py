"""Baking reads, changes and checks the tokenizer that an engine will load, and refuses one that can't be made safe."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from dtt_plugin.bake import BakeOptions, bake
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.errors import DttError
from dtt_plugin.prompt.formats import defensive_token_names
from tests.bake_helpers import random_tokens, tiny
from tests.checkpoints import BOS, CHAT_TEMPLATE, END, START

CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TOOL = "<|tool|>"
N_FILE = 268
"""Tokens of the tiny model's tokenizer.json."""


def edit(folder: Path, name: str, **values: Any) -> None:
    file = folder / name
    table = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(table | values))


def engine(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder, mistral_format=False)


def refused(base: Path, out: Path, sentence: str, **options: Any) -> None:
    """Assert that baking is refused in this sentence, and that nothing is left."""
    before = {path.name for path in out.parent.iterdir()}
    with pytest.raises(DttError, match=sentence):
        bake(str(base), random_tokens(32), out, BakeOptions(**options))
    assert {path.name for path in out.parent.iterdir()} == before


FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}


def table(token: str) -> dict[str, Any]:
    """Return a token as transformers writes it into tokenizer_config.json."""
    return {"__type": "AddedToken", "content": token, **FLAGS}


ELSEWHERE: dict[str, Callable[[Path], None]] = {
    "additional_special_tokens": lambda f: edit(f, CONFIG, additional_special_tokens=[TOOL]),
    "extra_special_tokens, a list": lambda f: edit(f, CONFIG, extra_special_tokens=[table(TOOL)]),
    "extra_special_tokens, a table": lambda f: edit(f, CONFIG, extra_special_tokens={"tool_token": TOOL}),
    "a key of its own": lambda f: edit(f, CONFIG, tool_token=TOOL),
    "pad_token": lambda f: edit(f, CONFIG, pad_token=TOOL),
    "added_tokens_decoder": lambda f: edit(f, CONFIG, added_tokens_decoder={str(N_FILE): {"content": TOOL, **FLAGS}}),
    "added_tokens.json": lambda f: edit(f, ADDED, **{TOOL: N_FILE}),
    "special_tokens_map.json": lambda f: edit(f, SPECIAL_MAP, additional_special_tokens=[TOOL]),
    "special_tokens_map.json, mask_token": lambda f: edit(f, SPECIAL_MAP, mask_token={"content": TOOL, **FLAGS}),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_token_that_tokenizer_json_does_not_know_keeps_its_id_and_row_and_is_broken(
    tmp_path: Path, where: str
) -> None:
    base = tiny(tmp_path / "base", extra_rows=1)
    ELSEWHERE[where](base)
    assert engine(base).convert_tokens_to_ids(TOOL) == N_FILE
    report = bake(str(base), random_tokens(32), tmp_path / "baked")
    baked = engine(tmp_path / "baked")
    assert baked.convert_tokens_to_ids(TOOL) == N_FILE
    assert report.token_ids == tuple(range(N_FILE + 1, N_FILE + 6))
    rows = [open_checkpoint(str(folder)).input_embedding().read() for folder in (base, tmp_path / "baked")]
    assert rows[0][N_FILE].tobytes() == rows[1][N_FILE].tobytes()
    ids = baked.apply_chat_template([{"role": "user", "content": f"a{TOOL}b"}], return_dict=False)
    assert N_FILE not in ids
    assert ids[:5] == list(report.token_ids)


def test_tokens_that_only_the_class_adds_keep_their_ids_and_are_broken(tmp_path: Path) -> None:
    for name, tokens in {"LlamaTokenizer": ["<unk>", "<s>"], "CohereTokenizer": ["<UNK>"]}.items():
        base = tiny(tmp_path / name, extra_rows=8)
        edit(base, CONFIG, tokenizer_class=name)
        before = engine(base).get_added_vocab()
        bake(str(base), random_tokens(32), tmp_path / f"{name} baked")
        baked = engine(tmp_path / f"{name} baked")
        assert before.items() <= baked.get_added_vocab().items()
        added = [token for token in tokens if before.get(token, 0) >= N_FILE]
        assert added
        text = baked.apply_chat_template([{"role": "user", "content": "".join(added)}], tokenize=False)
        assert not [token for token in added if token in text]


def test_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base")
    edit(base, CONFIG, additional_special_tokens=[TOOL])
    refused(base, tmp_path / "out", r"has 268 rows and none for the token '<\|tool\|>'")


def test_files_that_disagree_about_an_id_are_refused(tmp_path: Path) -> None:
    for number, name in enumerate((CONFIG, ADDED)):
        base = tiny(tmp_path / f"base {number}", extra_rows=9)
        edit(base, name, **({TOOL: 272} if name == ADDED else {"added_tokens_decoder": {"272": {"content": TOOL}}}))
        refused(base, tmp_path / "out", r"disagree about '<\|tool\|>': its id is 272 in one of them and 268")


def test_without_transformers_only_what_the_files_tell_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny(tmp_path / "base", extra_rows=6)
    edit(base, SPECIAL_MAP, mask_token="hello")  # a token of the vocabulary, which becomes a control token
    edit(base, CONFIG, tokenizer_class="LlamaTokenizer")
    with monkeypatch.context() as without, caplog.at_level(logging.WARNING):
        without.setitem(sys.modules, "transformers", None)
        report = bake(str(base), random_tokens(32), tmp_path / "baked")
        assert "tokens that LlamaTokenizer adds by itself are not known" in caplog.text
        edit(base, CONFIG, additional_special_tokens=[TOOL])
        refused(base, tmp_path / "out", r"has no id for '<\|tool\|>', .*pip install 'dtt-plugin\[hf\]'")
    assert report.token_ids[0] == N_FILE
    baked = engine(tmp_path / "baked")
    assert {"hello", *defensive_token_names(5)} <= baked.get_added_vocab().keys()
    assert "hello" not in baked.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)


def test_a_reserved_token_that_a_configuration_names_is_not_overwritten(tmp_path: Path) -> None:
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(9)]
    base = tiny(tmp_path / "base", special=[BOS, START, END, *reserved])
    edit(base, "generation_config.json", pad_token_id=N_FILE + 8)
    edit(base, SPECIAL_MAP, unk_token=reserved[7])
    edit(base, "config.json", eos_token_id=[N_FILE - 1, N_FILE + 6])
    report = bake(str(base), random_tokens(32), tmp_path / "baked", BakeOptions(reuse_reserved=True))
    assert report.token_ids == tuple(range(N_FILE + 1, N_FILE + 6))


# Normalisers and decoders ---------------------------------------------------------------------------


def normalise(folder: Path, normalizer: Any, *, normalized: bool = True, **flags: bool) -> Path:
    """Give a tiny model's tokenizer a normaliser, and its control tokens flags."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    shell = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    shell.normalizer = normalizer
    tokenizer["normalizer"] = json.loads(shell.to_str())["normalizer"]
    for entry in tokenizer["added_tokens"]:
        entry |= {"normalized": normalized, **flags}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


NORMALISING = {
    "NFKC": normalizers.NFKC(),
    "lower case": normalizers.Lowercase(),
    "zero width": normalizers.Replace("\u200b", ""),
    "BERT's": normalizers.BertNormalizer(),
    "spaces": normalizers.Replace(" ", ""),
    "rare": normalizers.Replace("\U000e0042", ""),
}


@pytest.mark.parametrize("name", NORMALISING)
def test_a_tokenizer_that_normalises_text_into_control_tokens_is_refused(tmp_path: Path, name: str) -> None:
    base = normalise(tiny(tmp_path / "base"), NORMALISING[name])
    refused(base, tmp_path / "out", "normalises text into control tokens: .* becomes '<")


@pytest.mark.parametrize("verify", [True, False])
def test_it_is_refused_without_transformers_and_without_verification_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    base = normalise(tiny(tmp_path / "base"), normalizers.NFKC())
    refused(base, tmp_path / "out", "normalises text into control tokens", verify=verify)


def test_the_normaliser_that_a_tokenizer_s_class_sets_is_the_one_that_counts(tmp_path: Path) -> None:
    """Qwen2Tokenizer takes NFC whatever tokenizer.json says, so a Kelvin sign is a K for its normalised tokens."""
    base = tiny(tmp_path / "base", special=[BOS, START, END, "<|Kelvin|>"])
    normalise(base, normalizers.NFD())
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    bake(str(base), random_tokens(32), tmp_path / "plain")
    edit(base, CONFIG, tokenizer_class="Qwen2Tokenizer")
    edit(base, "config.json", model_type="qwen2")
    refused(base, tmp_path / "out", "'<|\u212aelvin|>' becomes '<|Kelvin|>'".replace("|", r"\|"))


@pytest.mark.parametrize("flags", [{"single_word": True}, {}])
def test_a_tokenizer_whose_markers_depend_on_the_data_beside_them_is_refused(
    tmp_path: Path, flags: dict[str, bool]
) -> None:
    """A marker that counts as a single word only, or one that SentencePiece's prefix hides behind text, gets lost."""
    metaspace = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    base = normalise(tiny(tmp_path / "base"), None if flags else metaspace, normalized=not flags, **flags)
    refused(base, tmp_path / "out", "has other control tokens in a prompt whose data are|rendered conversation")


def sentencepiece(folder: Path, normalizer: Any, *, unk: str = "<unk>") -> Path:
    """A model with a Unigram vocabulary, its control tokens among the pieces."""
    pieces = [(token, 0.0) for token in (unk, BOS, START, END)]
    pieces += [("▁", -2.0), *((chr(i), -3.0) for i in range(33, 127)), ("\n", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (unk, BOS, START, END)])
    tiny(folder, embedding=np.random.default_rng(0).standard_normal((len(pieces), 32)))
    tokenizer.save(str(folder / "tokenizer.json"))
    edit(folder, CONFIG, unk_token=unk)
    edit(folder, "config.json", vocab_size=len(pieces), eos_token_id=3)
    return folder


def test_a_unigram_tokenizer_is_accepted_with_its_unknown_token_and_refused_where_it_normalises(
    tmp_path: Path,
) -> None:
    bake(str(sentencepiece(tmp_path / "plain", None)), random_tokens(32), tmp_path / "baked")
    nfkc = sentencepiece(tmp_path / "nfkc", normalizers.NFKC())
    refused(nfkc, tmp_path / "out", "normalises text into control tokens")


def test_an_unknown_token_that_is_a_marker_is_refused(tmp_path: Path) -> None:
    """Any character that the vocabulary lacks would end the turn."""
    base = sentencepiece(tmp_path / "base", None)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["unk_id"] = 3
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(base, tmp_path / "out", r"becomes '<\|im_end\|>'|other control tokens in a prompt")


def test_a_tokenizer_that_cuts_or_pads_does_so_no_more(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    pad = {"pad_id": 265, "pad_type_id": 0, "pad_token": BOS, "pad_to_multiple_of": None}
    tokenizer["padding"] = {"strategy": {"Fixed": 64}, "direction": "Left", **pad}
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    report = bake(str(base), random_tokens(32), tmp_path / "baked")
    text = engine(tmp_path / "baked").apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    backend = Tokenizer.from_file(str(tmp_path / "baked" / "tokenizer.json"))
    assert backend.encode(text).ids[:5] == list(report.token_ids)


def test_a_class_that_splits_special_tokens_is_refused(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base")
    edit(base, CONFIG, split_special_tokens=True)
    refused(base, tmp_path / "out", "a rendered conversation would not begin with the DefensiveTokens")


# What other files would overrule ----------------------------------------------------------------------


def test_a_template_in_another_file_does_not_overrule_the_defended_one(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base")
    edit(base, SPECIAL_MAP, chat_template="{{ 'undefended' }}", bos_token=BOS)
    bake(str(base), random_tokens(32), tmp_path / "baked")
    text = engine(tmp_path / "baked").apply_chat_template([{"role": "user", "content": "u"}], tokenize=False)
    assert text.startswith("".join(defensive_token_names(5)))
    assert json.loads((tmp_path / "baked" / SPECIAL_MAP).read_text())["bos_token"] == BOS


def adds_in_front(base: Path, token: str, kind: str = "TemplateProcessing") -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    token_id = next(entry["id"] for entry in tokenizer["added_tokens"] if entry["content"] == token)
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, single[0], {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
    pair = [token, token_id]
    roberta = {"type": "RobertaProcessing", "sep": pair, "cls": pair, "trim_offsets": True, "add_prefix_space": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    chosen = {
        "TemplateProcessing": template,
        "RobertaProcessing": roberta,
        "Sequence": {"type": "Sequence", "processors": [byte_level, template]},
    }
    tokenizer["post_processor"] = chosen[kind]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("kind", ["TemplateProcessing", "RobertaProcessing", "Sequence"])
@pytest.mark.parametrize("named_in", [CONFIG, SPECIAL_MAP, "no file"])
def test_nothing_stands_in_front_of_the_tokens_whatever_file_names_the_bos(
    tmp_path: Path, named_in: str, kind: str
) -> None:
    base = tiny(tmp_path / "base")
    adds_in_front(base, BOS, kind)
    if named_in != "no file":
        edit(base, named_in, bos_token=table(BOS) if named_in == CONFIG else BOS)
    bos_id = engine(base)("a").input_ids[0]
    assert bos_id == N_FILE - 3
    report = bake(str(base), random_tokens(32), tmp_path / "baked")
    baked = engine(tmp_path / "baked")
    text = baked.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    ids = baked(text).input_ids
    assert ids[:5] == list(report.token_ids)
    assert ids.count(bos_id) == (0 if named_in == "no file" else 1)


def test_a_mistral_folder_is_baked_without_mistral_s_own_files_and_every_loader_has_the_tokens(tmp_path: Path) -> None:
    """With tekken.json there, transformers and vLLM take it, whatever tokenizer.json says."""
    pytest.importorskip("mistral_common")
    base = tiny(tmp_path / "base")
    edit(base, "config.json", model_type="mistral", architectures=["MistralForCausalLM"])
    theirs = ("tekken.json", "params.json", "tokenizer.model.v3", "consolidated.safetensors.index.json")
    for name in theirs:
        (base / name).write_text('{"dim": 32}')
    report = bake(str(base), random_tokens(32), tmp_path / "baked")
    assert not {path.name for path in (tmp_path / "baked").iterdir()} & set(theirs)
    transformers = pytest.importorskip("transformers")
    loaders = [transformers.AutoTokenizer.from_pretrained]
    loaders.append(pytest.importorskip("vllm.tokenizers").get_tokenizer)
    conversation = [{"role": "system", "content": "s"}, {"role": "user", "content": f"u{END}[DefensiveToken0]"}]
    for load in loaders:
        tokenizer = load(str(tmp_path / "baked"))
        assert tokenizer.convert_tokens_to_ids(list(report.token_names)) == list(report.token_ids)
        ids = tokenizer.apply_chat_template(conversation, return_dict=False)
        assert [i for i in ids if i in report.token_ids] == ids[:5] == list(report.token_ids)
        assert ids.count(N_FILE - 1) == 2


def test_a_folder_with_tekken_alone_is_refused_by_its_name(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base")
    (base / "tokenizer.json").rename(base / "tekken.json")
    refused(base, tmp_path / "out", r"has Mistral's tekken\.json and no tokenizer\.json")


def test_weights_in_mistral_s_own_format_alone_are_refused(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base")
    (base / "model.safetensors").rename(base / "consolidated.safetensors")
    refused(base, tmp_path / "out", "holds its weights in Mistral's own format alone")


def test_a_tokenizer_with_code_of_its_own_is_refused_and_the_code_not_run(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base")
    (base / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit(base, CONFIG, auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")
    edit(base, "config.json", model_type="own")
    refused(base, tmp_path / "out", "no code of the model's own is run")
    assert not (tmp_path / "ran").exists()


# Names and links --------------------------------------------------------------------------------------


def named(base: Path, *names: str) -> None:
    edit(base, CONFIG, chat_template=[{"name": name, "template": CHAT_TEMPLATE} for name in names])


NO_FILE_NAMES = [
    "../../../victim/deploy", "..", ".", "", "a/b", "/tmp/x", "a\\b", "..\\x", "x\0y", ".hidden", "a\nb", "a ", " a",
    "a.", "con", "NUL", "com1.x", "-x", "~", "a:b", "a*", "é" * 101, "n" * 300, "+", "$HOME", "\u202ea",
]  # fmt: skip


@pytest.mark.parametrize("name", NO_FILE_NAMES)
def test_a_template_name_that_is_no_plain_file_name_is_refused(tmp_path: Path, name: str) -> None:
    base = tiny(tmp_path / "base")
    named(base, "default", "+", name)
    (tmp_path / "victim").mkdir()
    refused(base, tmp_path / "out", "which is no plain file name")
    named(base, "default", name)
    refused(base, tmp_path / "out", "which is no plain file name")
    assert not list((tmp_path / "victim").iterdir())


@pytest.mark.parametrize("names", [("default", "Default"), ("a", "A"), ("rag", "rag"), ("default", "default")])
def test_template_names_that_are_one_file_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    base = tiny(tmp_path / "base")
    named(base, *names)
    refused(base, tmp_path / "out", "has two chat templates called")


def test_the_name_of_a_template_file_is_checked_too(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / ".x.jinja").write_text(CHAT_TEMPLATE)
    refused(base, tmp_path / "out", "called '.x', which is no plain file name")


def test_ordinary_template_names_are_kept(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base")
    edit(base, CONFIG, chat_template={"default": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE, "rag-v2.1": CHAT_TEMPLATE})
    bake(str(base), random_tokens(32), tmp_path / "baked")
    assert engine(tmp_path / "baked").chat_template.keys() == {"default", "tool_use", "rag-v2.1"}
    folder = tmp_path / "baked" / "additional_chat_templates"
    assert sorted(path.name for path in folder.iterdir()) == ["rag-v2.1.jinja", "tool_use.jinja"]


@pytest.mark.parametrize(
    "name",
    ["NOTICE", "LICENSE", "notes.txt", CONFIG, SPECIAL_MAP, ADDED, "config.json", "generation_config.json", "own.py",
     "chat_template.jinja", "additional_chat_templates/rag.jinja", "tokenizer.json"],
)  # fmt: skip
def test_a_link_out_of_the_model_s_folder_is_not_followed(tmp_path: Path, name: str) -> None:
    base = tiny(tmp_path / "base")
    secret = tmp_path / "secret"
    file = base / name
    file.parent.mkdir(exist_ok=True)
    secret.write_bytes(file.read_bytes() if file.exists() else b"{}")
    file.unlink(missing_ok=True)
    file.symlink_to(secret)
    refused(base, tmp_path / "out", "is a link to a file outside the model's folder; put the file itself there")


def test_links_within_the_folder_and_a_hub_cache_are_followed_and_a_folder_of_templates_elsewhere_is_not(
    tmp_path: Path,
) -> None:
    base = tiny(tmp_path / "base")
    (base / "LICENSE").write_text("free")
    (base / "NOTICE").symlink_to("LICENSE")
    bake(str(base), random_tokens(32), tmp_path / "baked")
    assert (tmp_path / "baked" / "NOTICE").read_text() == "free"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "rag.jinja").write_text(CHAT_TEMPLATE)
    (base / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    refused(base, tmp_path / "out", "outside the model's folder")


# Malformed files --------------------------------------------------------------------------------------


def put(name: str, text: str) -> Callable[[Path], None]:
    def write(base: Path) -> None:
        (base / name).write_text(text)

    return write


def first_added(**values: Any) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        tokenizer = json.loads((base / "tokenizer.json").read_text())
        tokenizer["added_tokens"][0] |= values
        (base / "tokenizer.json").write_text(json.dumps(tokenizer))

    return change


MALFORMED: dict[str, tuple[Callable[[Path], None], str]] = {
    "id null": (first_added(id=None), "has no readable vocabulary or added_tokens"),
    "id text": (first_added(id="265"), "has no readable vocabulary or added_tokens"),
    "id true": (first_added(id=True), "has no readable vocabulary or added_tokens"),
    "id negative": (first_added(id=-1), "has no readable vocabulary or added_tokens"),
    "id with a fraction": (first_added(id=265.5), "has no readable vocabulary or added_tokens"),
    "id beyond a gap": (first_added(id=9999), "has gaps in its ids"),
    "content a number": (first_added(content=1), "has no readable vocabulary or added_tokens"),
    "content twice": (first_added(content=END), "has no readable vocabulary or added_tokens"),
    "flag that is no flag": (first_added(lstrip="x"), "no tokenizer that `tokenizers` can load"),
    "vocabulary null": (put("tokenizer.json", '{"model": {"vocab": null}}'), "has no readable vocabulary"),
    "unknown model": (put("tokenizer.json", '{"model": {"type": "X", "vocab": {"a": 0}}}'), "can load"),
    "unknown merge": (
        put("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}}'),
        "no tokenizer that `tokenizers` can load",
    ),
    "a file with a lone surrogate": (put("generation_config.json", r'{"x": "\ud800"}'), "is not valid JSON"),
    "config with a lone surrogate": (
        lambda base: edit(base, CONFIG, **{"\udcff": 1}),
        "is not valid JSON",
    ),
    "special tokens a number": (put(SPECIAL_MAP, '{"additional_special_tokens": 5}'), "no text"),
    "special tokens of numbers": (put(SPECIAL_MAP, '{"additional_special_tokens": [1]}'), "no text"),
    "special tokens without content": (
        lambda base: edit(base, CONFIG, extra_special_tokens=[{"id": 1}]),
        "lists special tokens that are no text",
    ),
    "special tokens map a list": (put(SPECIAL_MAP, "[]"), "should hold a JSON object"),
    "added_tokens.json without numbers": (put(ADDED, '{"a": [1]}'), "should give each token a number"),
    "added_tokens.json with null": (put(ADDED, '{"a": null}'), "should give each token a number"),
    "decoder a list": (lambda base: edit(base, CONFIG, added_tokens_decoder=[1]), "no readable added_tokens_decoder"),
    "decoder without content": (
        lambda base: edit(base, CONFIG, added_tokens_decoder={"1": {}}),
        "no readable added_tokens_decoder",
    ),
    "decoder with a word for an id": (
        lambda base: edit(base, CONFIG, added_tokens_decoder={"x": {"content": "y"}}),
        "no readable added_tokens_decoder",
    ),
    "template a number": (lambda base: edit(base, CONFIG, chat_template=5), "without name or template"),
    "template names that are numbers": (
        lambda base: edit(base, CONFIG, chat_template=[{"name": 1, "template": ""}]),
        "without name or template",
    ),
    "suppress_tokens nested": (
        lambda base: edit(base, "generation_config.json", suppress_tokens=[[1]]),
        "should list ids",
    ),
    "text_config a number": (lambda base: edit(base, "config.json", text_config=5, model_type="gemma3"), "can't load"),
    "config.json a list": (put("config.json", "[]"), "should hold a JSON object"),
    "config.json empty": (put("config.json", "{}"), r"has no config\.json"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_one_sentence(tmp_path: Path, case: str) -> None:
    base = tiny(tmp_path / "base", extra_rows=8)
    damage, sentence = MALFORMED[case]
    damage(base)
    refused(base, tmp_path / "out", sentence)


def test_a_key_that_is_called_like_a_token_and_is_none_is_no_fault(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base")
    edit(base, CONFIG, x_token={"id": 1}, y_token=None, add_bos_token=True)
    bake(str(base), random_tokens(32), tmp_path / "baked")


def test_a_pipe_in_the_place_of_a_file_does_not_block(tmp_path: Path) -> None:
    import os

    base = tiny(tmp_path / "base")
    (base / "config.json").unlink()
    os.mkfifo(base / "config.json")
    refused(base, tmp_path / "out", r"config\.json is (not a file|a pipe)")


def test_the_tokenizer_that_is_read_and_the_one_that_is_written_are_loaded_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    loaded: list[str] = []
    plain = transformers.AutoTokenizer.from_pretrained

    def noted(name: str, *args: Any, **options: Any) -> Any:
        loaded.append(name)
        return plain(name, *args, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", noted)
    base = tiny(tmp_path / "base")
    bake(str(base), random_tokens(32), tmp_path / "baked")
    assert len(loaded) == len(set(loaded)) == 2
    assert loaded[0] == str(base)
