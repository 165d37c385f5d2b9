"""How DefensiveTokens come into `dtt_vllm`'s engine, which here is not started, and that one sentence says why."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dtt_plugin.errors import DttError, LoadAnew
from dtt_plugin.serving import hooks
from tests.checkpoints import CHAT_TEMPLATE, make_checkpoint
from tests.conftest import write_tokens

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.usefixtures("no_engine"),
]
CONVERSATION = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DTT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "baked"


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(make_checkpoint(tmp_path / "model", reserved=12))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [write_tokens(tmp_path / f"{name}.safetensors", width=32, seed=ord(name)) for name in "abc"]


def dtt_vllm(pretrained: str, more: list[str] | None = None, **arguments: Any) -> Any:
    from dtt_plugin.model_wrappers.vllm import DttVLLM

    return DttVLLM(pretrained, more_tokens=[(file, None) for file in more or []], **arguments)


def route_of(model: Any) -> Any:
    return model._session.identity["tokens_route"]


def test_the_tokens_stand_beside_the_model_and_nothing_is_written(model: str, files: list[str], cache: Path) -> None:
    beside = dtt_vllm(model, tokens=files[0])
    assert route_of(beside) == "embedding layer"
    assert not cache.exists()
    baked = dtt_vllm(model, tokens=files[0], baked=True)
    assert route_of(baked) == "baked checkpoint"
    assert len(list(cache.glob("?" * 32))) == 1
    assert beside.fingerprint != baked.fingerprint
    assert beside.renderer.render(CONVERSATION) == baked.renderer.render(CONVERSATION)
    ids = beside.renderer.encode(beside.renderer.render(CONVERSATION).text)
    assert ids == baked.renderer.encode(baked.renderer.render(CONVERSATION).text)
    assert beside._for_engine(ids) == [*range(272, 277), *ids[5:]], "the last five reserved tokens' rows"
    assert route_of(dtt_vllm(model)) is None


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("full", "has 0 free ids and 5 are needed"),
        ("moved", "has moved vllm.renderers.base.BaseRenderer.gone, which serving token files"),
        ("other parameters", "has moved vllm.renderers.base.BaseRenderer.render_chat(gone=), which serving"),
        ("untried", "was not tried with token files beside a base model, only 0.1 to 0.2"),
        ("left out", "VLLM_PLUGINS=other leaves the vLLM plugin dtt_plugin out"),
        ("transfer", "With kv_transfer_config= the tokens can't stand beside the base model"),
    ],
)
def test_whatever_keeps_them_from_it_is_told_and_they_are_baked(
    what: str,
    sentence: str,
    model: str,
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "dtt_plugin")
    arguments: dict[str, Any] = {}
    if what == "full":
        model = str(make_checkpoint(tmp_path / "full"))
    elif what == "moved":
        monkeypatch.setattr(hooks, "HOOKS", (("vllm.renderers.base", "BaseRenderer.gone", ()),))
    elif what == "other parameters":
        monkeypatch.setattr(hooks, "HOOKS", (("vllm.renderers.base", "BaseRenderer.render_chat", ("gone",)),))
    elif what == "untried":
        monkeypatch.setattr(hooks, "TRIED", ((0, 1), (0, 2)))
    elif what == "left out":
        monkeypatch.setenv("VLLM_PLUGINS", "other")
    else:
        arguments["kv_transfer_config"] = {"kv_connector": "X"}
    assert route_of(dtt_vllm(model, tokens=files[0], **arguments)) == "baked checkpoint"
    (told,) = [record.getMessage() for record in caplog.records if sentence in record.getMessage()]
    assert told.endswith("They are baked into a checkpoint in the cache.")


def test_one_engine_has_every_arm_as_if_it_had_been_loaded_with_it(model: str, files: list[str]) -> None:
    shared = dtt_vllm(model, more=files[:2], defense="none")
    arms: list[dict[str, Any]] = [
        {"defense": "reminder"},
        {"tokens": files[0], "defense": "tokens"},
        {"tokens": files[1], "defense": "reminder+tokens"},
        {"defense": "none"},
    ]
    prompts = set()
    for arm in arms:
        shared.change_arm(**arm)
        alone = dtt_vllm(model, **arm)
        assert shared.fingerprint == alone.fingerprint
        text = shared.apply_chat_template(CONVERSATION)
        assert text == alone.apply_chat_template(CONVERSATION)
        prompts.add(tuple(shared._for_engine(shared.renderer.encode(text))))
    assert len(prompts) == len(arms)


def test_a_change_that_fails_leaves_the_arm_as_it_was(model: str, files: list[str]) -> None:
    config = Path(model) / "tokenizer_config.json"
    template = {"chat_template": CHAT_TEMPLATE + "[DefensiveToken2]"}  # with tokens, it holds one twice
    config.write_text(json.dumps(json.loads(config.read_text()) | template))
    shared = dtt_vllm(model, more=files[:2], defense="sandwich")
    before, text = shared._session, shared.apply_chat_template(CONVERSATION)
    with pytest.raises(LoadAnew, match="started without these tokens; load the model anew"):
        shared.change_arm(tokens=files[2], defense="tokens")
    with pytest.raises(DttError, match="this one holds 6"):
        shared.change_arm(tokens=files[0], defense="tokens")
    with pytest.raises(DttError, match="nothing"):
        shared.change_arm(defense="nothing")
    assert shared._session is before
    assert shared.arm.name == "sandwich"
    assert shared.apply_chat_template(CONVERSATION) == text
