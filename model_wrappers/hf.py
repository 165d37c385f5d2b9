"""`--model dtt_hf`: lm-eval's Hugging Face model with DefensiveTokens, in memory, on any device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig, LogitsProcessorList

from dtt_plugin.bake.plan import BIAS_OF_NEVER
from dtt_plugin.demo.model import default_model
from dtt_plugin.errors import DttError
from dtt_plugin.model_wrappers.arguments import as_bool, check_arguments, model_name, parameters_of
from dtt_plugin.model_wrappers.defended import Defended
from dtt_plugin.model_wrappers.early_decision import EndDecided, SettledText, count_generated
from dtt_plugin.model_wrappers.session import Arm, LoadedModel
from dtt_plugin.prompt.hf_tokenizer import hf_tokenizer
from dtt_plugin.prompt.renderer import add_token_names, defensive_token_ids
from dtt_plugin.prompt.roles import LoneUser
from dtt_plugin.tasks.thoughts import marker_tokens
from dtt_plugin.tokens.files import DefensiveTokens

logger = logging.getLogger("dtt_plugin")

# What lm-eval's HFLM hands through **kwargs to `from_pretrained` (transformers 4 and 5).
_LOADING_ARGUMENTS = frozenset(
    [
        "adapter_kwargs",
        "attn_implementation",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "cache_dir",
        "config",
        "device_map",
        "experts_implementation",
        "force_download",
        "generation_config",
        "kernel_config",
        "key_mapping",
        "load_in_4bit",
        "load_in_8bit",
        "local_files_only",
        "low_cpu_mem_usage",
        "max_memory",
        "offload_buffers",
        "offload_state_dict",
        "quantization_config",
        "torch_dtype",
        "use_kernels",
        "use_safetensors",
        "variant",
    ]
)
# All that a checkpoint's generation_config decides.
_GENERATION_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What need not be told when it is left out: kept, bookkeeping or given by every request; and factors of 1.
_UNTOLD = frozenset([*_GENERATION_IDS, "transformers_version", "_from_model_config", "use_cache", "do_sample"])
_ONE_IS_NONE = frozenset(
    ["num_beams", "temperature", "top_p", "typical_p", "repetition_penalty", "length_penalty", "num_return_sequences"]
)


class DttHF(Defended, HFLM):
    """lm-eval's `hf` model under a defense.

    Takes every argument of `hf`, and `tokens`, `tokens_model`, `defense`, `prompt_format`, `untrusted_role`,
    `lone_user`, `early_decision` (docs/models.md).
    With DefensiveTokens their rows are put into the loaded model; nothing is written to disk.
    """

    _n_scored: int | None = None  # rows that the output head had before it grew

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
        check_arguments("dtt_hf", kwargs, parameters_of(HFLM.__init__) | _LOADING_ARGUMENTS)
        arm = Arm.from_arguments(tokens, tokens_model, defense, prompt_format, untrusted_role, lone_user)
        self.early_decision = as_bool("early_decision", early_decision)
        model = model_name(pretrained) or default_model()
        extra_bos = as_bool("add_bos_token", kwargs.pop("add_bos_token", None))
        if arm.defended and kwargs.get("tp_plan"):
            raise DttError("dtt_hf can't put tokens into a tp_plan model; use dtt_vllm with tensor_parallel_size=.")
        arguments = dict(kwargs)
        kwargs.setdefault("use_safetensors", True)  # never unpickle weights
        if kwargs.get("device") in (None, "cuda", "cuda:0") and not torch.cuda.is_available():
            kwargs["device"] = "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            super().__init__(model, **kwargs)
        except (KeyError, AttributeError) as error:
            # transformers finds no weight to tie where PEFT has put a layer of its own.
            if not (peft := kwargs.get("peft")):
                raise
            raise DttError(
                f"peft={peft} can't be put onto {model} ({type(error).__name__}: {error}): an adapter of an output head"
                " that is also the input embedding is not supported; give the head weights of its own"
                " (tie_word_embeddings=false), or an adapter of other layers."
            ) from error
        if self.backend != "causal":
            raise DttError(f"pretrained={model}: dtt_hf needs a causal language model, this is a {self.backend} one.")
        if "generation_config" not in arguments:
            self._decode_plainly()
        if self.early_decision and not self._ends:
            raise DttError(f"pretrained={model} names no token that ends a response; leave early_decision out.")
        if arm.defended and arm.tokens is not None:
            self._n_scored = self.model.get_output_embeddings().weight.shape[0]
            install_tokens(self.model, self.tokenizer, arm.tokens, name=model)
        special = {token.content: i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        kept = marker_tokens(special) | ({self.end_of_thoughts} & special.keys())
        # Empty where lm-eval's decoding drops nothing that is needed.
        self._dropped = set(special.values()) - {special[text] for text in kept} if kept else set()
        revision, template_args = kwargs.get("revision"), self.chat_template_args
        self._begin(arm, LoadedModel.now(model, revision, arguments, extra_bos=extra_bos, template_args=template_args))

    def _route_of(self, arm: Arm) -> str:
        return "model in memory"

    def _create_tokenizer(self, pretrained: str, tokenizer: Any = None, **options: Any) -> None:
        """Load the tokenizer as lm-eval does, but never Mistral's own."""
        if options.get("gguf_file") or not (tokenizer is None or isinstance(tokenizer, str)):
            super()._create_tokenizer(pretrained, tokenizer, **options)
            return
        self.tokenizer = hf_tokenizer(
            tokenizer or pretrained,
            revision=options["revision"],
            trust_remote_code=options["trust_remote_code"],
            use_fast=options["use_fast_tokenizer"],
            **({"subfolder": options["subfolder"]} if options.get("subfolder") else {}),
        )

    def _decode_plainly(self) -> None:
        """Leave out what a checkpoint says about its generation: greedy is greedy, as it is in vLLM under lm-eval.

        Its ids stay, and the DefensiveTokens that a defended checkpoint suppresses.
        """
        settings = self.model.generation_config.to_dict()
        kept = {name: settings.get(name) for name in _GENERATION_IDS}
        ours = defensive_token_ids(self.tokenizer)
        plain = GenerationConfig(**kept, suppress_tokens=ours or None)
        self.model.generation_config = plain
        if adapted := getattr(self.model, "get_base_model", None):  # PEFT: some adapters ask the model inside
            adapted().generation_config = plain
        if settings.get("suppress_tokens"):
            settings["suppress_tokens"] = sorted({*settings["suppress_tokens"]} - {*ours})
        left_out = [
            f"{name}={value}"
            for name, value in sorted(settings.items())
            if value and name not in _UNTOLD and not (name in _ONE_IS_NONE and value == 1)
        ]
        if left_out:
            logger.warning(
                "Not applied of the checkpoint's generation_config: %s; set it with --gen_kwargs if it is wanted.",
                ", ".join(left_out),
            )

    @property
    def _ends(self) -> list[int]:
        """The ids that end a generation, the tokenizer's own first."""
        ids = self.model.generation_config.eos_token_id
        ends: list[int] = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        return sorted(ends, key=lambda token: token != self.eot_token_id)

    def _model_call(self, inps: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Return lm-eval's logits, float [batch, length, vocabulary]; DefensiveTokens have no probability."""
        logits: torch.Tensor = super()._model_call(inps, *args, **options)
        if self._n_scored is not None:
            logits[..., self._n_scored :] = float("-inf")
        return logits

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Generate as lm-eval does, int64 [batch, length]; a row whose response is decided ends early."""
        prompt_length = context.shape[1]
        if self._decided:
            rows = zip(context, generation_kwargs["attention_mask"], strict=True)
            decided = [self._decided[tuple(ids[mask.bool()].tolist())] for ids, mask in rows]
            settled = SettledText(self.tokenizer, self.tok_decode, stop)
            ending = EndDecided(prompt_length, self._ends, settled, decided)
            generation_kwargs["logits_processor"] = LogitsProcessorList([ending])
        if "suppress_tokens" in generation_kwargs:  # the user's come beside the DefensiveTokens, never for them
            ours = self.model.generation_config.suppress_tokens or []
            generation_kwargs["suppress_tokens"] = sorted({*ours, *(generation_kwargs["suppress_tokens"] or [])})
        generated: torch.Tensor = super()._model_generate(
            context=context, max_length=max_length, stop=stop, **generation_kwargs
        )
        self._generated_tokens += count_generated(generated[:, prompt_length:].tolist(), self._ends)
        return generated

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """Decode as lm-eval does, but keep the special tokens that tell thoughts from the answer."""
        if skip_special_tokens and self._dropped:
            tokens = [token for token in tokens if token not in self._dropped]
            skip_special_tokens = False
        return str(super().tok_decode(tokens, skip_special_tokens=skip_special_tokens))

    def tok_batch_encode(
        self, strings: Sequence[str], *_args: Any, **_options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and attention mask, int64 [batch, longest prompt], padded on the left and never cut."""
        rows = [self.renderer.encode(text) for text in strings]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        return ids, mask


@torch.no_grad()
def install_tokens(model: Any, tokenizer: Any, tokens: DefensiveTokens, *, name: str) -> list[int]:
    """Give a loaded model the DefensiveTokens, as a baked checkpoint has them, and return their ids.

    The embedding gets their rows; an output head that shares its weights is separated first, so that rows of
    a hundred times an ordinary norm never become output rows. A head that has to grow gets the mean of the
    ordinary rows, whose logit is never above the highest, and generation suppresses the ids.

    Args:
        model: a transformers causal language model; changed in place.
        tokenizer: its tokenizer; gets k special tokens.
        tokens: rows in the space of the model's input embedding, float32 [k, d].
        name: the model's name, for messages.

    Raises:
        DttError: the widths differ, or the tokenizer already knows DefensiveTokens.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module, what in ((embedding, "input embedding"), (head, "output head")):
        if module is not None and "weight" not in module._parameters:  # a wrapper of PEFT's, for instance
            raise DttError(
                f"{name} has an adapter on its {what}, which has no rows for DefensiveTokens; merge it into the model"
                " first (PEFT's merge_and_unload, then save_pretrained) and give that folder without peft=."
            )
    weight = embedding.weight
    tokens.check_width(weight.shape[1], name="tokens=", model=name)
    ids = add_token_names(tokenizer, tokens.k, name=name)
    n_ordinary = min(ids[0], weight.shape[0])
    growth = max(ids) + 1 - weight.shape[0]
    rows = torch.nn.functional.pad(weight, (0, 0, 0, max(growth, 0)))  # a copy: the head keeps the old tensor
    rows[ids] = torch.as_tensor(tokens.rows, dtype=weight.dtype, device=weight.device)
    embedding.weight = torch.nn.Parameter(rows, requires_grad=False)
    embedding.num_embeddings = rows.shape[0]
    if growth > 0:
        mean = head.weight[:n_ordinary].float().mean(dim=0, keepdim=True).to(head.weight.dtype)
        head.weight = torch.nn.Parameter(torch.cat([head.weight, mean.expand(growth, -1)]), requires_grad=False)
        head.out_features = head.weight.shape[0]
        if getattr(head, "bias", None) is not None:
            never = head.bias.new_full((growth,), BIAS_OF_NEVER)
            head.bias = torch.nn.Parameter(torch.cat([head.bias, never]), requires_grad=False)
    config = model.config.get_text_config()
    _grow_per_layer_embedding(model, config, max(ids) + 1)
    config.vocab_size = rows.shape[0]
    config.tie_word_embeddings = model.config.tie_word_embeddings = False
    suppressed = model.generation_config.suppress_tokens or []
    model.generation_config.suppress_tokens = sorted({*suppressed, *ids})
    return ids


def _grow_per_layer_embedding(model: Any, config: Any, n_rows: int) -> None:
    """Give Gemma 3n's and 4's second table, which every layer reads, the row of padding for the new ids.

    So these models treat what is no text, too (an image's soft tokens, for instance).
    """
    find = getattr(model, "get_per_layer_input_embeddings", None)
    table = find() if find and getattr(config, "hidden_size_per_layer_input", 0) else None
    if table is None or n_rows <= table.weight.shape[0]:
        return
    padding = table.weight[config.pad_token_id or 0].expand(n_rows - table.weight.shape[0], -1)
    table.weight = torch.nn.Parameter(torch.cat([table.weight, padding]), requires_grad=False)
    table.num_embeddings = table.weight.shape[0]
