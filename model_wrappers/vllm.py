"""`--model dtt_vllm`: lm-eval's vLLM model with DefensiveTokens, from a baked checkpoint."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dtt_plugin.bake import bake_cached
from dtt_plugin.demo.model import default_model
from dtt_plugin.errors import DttError
from dtt_plugin.model_wrappers.arguments import as_bool, check_arguments, model_name, parameters_of, template_arguments
from dtt_plugin.model_wrappers.defended import Arm, Defended
from dtt_plugin.model_wrappers.early_decision import generate_decided
from dtt_plugin.model_wrappers.vllm_import import import_vllm_class
from dtt_plugin.prompt.hf_tokenizer import MISTRALS_OWN, hf_tokenizer, mistral_refusal
from dtt_plugin.prompt.renderer import model_templates
from dtt_plugin.prompt.roles import LoneUser

if TYPE_CHECKING:
    from lm_eval.models.vllm_causallms import VLLM
else:
    VLLM = import_vllm_class()

logger = logging.getLogger("dtt_plugin")

_CPU_KV_CACHE_BYTES = 4 << 30


class DttVLLM(Defended, VLLM):
    """lm-eval's `vllm` model under a defense.

    Takes every argument of `vllm` and of vLLM's engine, and `tokens`, `tokens_model`, `defense`,
    `prompt_format`, `untrusted_role`, `lone_user`, `early_decision` (docs/models.md). With DefensiveTokens the
    engine starts from a baked checkpoint in the cache: what does not change is linked, and a second start writes
    nothing.
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
        **kwargs: Any,
    ) -> None:
        check_arguments("dtt_vllm", kwargs, _known_arguments())
        self.arm = Arm.from_arguments(tokens, tokens_model, defense, prompt_format, untrusted_role, lone_user)
        self.early_decision = as_bool("early_decision", early_decision)
        if self.early_decision and int(kwargs.get("data_parallel_size", 1)) > 1:
            raise DttError("early_decision=true needs data_parallel_size=1; tensor_parallel_size= works with it.")
        model = model_name(pretrained) or default_model()
        if self.arm.defended and kwargs.get("tokenizer"):
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
        templates = None
        checkpoint = model
        if (self.arm.defended and self.arm.tokens is not None) or (Path(model) / MISTRALS_OWN).is_file():
            # Of the undefended tokenizer: a baked one's template holds the tokens already, and adds no BOS.
            trust = as_bool("trust_remote_code", kwargs.get("trust_remote_code"))
            base = hf_tokenizer(kwargs.get("tokenizer") or model, revision=revision, trust_remote_code=trust)
            templates = model_templates(base, self.arm.prompt_format)
        if self.arm.defended and self.arm.tokens is not None:
            baked = bake_cached(model, self.arm.tokens, revision=revision, prompt_format=self.arm.prompt_format)
            checkpoint = str(baked)
            kwargs.pop("revision", None)
        super().__init__(checkpoint, **kwargs)
        self._ready(
            model=model,
            revision=revision,
            templates=model_templates(self.tokenizer, self.arm.prompt_format) if templates is None else templates,
            arguments=arguments,
            extra_bos=extra_bos,
            template_args=template_args,
        )

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
        if generate and self._decided is not None:
            outputs = generate_decided(
                self.model.llm_engine,
                requests,
                sampling_params,
                self._decided,
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
