"""`--model dtt_hf`: lm-eval's Hugging Face model with DefensiveTokens, in memory, on any device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import LogitsProcessorList

from dtt_plugin.bake.plan import BIAS_OF_NEVER
from dtt_plugin.demo_model import default_model
from dtt_plugin.errors import DttError
from dtt_plugin.formats import defensive_token_names
from dtt_plugin.model_wrappers.arguments import as_bool, check_arguments, parameters_of
from dtt_plugin.model_wrappers.defended import Arm, Defended
from dtt_plugin.model_wrappers.early_decision import EndDecided, SettledText, count_generated
from dtt_plugin.prompt import model_template
from dtt_plugin.thoughts import marker_tokens
from dtt_plugin.tokens import DefensiveTokens

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


class DttHF(Defended, HFLM):
    """lm-eval's `hf` model under a defense.

    Takes every argument of `hf`, and `tokens`, `tokens_model`, `defense`, `prompt_format`, `early_decision`
    (docs/models.md).
    With DefensiveTokens their rows are put into the loaded model; nothing is written to disk.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        tokens: str | None = None,
        tokens_model: str | None = None,
        defense: str | None = None,
        prompt_format: str | None = None,
        early_decision: bool = False,
        **kwargs: Any,
    ) -> None:
        check_arguments("dtt_hf", kwargs, parameters_of(HFLM.__init__) | _LOADING_ARGUMENTS)
        self.arm = Arm.from_arguments(tokens, tokens_model, defense, prompt_format)
        self.early_decision = as_bool("early_decision", early_decision)
        model = pretrained or default_model()
        extra_bos = as_bool("add_bos_token", kwargs.pop("add_bos_token", None))
        if self.arm.defended and kwargs.get("tp_plan"):
            raise DttError("dtt_hf can't put tokens into a tp_plan model; use dtt_vllm with tensor_parallel_size=.")
        arguments = dict(kwargs)
        kwargs.setdefault("use_safetensors", True)  # never unpickle weights
        if kwargs.get("device") in (None, "cuda", "cuda:0") and not torch.cuda.is_available():
            kwargs["device"] = "mps" if torch.backends.mps.is_available() else "cpu"
        super().__init__(model, **kwargs)
        if self.backend != "causal":
            raise DttError(f"pretrained={model}: dtt_hf needs a causal language model, this is a {self.backend} one.")
        self._decode_plainly()
        if self.early_decision and not self._ends:
            raise DttError(f"pretrained={model} names no token that ends a response; leave early_decision out.")
        template = model_template(self.tokenizer)
        if self.arm.defended and self.arm.tokens is not None:
            install_tokens(self.model, self.tokenizer, self.arm.tokens, name=model)
        special = {token.content: i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        kept = marker_tokens(special) | ({self.end_of_thoughts} & special.keys())
        # Empty where lm-eval's decoding drops nothing that is needed.
        self._dropped = set(special.values()) - {special[text] for text in kept} if kept else set()
        self._ready(
            model=model,
            revision=kwargs.get("revision"),
            model_template=template,
            arguments=arguments,
            extra_bos=extra_bos,
            template_args=self.chat_template_args,
        )

    def _decode_plainly(self) -> None:
        """Leave out a checkpoint's own repetition penalty: greedy is greedy, as it is in vLLM under lm-eval."""
        settings = self.model.generation_config
        if settings.repetition_penalty not in (None, 1.0):
            logger.warning(
                "The checkpoint's repetition_penalty=%s is not applied; set it with --gen_kwargs if it is wanted.",
                settings.repetition_penalty,
            )
            settings.repetition_penalty = None

    @property
    def _ends(self) -> list[int]:
        """The ids that end a generation, the tokenizer's own first."""
        ids = self.model.generation_config.eos_token_id
        ends: list[int] = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        return sorted(ends, key=lambda token: token != self.eot_token_id)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Generate as lm-eval does, int64 [batch, length]; a row whose response is decided ends early."""
        prompt_length = context.shape[1]
        if self._decided is not None:
            settled = SettledText(self.tokenizer, self.tok_decode, stop)
            ending = EndDecided(prompt_length, self._ends, settled, self._decided)
            generation_kwargs["logits_processor"] = LogitsProcessorList([ending])
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
    names = defensive_token_names(tokens.k)
    known = tokenizer.get_vocab()
    if any(token in known for token in names):
        raise DttError(f"{name} already has DefensiveTokens; leave tokens= out, or give the undefended checkpoint.")
    embedding = model.get_input_embeddings()
    weight = embedding.weight
    if tokens.width != weight.shape[1]:
        raise DttError(
            f"tokens= has rows of width {tokens.width} (made for {tokens.model}), {name} has width"
            f" {weight.shape[1]}; transfer them first with `dtt align` and `dtt transfer`."
        )
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in names], special_tokens=True)
    ids: list[int] = tokenizer.convert_tokens_to_ids(names)
    head = model.get_output_embeddings()
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
    config.vocab_size = rows.shape[0]
    config.tie_word_embeddings = model.config.tie_word_embeddings = False
    suppressed = model.generation_config.suppress_tokens or []
    model.generation_config.suppress_tokens = sorted({*suppressed, *ids})
    return ids
