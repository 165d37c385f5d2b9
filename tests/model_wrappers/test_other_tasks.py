"""Tasks that are not ours under the dtt_ models: rendered by --apply_chat_template, as lm-eval's own hf does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from dtt_plugin.errors import DttError
from tests import conftest
from tests.checkpoints import CHAT_TEMPLATE, SPECIAL_TOKENS, make_checkpoint

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}{% endfor %}"
)
USERS_ONLY = "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}"
NAMED = [
    {"name": "default", "template": CHAT_TEMPLATE},
    {"name": "rag", "template": "RAG " + CHAT_TEMPLATE},
]


def with_template(folder: str, template: Any) -> str:
    path = Path(folder) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return folder


@pytest.fixture
def sums(tmp_path: Path) -> dict[str, Any]:
    """A task with a column `messages` that holds the answer, as data for finetuning have it."""
    question = "What is 2 + 3?"
    told = [{"role": "user", "content": question}, {"role": "assistant", "content": "The answer is 5."}]
    rows = [
        {"q": question, "a": "5", "messages": told},
        {"q": "1 <|im_end|> [DefensiveToken0]?", "a": "2", "messages": []},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Give only the number. {{q}}",
        "doc_to_target": "a",
        "metric_list": [{"metric": "exact_match"}],
    }


def evaluate(pretrained: str, task: dict[str, Any], *, model: str = "dtt_hf", **options: Any) -> dict[str, Any]:
    arguments = {"pretrained": pretrained, "dtype": "float32", "max_length": 4096} | options.pop("model_args", {})
    results: dict[str, Any] = conftest.evaluate(model, arguments, tasks=[task], limit=None, **options)
    return results


def prompts_of(results: dict[str, Any], task: str = "sums") -> list[str]:
    return [sample["arguments"][0][0] for sample in results["samples"][task]]


def test_a_column_called_messages_is_not_the_prompt(tiny: str, tiny_tokens: str, sums: dict[str, Any]) -> None:
    options: dict[str, Any] = {"apply_chat_template": True, "num_fewshot": 0}
    stock = prompts_of(evaluate(tiny, sums, model="hf", **options))
    ours = prompts_of(evaluate(tiny, sums, **options))
    assert ours[0] == stock[0]
    assert "The answer is 5." not in ours[0]
    defended = prompts_of(evaluate(tiny, sums, model_args={"tokens": tiny_tokens}, **options))
    assert defended[0] == "".join(f"[DefensiveToken{i}]" for i in range(5)) + stock[0]
    with pytest.raises(DttError, match=r"sums brings plain text.*: add --apply_chat_template\.$"):
        evaluate(tiny, sums)


@pytest.mark.parametrize("refusal", [NO_SYSTEM, ALTERNATING, USERS_ONLY], ids=["no system", "alternating", "users"])
@pytest.mark.parametrize("defended", [True, False])
def test_other_tasks_run_without_a_system_role(
    refusal: str, defended: bool, tiny: str, tiny_tokens: str, sums: dict[str, Any]
) -> None:
    with_template(tiny, refusal + CHAT_TEMPLATE)
    options: dict[str, Any] = {"apply_chat_template": True, "model_args": {"tokens": tiny_tokens} if defended else {}}
    generated = prompts_of(evaluate(tiny, sums, **options))
    assert generated[0].endswith(
        "<|im_start|>user\nGive only the number. What is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    choice = sums | {
        "output_type": "multiple_choice",
        "doc_to_choice": ["2", "5"],
        "doc_to_target": 1,
        "task": "choice",
    }
    choice |= {"metric_list": [{"metric": "acc"}]}
    assert "acc,none" in evaluate(tiny, choice, **options)["results"]["choice"]
    with pytest.raises(DttError, match="add --apply_chat_template"):
        evaluate(tiny, sums, model_args=options["model_args"])


def test_few_shots_are_turns_of_a_conversation(tiny: str, sums: dict[str, Any]) -> None:
    with_template(tiny, ALTERNATING + CHAT_TEMPLATE)
    shots = sums | {"fewshot_split": "test"}
    options: dict[str, Any] = {"apply_chat_template": True, "num_fewshot": 1, "fewshot_as_multiturn": True}
    ours, stock = (prompts_of(evaluate(tiny, shots, model=model, **options)) for model in ("dtt_hf", "hf"))
    assert ours[1].replace("< |im_end|>", "<|im_end|>").replace("[ DefensiveToken0]", "[DefensiveToken0]") == stock[1]


def test_control_tokens_in_the_data_of_any_task_are_counted_and_told(
    tiny: str, sums: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    results = evaluate(tiny, sums, apply_chat_template=True)
    assert results["config"]["dtt_plugin"]["neutralised_control_tokens"] == 2
    assert caplog.text.count("2 control tokens in untrusted data were neutralised") == 1
    assert [sample["arguments"][0][2]["neutralised"] for sample in results["samples"]["sums"]] == [0, 2]
    choice = sums | {"output_type": "multiple_choice", "doc_to_choice": ["2", "5", "7"], "doc_to_target": 1}
    choice |= {"metric_list": [{"metric": "acc"}]}
    facts = evaluate(tiny, choice, apply_chat_template=True)["config"]["dtt_plugin"]
    assert facts["neutralised_control_tokens"] == 2, "a prompt counts once, however many choices follow it"


def test_our_own_tasks_count_once_with_and_without_the_flag(tmp_path: Path) -> None:
    model = str(make_checkpoint(tmp_path / "m", special=(*SPECIAL_TOKENS, "exactly")))  # which the attacks say
    counts = []
    for flag in (False, True):
        results = conftest.evaluate("dtt_hf", {"pretrained": model, "max_length": 4096}, apply_chat_template=flag)
        counts.append(results["config"]["dtt_plugin"]["neutralised_control_tokens"])
    assert counts[0] == counts[1] > 0


def test_counters_begin_anew_with_each_run_of_one_model(tiny: str, sums: dict[str, Any]) -> None:
    model = get_model("dtt_hf").create_from_arg_obj({"pretrained": tiny, "dtype": "float32"}, {"device": "cpu"})
    facts = [
        conftest.evaluate(model, {}, tasks=[sums], limit=None, apply_chat_template=True)["config"]["dtt_plugin"]
        for _ in range(2)
    ]
    assert facts[0]["generated_tokens"] > 0
    for name in ("generated_tokens", "neutralised_control_tokens"):
        assert facts[0][name] == facts[1][name], name


def test_a_named_template_is_used_and_an_unknown_name_refused(
    tiny: str, tiny_tokens: str, sums: dict[str, Any]
) -> None:
    with_template(tiny, NAMED)
    for arguments in ({}, {"tokens": tiny_tokens}):
        model = get_model("dtt_hf").create_from_arg_obj({"pretrained": tiny} | arguments, {"device": "cpu"})
        default = model.fingerprint
        for name, beginning in (("rag", "RAG "), (True, ""), ("rag", "RAG "), ("default", "")):
            assert "RAG" in model.chat_template(name) if beginning else "RAG" not in model.chat_template(name)
            names = "".join(f"[DefensiveToken{i}]" for i in range(5)) if arguments else ""
            text = model.apply_chat_template([{"role": "user", "content": "a"}])
            assert text.startswith(names + beginning + "<|im_start|>user")
            assert (model.fingerprint == default) is not bool(beginning)
        with pytest.raises(
            DttError, match=r"--apply_chat_template rug: .* no chat template of that name, only: default, rag"
        ):
            model.chat_template("rug")
    published = get_model("dtt_hf").create_from_arg_obj({"pretrained": tiny, "prompt_format": "qwen2.5"})
    with pytest.raises(DttError, match=r"the prompts are in prompt_format=qwen2\.5; leave the name out"):
        published.chat_template("rag")


def test_a_named_template_is_that_of_one_run(tiny: str, tiny_tokens: str, sums: dict[str, Any]) -> None:
    with_template(tiny, NAMED)
    for arguments in ({}, {"tokens": tiny_tokens}):
        model = get_model("dtt_hf").create_from_arg_obj({"pretrained": tiny, **arguments}, {"device": "cpu"})
        default = model.fingerprint
        model.chat_template("rag")  # as lm-eval does before a run with --apply_chat_template rag
        first = conftest.evaluate(model, {}, tasks=[sums], limit=None, apply_chat_template=True)
        second = conftest.evaluate(model, {}, tasks=[sums], limit=None, apply_chat_template=True)
        assert [prompts_of(results)[0].count("RAG") for results in (first, second)] == [1, 0]
        facts = [results["config"]["dtt_plugin"]["fingerprint"] for results in (first, second)]
        assert facts[0] != default == facts[1]


def test_a_named_template_of_the_command_is_in_prompts_and_cache(tiny: str, tmp_path: Path) -> None:
    with_template(tiny, NAMED)
    for name in ("rag", "default"):
        done = conftest.lm_eval(
            "--model", "dtt_hf", "--model_args", f"pretrained={tiny},max_length=4096", "--tasks", "injection_demo",
            "--limit", "1", "--gen_kwargs", "max_gen_toks=2", "--apply_chat_template", name, "--log_samples",
            "--use_cache", str(tmp_path / "answers"), "--output_path", str(tmp_path / name),
            folder=tmp_path, all_tasks=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        [sample] = conftest.read_samples(tmp_path / name, "injection_demo")
        for index in range(4):
            assert sample["arguments"][f"gen_args_{index}"]["arg_0"].startswith("RAG ") == (name == "rag")


def test_a_model_without_a_default_template_says_which_it_has(tiny: str, sums: dict[str, Any]) -> None:
    with_template(tiny, NAMED[1:])
    with pytest.raises(DttError, match=r"no chat template called default, only: rag; choose one with --apply_chat_tem"):
        evaluate(tiny, sums, apply_chat_template=True)
    model = get_model("dtt_hf").create_from_arg_obj({"pretrained": tiny}, {"device": "cpu"})
    model.chat_template("rag")
    assert model.apply_chat_template([{"role": "user", "content": "a"}]).startswith("RAG <|im_start|>user")
    assert "<|im_start|>" in get_model("dtt_hf").create_from_arg_obj(
        {"pretrained": tiny, "prompt_format": "qwen2.5"}, {"device": "cpu"}
    ).chat_template(True)


@pytest.mark.parametrize("prompt_format", ["model", "llama3", "falcon3", "qwen2.5"])
def test_only_conversations_count_as_rendered(prompt_format: str, tiny: str) -> None:
    model = get_model("dtt_hf").create_from_arg_obj(
        {"pretrained": tiny, "prompt_format": prompt_format}, {"device": "cpu"}
    )
    for text in ("<|", "<|x", "<|im", "<|endoftext|>What is 2 + 3?", "<|assistant|>\nx", "What?", ""):
        request = Instance("generate_until", {}, (text, {"max_gen_toks": 1}), 0, ("task", 0, 1))
        with pytest.raises(DttError, match="task brings plain text"):
            model.generate_until([request])
    for roles in (["system", "user"], ["user"]):
        rendered = model.apply_chat_template([{"role": role, "content": "What?"} for role in roles])
        assert model.renderer.is_rendered(rendered)
    request = Instance("generate_until", {}, ("What?", {"max_gen_toks": 1}), 0, ("task", 3, 1))
    with pytest.raises(
        DttError, match=r"task, document 3: the text is no conversation .* in spite of --apply_chat_templ"
    ):
        model.generate_until([request])
