"""`--model dtt_vllm`: lm-eval's vLLM model with DefensiveTokens, beside the base model or from a baked checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dtt_plugin.bake import BakeOptions, bake_cached
from dtt_plugin.demo.model import default_model
from dtt_plugin.errors import DttError, LoadAnew
from dtt_plugin.model_wrappers.arguments import as_bool, check_arguments, model_name, parameters_of, template_arguments
from dtt_plugin.model_wrappers.defended import Defended
from dtt_plugin.model_wrappers.early_decision import generate_decided
from dtt_plugin.model_wrappers.session import Arm, ArmTokenizer, LoadedModel
from dtt_plugin.model_wrappers.vllm_import import import_vllm_class
from dtt_plugin.prompt.hf_tokenizer import MISTRALS_OWN, hf_tokenizer, mistral_refusal
from dtt_plugin.prompt.renderer import add_token_names, model_templates
from dtt_plugin.prompt.roles import LoneUser
from dtt_plugin.serving.hooks import problem
from dtt_plugin.serving.placing import NoFreeIds, Placement, TokenFile, place
from dtt_plugin.serving.requests import UNCHECKED

if TYPE_CHECKING:
    from lm_eval.models.vllm_causallms import VLLM
else:
    VLLM = import_vllm_class()

logger = logging.getLogger("dtt_plugin")

_CPU_KV_CACHE_BYTES = 4 << 30


class DttVLLM(Defended, VLLM):
    """lm-eval's `vllm` model under a defense.

    Takes every argument of `vllm` and of vLLM's engine, and `tokens`, `tokens_model`, `defense`, `prompt_format`,
    `untrusted_role`, `lone_user`, `early_decision`, `baked` (docs/models.md). The engine loads the base model as it is,
    and its embedding layer holds the DefensiveTokens beside the weights (`dtt_plugin.serving`). With baked=true, and
    where a model has no free ids or this vLLM was not tried, which one sentence then says, it starts from a baked
    checkpoint in the cache: what does not change is linked, and a second start writes nothing.

    `more_tokens` names further token files, as (file, entry of a JSON or None), among which `change_arm` then chooses
    without another start, where all of them have a place beside the base model.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        tokens: str | None = None,
        tokens_model: str | None = None,
        defense: str | None = None,
        prompt_format: str | None = None,
        untrusted_role: str | None = None,
        lone_user: LoneUser | None = None,
        early_decision: bool = False,
        baked: bool = False,
        more_tokens: Iterable[tuple[str, str | None]] = (),
        **kwargs: Any,
    ) -> None:
        check_arguments("dtt_vllm", kwargs, _known_arguments())
        arm = Arm.from_arguments(tokens, tokens_model, defense, prompt_format, untrusted_role, lone_user)
        self.early_decision = as_bool("early_decision", early_decision)
        if self.early_decision and int(kwargs.get("data_parallel_size", 1)) > 1:
            raise DttError("early_decision=true needs data_parallel_size=1; tensor_parallel_size= works with it.")
        model = model_name(pretrained) or default_model()
        files = [TokenFile(str(tokens), tokens_model)] if tokens else []
        files += [TokenFile(*file) for file in more_tokens]
        if arm.defended and kwargs.get("tokenizer"):
            raise DttError(
                "dtt_vllm can't combine tokens= with tokenizer=; put that tokenizer's files into the checkpoint folder."
            )
        extra_bos = as_bool("add_bos_token", kwargs.pop("add_bos_token", None))
        revision = kwargs.get("revision")
        arguments = dict(kwargs)
        template_args = template_arguments(kwargs)
        self._set_defaults(kwargs, demo=pretrained is None)
        if kwargs["tokenizer_mode"] == "mistral":
            raise mistral_refusal(model)
        self._base_tokenizer: Any = None
        if files or (Path(model) / MISTRALS_OWN).is_file():
            # Of the undefended tokenizer: a baked one's template holds the tokens already, and adds no BOS.
            trust = as_bool("trust_remote_code", kwargs.get("trust_remote_code"))
            self._base_tokenizer = hf_tokenizer(
                kwargs.get("tokenizer") or model, revision=revision, trust_remote_code=trust
            )
        checkpoint = model
        self._placement = None if as_bool("baked", baked) else self._placed(arm, model, files, kwargs)
        self._baked = arm.tokens if self._placement is None and arm.defended else None
        if self._placement is not None:
            soft = {**self._placement.to_config(), "plain": UNCHECKED}
            kwargs["additional_config"] = {**(kwargs.get("additional_config") or {}), "dtt": soft}
        elif self._baked:
            checkpoint = str(bake_cached(model, self._baked, BakeOptions(revision, arm.prompt_format)))
            kwargs.pop("revision", None)
        super().__init__(checkpoint, **kwargs)
        self._own_tokenizer = self.tokenizer
        self._begin(arm, LoadedModel.now(model, revision, arguments, extra_bos=extra_bos, template_args=template_args))

    @staticmethod
    def _placed(arm: Arm, model: str, files: Sequence[TokenFile], kwargs: Mapping[str, Any]) -> Placement | None:
        """Give the tokens ids of the model's own vocabulary; None where they have to be baked, said in a sentence."""
        if kwargs.get("tokenizer"):
            return None
        obstacle = problem() if files else None
        if obstacle is None and kwargs.get("kv_transfer_config") is not None:
            obstacle = "With kv_transfer_config= the tokens can't stand beside the base model."
        for wanted in (files, files[:1] if arm.tokens else []) if obstacle is None else ():
            try:
                return place(model, wanted, revision=kwargs.get("revision")) if wanted else None
            except NoFreeIds as error:
                obstacle = str(error)
            except DttError:  # of another file, or of one that no prompt needs
                if arm.defended and len(wanted) == 1:
                    raise
        if obstacle and arm.defended:
            logger.info("%s They are baked into a checkpoint in the cache.", obstacle)
        return None

    def _route_of(self, arm: Arm) -> str | None:
        """Return how the engine comes by the tokens; one from a baked checkpoint says so in every arm."""
        if self._baked:
            return "baked checkpoint"
        return "embedding layer" if arm.defended else None

    def _check_change(self, arm: Arm) -> None:
        if not arm.defended or arm.tokens is None:
            return
        placed = self._placement.ids_of(arm.tokens) if self._placement else None
        if placed is None and (self._baked is None or self._baked.digest != arm.tokens.digest):
            raise LoadAnew("The engine was started without these tokens; load the model anew.")

    def _tokenizer_of(self, arm: Arm) -> ArmTokenizer:
        base = self._base_tokenizer
        tokenizer = base if self._baked and not arm.defended else self._own_tokenizer
        engine_ids: dict[int, int] = {}
        placed = self._placement.ids_of(arm.tokens) if self._placement and arm.tokens else None
        if arm.defended and placed:
            # The ids in prompts are those that the tokenizer gives the names, whichever ones this engine has for them.
            tokenizer = copy.deepcopy(base)
            ids = add_token_names(tokenizer, len(placed), name=str(base.name_or_path))
            engine_ids = dict(zip(ids, placed, strict=True))
        templates = model_templates(tokenizer if base is None else base, arm.prompt_format)
        return ArmTokenizer(tokenizer, templates, engine_ids)

    def _for_engine(self, ids: Sequence[int]) -> list[int]:
        """Return a prompt with the engine's ids of its DefensiveTokens.

        Raises:
            DttError: it holds a token whose row the engine has replaced.
        """
        if self._placement is None:
            return list(ids)
        replaced, own = set(self._placement.ids), self._session.words.engine_ids
        if others := [i for i in ids if i in replaced and i not in own]:
            raise DttError(
                f"A prompt holds the reserved token {self._base_tokenizer.convert_ids_to_tokens(others[0])!r}, whose"
                " place DefensiveTokens have in this engine; add baked=true to the model arguments."
            )
        return [own.get(i, i) for i in ids]

    def get_model_info(self) -> dict[str, Any]:
        """Return the model facts, with the data type that the engine really uses."""
        info = super().get_model_info()
        if self.data_parallel_size <= 1:
            info["model_dtype"] = str(self.model.llm_engine.model_config.dtype)
        return info

    def _model_generate(
        self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None
    ) -> Sequence[Any]:
        """Generate as lm-eval does; a request whose response is decided ends early."""
        outputs: Sequence[Any]
        decided = [self._decided[tuple(ids)] for ids in requests] if generate and self._decided else None
        requests = [self._for_engine(ids) for ids in requests]
        if decided is not None:
            outputs = generate_decided(
                self.model.llm_engine,
                requests,
                sampling_params,
                decided,
                lora_request=self.lora_request,
                progress=self.batch_size == "auto",
            )
        else:
            outputs = super()._model_generate(requests, generate=generate, sampling_params=sampling_params)
        if generate:
            self._generated_tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        return outputs

    @staticmethod
    def _set_defaults(kwargs: dict[str, Any], *, demo: bool) -> None:
        """Fill in what serves where the user said nothing."""
        from vllm.config.model import TokenizerMode
        from vllm.platforms import current_platform

        kwargs.setdefault("load_format", "safetensors")  # never unpickle weights
        if kwargs.get("tokenizer_mode", "auto") == "auto":  # which takes Mistral's own where there is one
            kwargs["tokenizer_mode"] = "hf" if "hf" in get_args(TokenizerMode) else "auto"
        kwargs.setdefault("config_format", "hf")
        # lm-eval passes batch size 1 where none is given; vLLM schedules its batches itself.
        if str(kwargs.get("batch_size", 1)) == "1":
            kwargs["batch_size"] = "auto"
        if not current_platform.is_cpu():
            return
        if kwargs.get("dtype", "auto") == "auto":
            kwargs["dtype"] = "float32"
            logger.info("dtype=float32, since vLLM runs on the processor.")
        chosen = kwargs.keys() & {"gpu_memory_utilization", "kv_cache_memory_bytes"}
        if not chosen and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            # vLLM would claim 92 % of the memory, and refuse to start where other programs use a part of it.
            kwargs["kv_cache_memory_bytes"] = _CPU_KV_CACHE_BYTES
        # vLLM leaves a core to a server's front end; here it would idle, half of a machine with two.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        # Prompts share what they begin with by whole blocks, and a record's four variants begin alike; the
        # 128 tokens that vLLM takes on a processor are longer than most of these beginnings.
        kwargs.setdefault("block_size", 32)
        if demo:
            kwargs.setdefault("enforce_eager", True)
            if "max_length" not in kwargs:
                kwargs.setdefault("max_model_len", 2048)


def _known_arguments() -> set[str]:
    from vllm import LLM, EngineArgs

    engine = {field.name for field in dataclasses.fields(EngineArgs)}
    return parameters_of(VLLM.__init__) | parameters_of(LLM.__init__) | engine | {"device", "swap_space"}
