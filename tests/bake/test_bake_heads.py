"""Which output heads baking accepts, and what it does with copies for multi-token prediction and absent tensors."""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dtt_plugin.alignment import align
from dtt_plugin.bake import BakeOptions, bake
from dtt_plugin.bake.weights import indexed_tensors
from dtt_plugin.checkpoint.families import ALWAYS_TIED, OTHER_HEAD, TIED_BY_DEFAULT
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.errors import DttError
from tests.bake_helpers import load, logits_of_ids, logits_of_rows, random_tokens, tiny
from tests.checkpoints import BOS, END, START, make_checkpoint, write_weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"
N_TOKENS = 268


def configure(folder: Path, *remove: str, **values: Any) -> None:
    table = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in table.items() if k not in remove}))


def store(folder: Path, *names: str, of: str = EMBEDDING) -> None:
    """Store copies of a tensor under further names."""
    tensors = load_file(folder / "model.safetensors")
    write_weights(folder, tensors | {name: tensors[of].copy() for name in names})


def refused(base: Path, sentence: str) -> None:
    before = sorted(base.parent.iterdir())
    with pytest.raises(DttError, match=sentence):
        bake(str(base), random_tokens(32), base.parent / "out")
    assert sorted(base.parent.iterdir()) == before


# Families --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [True, False, None])
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("family", sorted(ALWAYS_TIED))
def test_families_that_vllm_always_ties_are_refused_whatever_the_files_say(
    tmp_path: Path, family: str, stored: bool, flag: bool | None
) -> None:
    base = tiny(tmp_path / "base", tied=not stored)
    configure(base, *(["tie_word_embeddings"] if flag is None else []), model_type=family)
    if flag is not None:
        configure(base, tie_word_embeddings=flag)
    refused(base, rf"\({family}\) computes its output from the input embedding in every engine that vLLM starts")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "paligemma", "text_config": {"model_type": "gemma2"}},
        {"model_type": "aya_vision", "text_config": {"model_type": "cohere2"}},
        {"model_type": "own", "thinker_config": {"text_config": {"model_type": "lfm2"}}},
        {"architectures": ["Cohere2ForCausalLM"]},
        {"model_type": "own", "text_config": {"architectures": ["Gemma2ForCausalLM"]}},
    ],
)
def test_a_family_is_found_at_every_level_and_by_its_class(tmp_path: Path, config: dict[str, Any]) -> None:
    base = tiny(tmp_path / "base")
    configure(base, **config)
    refused(base, "computes its output from the input embedding")


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": N_TOKENS}
UNTIED = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": N_TOKENS},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": N_TOKENS},
    "gemma": SMALL | {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64},
    "gemma3_text": SMALL | {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64},
    "opt": SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("family", UNTIED)
def test_families_that_were_always_tied_once_are_untied(tmp_path: Path, family: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **UNTIED[family], bos_token_id=0, eos_token_id=0, pad_token_id=0)
    base = tiny(tmp_path / "base")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokens = random_tokens(32)
    report = bake(str(base), tokens, tmp_path / "baked")
    assert report.untied
    before, after = load(base), load(tmp_path / "baked")
    prompt = [3, 50, 17]
    expected = logits_of_rows(before, before.get_input_embeddings().weight.new_tensor(tokens.rows), prompt)
    if family != "gemma3_text" and family != "gemma":  # these scale what they look up
        got = logits_of_ids(after, [*report.token_ids, *prompt])
        assert torch.allclose(got[:, :N_TOKENS], expected, atol=1e-4)
    plain = logits_of_ids(after, prompt)
    assert torch.allclose(plain[:, :N_TOKENS], logits_of_ids(before, prompt), atol=1e-5)
    assert (plain[:, N_TOKENS:].max(dim=1).values < plain[:, :N_TOKENS].max(dim=1).values).all()
    assert after.get_output_embeddings().weight.data_ptr() != after.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize(
    "names", [["text_config"], ["llm_config"], ["language_config"], ["thinker_config", "text_config"]]
)
def test_every_level_of_a_configuration_has_the_new_vocabulary_and_says_that_the_model_is_untied(
    names: list[str], tmp_path: Path
) -> None:
    """vLLM reads size and flag of the text model, whose default may be true."""
    base = tiny(tmp_path / "base")
    inner: dict[str, Any] = {"vocab_size": N_TOKENS, "eos_token_id": 7}
    for name in reversed(names):
        inner = {name: inner}
    configure(base, **inner, vision_config={"vocab_size": N_TOKENS})
    config = json.loads((base / "config.json").read_text())
    del config["eos_token_id"]
    (base / "config.json").write_text(json.dumps(config))
    (base / "generation_config.json").unlink()
    report = bake(str(base), random_tokens(32), tmp_path / "baked")
    config = json.loads((tmp_path / "baked" / "config.json").read_text())
    assert config["vision_config"] == {"vocab_size": N_TOKENS}
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (report.rows, False)
    for name in names:
        config = config[name]
        assert config["tie_word_embeddings"] is False
    assert config["vocab_size"] == report.rows
    assert json.loads((tmp_path / "baked" / "generation_config.json").read_text())["eos_token_id"] == 7


def test_embeddings_per_layer_need_reserved_tokens(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base", special=[BOS, START, END, *(f"<unused{i}>" for i in range(8))])
    store(base, "model.embed_tokens_per_layer.weight")
    refused(base, r"has embeddings per layer \(model\.embed_tokens_per_layer\.weight\).*--reuse-reserved")
    bake(str(base), random_tokens(32), tmp_path / "baked", BakeOptions(reuse_reserved=True))
    configure(base, model_type="gemma3n")
    refused(base, "would generate its DefensiveTokens; such a model is not supported")


def _causal_classes() -> Iterator[tuple[str, ast.ClassDef]]:
    """Yield the classes of transformers that compute next tokens, with the families that use them."""
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    names = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for file in sorted(Path(auto.__file__).parent.parent.glob("*/modeling_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                yield from ((family, node) for family, name in names.items() if name == node.name)


def test_the_names_of_heads_are_those_of_the_installed_transformers() -> None:
    other = set()
    for family, node in _causal_classes():
        for statement in node.body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "_tied_weights_keys":
                keys = {key for key in ast.literal_eval(statement.value) if key.endswith("weight")}
                if keys and not keys & {"lm_head.weight", "embed_out.weight"}:
                    other.add(family)
    other -= {"gpt_neox_japanese"}
    assert other <= OTHER_HEAD, f"add {other - OTHER_HEAD} to OTHER_HEAD: transformers calls their heads otherwise"


def test_the_families_that_are_tied_by_default_are_those_of_the_installed_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    tied = set()
    for family in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = transformers.CONFIG_MAPPING[family]()
        except Exception:  # needs the configurations of its parts
            continue
        flags = [getattr(part, "tie_word_embeddings", None) for part in (config, config.get_text_config())]
        if all(flags):
            tied.add(family)
    wrong = tied ^ TIED_BY_DEFAULT
    assert not wrong, f"TIED_BY_DEFAULT is out of date for the installed transformers: {sorted(wrong)}"


def test_the_families_that_are_always_tied_are_those_of_the_installed_vllm() -> None:
    """A class computes from the embedding if its logits come from it, or if it ties under no condition on a flag."""
    import importlib.util

    package = importlib.util.find_spec("vllm")
    if package is None or package.origin is None:
        pytest.skip("vLLM is not installed")
    found = set()
    for file in sorted((Path(package.origin).parent / "model_executor" / "models").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and (_embeds_logits(node) or _ties_always(node)):
                found.add(node.name)
    known = {"CohereForCausalLM", "Cohere2MoeForCausalLM", "Gemma2ForCausalLM", "Gemma3nForCausalLM"}
    known |= {"Lfm2ForCausalLM", "Lfm2MoeForCausalLM", "Zamba2ForCausalLM", "WhisperForConditionalGeneration"}
    assert found == known, (
        f"vLLM's classes that tie head and embedding changed: {sorted(found ^ known)}; see families.py"
    )


def _embeds_logits(node: ast.ClassDef) -> bool:
    calls = [
        call
        for function in node.body
        if isinstance(function, ast.FunctionDef) and function.name == "compute_logits"
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("logits_processor") and call.args
    ]
    return any("embed" in ast.unparse(call.args[0]) for call in calls)


def _ties_always(node: ast.ClassDef) -> bool:
    def ties(statement: ast.AST) -> bool:
        return any(
            isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".tie_weights")
            for call in ast.walk(statement)
        )

    def search(statements: list[ast.stmt]) -> bool:
        for statement in statements:
            if isinstance(statement, ast.If):
                by_flag = "tie" in ast.unparse(statement.test) or "tying" in ast.unparse(statement.test)
                if (not by_flag and search(statement.body)) or search(statement.orelse):
                    return True
            elif ties(statement):
                return True
        return False

    functions = [function for function in node.body if isinstance(function, ast.FunctionDef)]
    return any(search(function.body) for function in functions if function.name == "__init__")


# Heads that are not where they should be ----------------------------------------------------------------


@pytest.mark.parametrize("config", [{"tie_word_embeddings": False}, {}])
def test_a_head_that_should_be_there_and_is_not_is_a_damaged_download(tmp_path: Path, config: dict[str, Any]) -> None:
    base = tiny(tmp_path / "base")
    configure(base, "tie_word_embeddings", **config)
    if config:
        configure(base, **config)
    refused(base, "should have an output head .* and none of its files holds one; download it again")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "name",
    ["transformer.ff_out.weight", "transformer.output_layer.weight", "output_projection.weight", "decoder.weight",
     "head.weight", "lm_head.decoder.weight", "cls.predictions.decoder.weight", "generator_lm_head.weight"],
)  # fmt: skip
def test_a_head_of_another_name_is_named(tmp_path: Path, name: str, tied: bool) -> None:
    base = tiny(tmp_path / "base")
    store(base, name)
    configure(base, tie_word_embeddings=tied)
    refused(base, f"no output head of a known name; {name} has the embedding's shape and may be it")


def test_a_family_whose_tied_head_has_another_name_is_refused(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base")
    configure(base, model_type="biogpt")
    refused(base, "calls its output head neither lm_head nor embed_out")


def test_a_family_that_is_tied_by_default_is_tied_where_its_configuration_says_nothing(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base", tied=False)
    configure(base, "tie_word_embeddings", model_type="gemma")
    assert open_checkpoint(str(base)).tied
    refused(base, r"stores another head, lm_head\.weight")
    configure(base, model_type="llama")
    assert not open_checkpoint(str(base)).tied


# Multi-token prediction ----------------------------------------------------------------------------------

COPIES = ["model.layers.2.embed_tokens.weight", "mtp.embed_tokens.weight", "model.mtp.layers.0.embed_tokens.weight"]


@pytest.mark.parametrize("copy", COPIES)
def test_the_copy_for_multi_token_prediction_is_no_second_embedding_and_gets_the_tokens_too(
    tmp_path: Path, copy: str
) -> None:
    base = tiny(tmp_path / "base", tied=False)
    store(base, copy)
    store(base, "model.layers.2.shared_head.head.weight", of=HEAD)
    checkpoint = open_checkpoint(str(base))
    assert checkpoint.input_embedding().name == EMBEDDING
    align(checkpoint, open_checkpoint(str(make_checkpoint(tmp_path / "other", seed=1))))
    report = bake(str(base), random_tokens(32), tmp_path / "baked")
    baked = open_checkpoint(str(tmp_path / "baked")).tensors()
    ids = list(report.token_ids)
    assert baked[copy].read().tobytes() == baked[EMBEDDING].read().tobytes()
    head = baked["model.layers.2.shared_head.head.weight"].read()
    assert head.tobytes() == baked[HEAD].read().tobytes()
    assert np.isfinite(head[ids].astype(np.float32)).all()


# Index -----------------------------------------------------------------------------------------------------


def index_with(base: Path, *names: str) -> None:
    index = json.loads((base / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(names, "model-00001-of-00002.safetensors")
    (base / INDEX).write_text(json.dumps(index))


BESIDE = ["mtp.fc.weight", "model.layers.2.eh_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]


@pytest.mark.parametrize("name", BESIDE)
def test_an_index_entry_beside_the_model_s_own_layers_is_left_out_and_said(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny(tmp_path / "base", shards=2)
    index_with(base, name)
    with caplog.at_level(logging.WARNING):
        bake(str(base), random_tokens(32), tmp_path / "baked")
    assert f"names 1 tensors that none of its files holds ({name} ...)" in caplog.text
    assert name not in json.loads((tmp_path / "baked" / INDEX).read_text())["weight_map"]


@pytest.mark.parametrize("name", ["model.layers.1.mlp.new.weight", "model.norm.bias", "embed_out.weight"])
def test_an_index_entry_that_the_model_needs_is_refused(tmp_path: Path, name: str) -> None:
    base = tiny(tmp_path / "base", shards=2)
    index_with(base, name)
    refused(base, f"names {name}, which none of its files holds; download the checkpoint again")


ODD_INDEXES: dict[str, tuple[Any, str]] = {
    "no map": ({"metadata": {}}, "has no weight_map"),
    "a list": ([], "should hold a JSON object"),
    "a map of numbers": ({"weight_map": {EMBEDDING: 1}}, "whose entries are no names of files"),
    "a map of lists": ({"weight_map": {EMBEDDING: ["x"]}}, "whose entries are no names of files"),
    "null": ({"weight_map": {EMBEDDING: None}}, "whose entries are no names of files"),
    "a list for a map": ({"weight_map": [EMBEDDING]}, "has no weight_map"),
    "a file elsewhere": ({"weight_map": {EMBEDDING: "../x.safetensors"}}, "a file outside its folder"),
    "an endless name": ({"weight_map": {EMBEDDING: "x" * 300}}, "a file outside its folder"),
    "a name with a NUL": ({"weight_map": {EMBEDDING: "x\0y"}}, "a file outside its folder"),
    "a tensor that is not there": ({"weight_map": {"x": "model-00001-of-00002.safetensors"}}, "names x, which"),
}


@pytest.mark.parametrize("case", ODD_INDEXES)
def test_an_odd_index_is_one_sentence(tmp_path: Path, case: str) -> None:
    contents, sentence = ODD_INDEXES[case]
    base = tiny(tmp_path / "base", shards=2)
    (base / INDEX).write_text(json.dumps(contents))
    refused(base, sentence)
    if case != "a tensor that is not there":  # whoever reads the index back sees that it is missing
        with pytest.raises(DttError, match=sentence):
            indexed_tensors(base)


def test_a_model_s_name_that_no_file_system_takes_is_one_sentence() -> None:
    with pytest.raises(DttError, match="can't be opened: File name too long"):
        open_checkpoint("x" * 5000)
