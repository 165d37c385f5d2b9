"""The layer of a vLLM engine that looks token ids up, with rows of its own for the ids of DefensiveTokens.

It takes the place of vLLM's `VocabParallelEmbedding` by vLLM's own way of replacing a layer. The rows lie in a
buffer beside the weights, on every rank: nothing is written into the embedding, which may be quantized, or be the
output head as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtt_plugin.errors import DttError
from dtt_plugin.serving.placing import rows_of_config

REPLACED = "VocabParallelEmbedding"
_CAN_NOT = "can't take DefensiveTokens beside its weights; bake them."
_built_for: list[Mapping[str, Any]] = []  # the configurations that a layer of this process holds the rows of


def replace_layer() -> None:
    """Have vLLM build this layer wherever it would build its own; twice is once.

    Raises:
        DttError: another plugin replaces the same layer.
    """
    import torch
    from vllm.config.vllm import get_current_vllm_config_or_none
    from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if REPLACED in op_registry_oot:
        if op_registry_oot[REPLACED].__name__ == "EmbeddingWithDefensiveTokens":
            return
        raise DttError(
            f"Another vLLM plugin replaces {REPLACED} ({op_registry_oot[REPLACED].__module__}), so DefensiveTokens "
            "can't be served beside the base model; bake them."
        )

    class EmbeddingWithDefensiveTokens(VocabParallelEmbedding):
        """Looks ids up as its base class does; those of DefensiveTokens in rows of its own."""

        def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
            self.dtt_rows: torch.Tensor | None = None
            config = served(get_current_vllm_config_or_none())
            if config is None:
                return
            ids, rows = rows_of_config(config)
            if embedding_dim != rows.shape[1] or num_embeddings <= max(ids):
                return  # another table: of positions, of every layer, of a smaller draft model
            if self.tp_size > 1 and not self.reduce_results:
                raise DttError(f"This model adds up its embedding elsewhere, so it {_CAN_NOT}")
            del self.dtt_rows
            slots = torch.full((num_embeddings,), -1, dtype=torch.int32)
            slots[ids] = torch.arange(len(ids), dtype=torch.int32)
            for name, tensor in (("dtt_slots", slots), ("dtt_rows", torch.from_numpy(rows).to(self.weight_dtype()))):
                self.register_buffer(name, tensor.to(torch.get_default_device()), persistent=False)
            _built_for.append(config)

        def weight_dtype(self) -> torch.dtype:
            dtype = getattr(getattr(self, "weight", None), "dtype", None)
            return dtype if dtype in (torch.bfloat16, torch.float16, torch.float32) else torch.get_default_dtype()

        def forward(self, input_: torch.Tensor) -> torch.Tensor:
            """Return the rows of `input_`, integer [...], in the model's type, [..., width]."""
            embedded: torch.Tensor = super().forward(input_)
            if self.dtt_rows is None:
                return embedded
            if embedded.dtype != self.dtt_rows.dtype:
                raise DttError(f"This model looks tokens up as {embedded.dtype}, so it {_CAN_NOT}")
            slots = self.dtt_slots[input_.long().clamp(0, len(self.dtt_slots) - 1)]
            own = self.dtt_rows[slots.clamp(min=0).long()]
            return torch.where((slots >= 0).unsqueeze(-1), own, embedded)

    PluggableLayer.register_oot(name=REPLACED)(EmbeddingWithDefensiveTokens)


def served(vllm_config: Any) -> Mapping[str, Any] | None:
    """Return what `dtt` in a vLLM configuration's `additional_config` says, None where it says nothing."""
    additional = getattr(vllm_config, "additional_config", None)
    config = additional.get("dtt") if isinstance(additional, Mapping) else None
    return config if isinstance(config, Mapping) else None


def check_built(config: Mapping[str, Any]) -> None:
    """Refuse a model that was built without the rows of `config`: it would be undefended in silence.

    Raises:
        DttError: no layer of this process took them.
    """
    from vllm.distributed import get_pp_group

    if get_pp_group().is_first_rank and not any(built is config or built == config for built in _built_for):
        raise DttError(
            f"This model does not look its tokens up in the layer that vLLM lets plugins replace, so it {_CAN_NOT}"
        )
