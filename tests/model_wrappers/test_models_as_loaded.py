"""What a checkpoint brings along besides its weights: generation settings, adapters, second tables, tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from dtt_plugin.bake import bake
from dtt_plugin.errors import DttError
from dtt_plugin.tasks.injection import InjectionRequest
from dtt_plugin.tokens.files import load_tokens
from tests.bake_helpers import load
from tests.conftest import write_tokens

CONVERSATION = [{"role": "system", "content": "Sum up."}, {"role": "user", "content": "Some data"}]


def dtt_hf(pretrained: Any, **arguments: Any) -> Any:
    return get_model("dtt_hf").create_from_arg_obj(
        {"pretrained": pretrained, "dtype": "float32", **arguments}, {"device": "cpu"}
    )


def answer(model: Any, **generation: Any) -> str:
    request = InjectionRequest(
        "generate_until", {"messages": CONVERSATION}, ("", {"max_gen_toks": 12, **generation}), 0, ("task", 0, 1)
    )
    [text] = model.generate_until([request])
    return str(text)


def set_generation(folder: str, **settings: Any) -> str:
    path = Path(folder) / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


# Generation settings ---------------------------------------------------------------------------------------------


def greedy(folder: str) -> tuple[str, list[int]]:
    """Return what the bare model answers, and the ids."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(Path(folder))
    ids = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False)
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[-12:], skip_special_tokens=True), ids[-12:]


SETTINGS: list[dict[str, Any]] = [
    {"max_new_tokens": 3},
    {"max_new_tokens": 40},
    {"max_length": 3},
    {"min_new_tokens": 12},
    {"min_length": 500},
    {"no_repeat_ngram_size": 1},
    {"bad_words_ids": "FIRST"},
    {"suppress_tokens": "FIRST"},
    {"begin_suppress_tokens": "FIRST"},
    {"sequence_bias": [[["FIRST"], -100.0]]},
    {"forced_bos_token_id": 5},
    {"forced_eos_token_id": 5},
    {"exponential_decay_length_penalty": [1, 50.0]},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2},
    {"repetition_penalty": 5.0},
    {"stop_strings": ["e", "a", "t"]},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"do_sample": True, "temperature": 5.0, "top_p": 1.0},
    {"guidance_scale": 3.0},
    {"max_time": 0.0001},
    {"return_dict_in_generate": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "+".join(settings))
def test_nothing_of_a_checkpoints_generation_settings_decides(
    settings: dict[str, Any], tiny: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected, ids = greedy(tiny)
    filled = json.loads(json.dumps(settings).replace('"FIRST"', str(ids[0])))
    if "bad_words_ids" in filled:
        filled["bad_words_ids"] = [[ids[0]]]
    elif not isinstance(filled.get("suppress_tokens", []), list) or "begin_suppress_tokens" in filled:
        filled = {name: [value] for name, value in filled.items()}
    set_generation(tiny, **filled)
    assert answer(dtt_hf(tiny)) == expected
    [told] = [record.message for record in caplog.records if "generation_config" in record.message]
    for name, value in filled.items():
        assert f"{name}=" in told or name == "do_sample" or value == 1


def test_nothing_is_told_where_nothing_is_left_out(tiny: str, caplog: pytest.LogCaptureFixture) -> None:
    set_generation(tiny, num_beams=1, repetition_penalty=1.0, use_cache=True, pad_token_id=0, no_repeat_ngram_size=0)
    dtt_hf(tiny)
    assert "generation_config" not in caplog.text


def test_what_the_user_asks_for_still_counts(tiny: str) -> None:
    expected, ids = greedy(tiny)
    set_generation(tiny, no_repeat_ngram_size=1)
    model = dtt_hf(tiny)
    assert answer(model) == expected
    assert answer(model, suppress_tokens=[ids[0]]) != expected
    assert answer(model, num_beams=2, do_sample=False) != "" or expected == ""


def test_a_users_suppressed_tokens_come_beside_ours(tiny: str, tiny_tokens: str) -> None:
    model = dtt_hf(tiny, tokens=tiny_tokens)
    generate, rows = model.model.generate, []

    def noting(**options: Any) -> Any:
        rows.append(generate(**options))
        return rows[-1]

    model.model.generate = noting
    head = model.model.get_output_embeddings().weight
    with torch.no_grad():
        head[268], head[269] = 1000 * head[268], -1000 * head[268]  # one of the two is always the likeliest
    prompt = len(ids := model.renderer.encode(model.renderer.render(CONVERSATION).text))
    assert set(ids[:5]) == set(range(268, 273))
    answer(model)
    answer(model, suppress_tokens=[3])
    for row in rows:
        assert not set(row[0, prompt:].tolist()) & set(range(268, 273))
    model.model.generation_config.suppress_tokens = None
    answer(model)
    assert set(rows[-1][0, prompt:].tolist()) & set(range(268, 273)), "the head would not have said them: no test"


def test_a_defended_checkpoint_still_never_says_its_tokens(tiny: str, tiny_tokens: str, tmp_path: Path) -> None:
    set_generation(tiny, suppress_tokens=[7])
    model = dtt_hf(str(bake(tiny, load_tokens(tiny_tokens), tmp_path / "baked").folder))
    assert model.model.generation_config.suppress_tokens == list(range(268, 273))


# Models that are loaded, adapters, second tables -----------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["dtt_hf", "dtt_vllm"])
def test_a_loaded_model_is_refused(wrapper: str, tiny: str) -> None:
    if wrapper == "dtt_vllm":
        pytest.importorskip("vllm")
    with pytest.raises(
        DttError, match="pretrained= is a loaded LlamaForCausalLM, and the dtt_ models load theirs themselv"
    ):
        get_model(wrapper).create_from_arg_obj({"pretrained": load(Path(tiny))})


def test_a_path_object_is_a_folder(tiny: str) -> None:
    assert dtt_hf(Path(tiny)).get_model_info()["dtt_plugin"]["model"] == tiny


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"target_modules": ["embed_tokens"]}, "input embedding"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "input embedding"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "input embedding"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}, "input embedding"),
        ({"target_modules": ["lm_head"]}, "output head"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "output head"),
    ],
)
def test_an_adapter_on_embedding_or_head_is_refused_with_tokens(
    options: dict[str, Any], where: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from tests.checkpoints import make_checkpoint

    folder = str(make_checkpoint(tmp_path / "m", tied=False, dtype="float32"))
    peft.get_peft_model(load(Path(folder)), peft.LoraConfig(r=2, **options)).save_pretrained(tmp_path / "adapter")
    dtt_hf(folder, peft=str(tmp_path / "adapter"))
    tokens = write_tokens(tmp_path / "t.safetensors", width=32)
    with pytest.raises(DttError, match=f"has an adapter on its {where}, .*; merge it into the model first"):
        dtt_hf(folder, peft=str(tmp_path / "adapter"), tokens=tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    ],
)
def test_an_adapter_of_a_head_that_is_the_embedding_is_refused(
    options: dict[str, Any], tiny: str, tiny_tokens: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(load(Path(tiny)), peft.LoraConfig(r=2, **options)).save_pretrained(tmp_path / "adapter")
    for tokens in ({}, {"tokens": tiny_tokens}):
        with pytest.raises(DttError, match=r"adapter can't be put onto .*that is also the input embedding"):
            dtt_hf(tiny, peft=str(tmp_path / "adapter"), **tokens)


def test_an_adapter_beside_the_embedding_runs_with_tokens(tiny: str, tiny_tokens: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(load(Path(tiny)), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "a"
    )
    assert isinstance(answer(dtt_hf(tiny, peft=str(tmp_path / "a"), tokens=tiny_tokens)), str)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_under_an_adapter_too_nothing_of_the_generation_settings_decides(
    task_type: str | None, tiny: str, tiny_tokens: str, tmp_path: Path
) -> None:
    """Whether PEFT asks its own settings or those of the model inside depends on the adapter's task type."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task_type)
    peft.get_peft_model(load(Path(tiny)), adapter).save_pretrained(tmp_path / "a")
    for tokens in ({}, {"tokens": tiny_tokens}):
        expected = answer(dtt_hf(set_generation(tiny, max_new_tokens=None, no_repeat_ngram_size=None), **tokens))
        model = dtt_hf(
            set_generation(tiny, max_new_tokens=3, no_repeat_ngram_size=1), peft=str(tmp_path / "a"), **tokens
        )
        assert answer(model) == expected, "a new adapter changes nothing"
        inner = model.model.get_base_model().generation_config
        assert inner.suppress_tokens == (list(range(268, 273)) if tokens else None)


@pytest.mark.parametrize("family", ["Gemma3n", "Gemma4"])
def test_models_with_an_embedding_for_each_layer_run_with_tokens(family: str, tiny: str, tmp_path: Path) -> None:
    import transformers

    if not hasattr(transformers, f"{family}ForCausalLM"):
        pytest.skip(f"this transformers has no {family}")
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 512,
    }  # fmt: skip
    special = {"pad_token_id": 5, "eos_token_id": 267, "bos_token_id": None}
    config = getattr(transformers, f"{family}TextConfig")(
        vocab_size=268, vocab_size_per_layer_input=268, **sizes, **special
    )
    torch.manual_seed(0)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path / "gemma")
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "gemma")
    tokens = write_tokens(tmp_path / "t.safetensors", width=32)
    model = dtt_hf(str(tmp_path / "gemma"), tokens=tokens)
    assert answer(model) == answer(model)
    table = model.model.get_per_layer_input_embeddings().weight
    assert table.shape[0] == 273
    assert torch.equal(table[268:], table[5].expand(5, -1)), "a defined row: that of padding"
    undefended = dtt_hf(str(tmp_path / "gemma"))
    assert isinstance(answer(undefended), str)


# Text that is none -----------------------------------------------------------------------------------------------

HALF = "a \ud83d b"


@pytest.mark.parametrize("roles", [["system", "user"], ["user", "assistant", "user"]])
def test_half_a_surrogate_pair_anywhere_is_told_in_a_sentence(roles: list[str], tiny: str) -> None:
    model = dtt_hf(tiny)
    for broken in range(len(roles)):
        messages = [{"role": role, "content": HALF if n == broken else "x"} for n, role in enumerate(roles)]
        with pytest.raises(DttError, match=r"holds half a surrogate pair, which is no text: '.*\\ud83d b"):
            model.apply_chat_template(messages)
        request = InjectionRequest("generate_until", {"messages": messages}, ("", {"max_gen_toks": 1}), 0, ("t", 4, 1))
        with pytest.raises(DttError, match=r"^t, document 4: A text to send holds half a surrogate pair"):
            model.generate_until([request])
    choice = Instance("loglikelihood", {}, (model.apply_chat_template(CONVERSATION), HALF), 0, ("t", 0, 1))
    with pytest.raises(DttError, match="half a surrogate pair"):
        model.loglikelihood([choice])
    assert model.apply_chat_template([{"role": "user", "content": "a \U0001f600 b"}])


def test_half_a_surrogate_pair_in_a_tools_name_or_the_template_is_told(tiny: str) -> None:
    with pytest.raises(DttError, match=r"chat_template_args holds half a surrogate pair, .*\\ud83d"):
        dtt_hf(tiny, chat_template_args={"tools": [{"name": HALF}]})
    path = Path(tiny) / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": HALF + config["chat_template"]}))
    with pytest.raises(DttError, match="The chat template holds half a surrogate pair"):
        dtt_hf(tiny)
