"""GPT-Neo for vLLM, which does not include it.

The model has learned positions, attention without scaling, and local attention, that is a sliding
window, in every other layer. vLLM finds it through the entry point `vllm.general_plugins`, in every
process of an engine. Model: Black et al. 2021, doi 10.5281/zenodo.5297715. Weights are named as
transformers writes them.

Shape suffixes: `T` tokens, `H` hidden.
"""

# No `from __future__ import annotations`: vLLM needs the annotations as types, to see which
# arguments vary in size.
from collections.abc import Iterable

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors


class SelfAttention(nn.Module):
    def __init__(self, vllm_config: VllmConfig, layer: int, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        width, heads = config.hidden_size, config.num_heads
        quantized = {"quant_config": vllm_config.quant_config}
        self.qkv_proj = QKVParallelLinear(
            width, width // heads, heads, bias=False, prefix=f"{prefix}.qkv_proj", **quantized
        )
        self.out_proj = RowParallelLinear(width, width, bias=True, prefix=f"{prefix}.out_proj", **quantized)
        self.attn = Attention(
            heads // get_tensor_model_parallel_world_size(),
            width // heads,
            scale=1.0,
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=config.window_size if config.attention_layers[layer] == "local" else None,
            prefix=f"{prefix}.attn",
            **quantized,
        )

    def forward(self, hidden_TH: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_TH)
        out, _ = self.out_proj(self.attn(*qkv.chunk(3, dim=-1)))
        return out


class _AttentionLevel(nn.Module):
    """Extra level of the module tree, for transformers' names: `attn.attention`."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention


class Mlp(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        width = config.hidden_size
        inner = config.intermediate_size or 4 * width
        quantized = {"quant_config": vllm_config.quant_config}
        self.c_fc = ColumnParallelLinear(width, inner, bias=True, prefix=f"{prefix}.c_fc", **quantized)
        self.c_proj = RowParallelLinear(inner, width, bias=True, prefix=f"{prefix}.c_proj", **quantized)
        self.act = get_act_fn(config.activation_function)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        inner, _ = self.c_fc(hidden_TH)
        out, _ = self.c_proj(self.act(inner))
        return out


class Block(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        layer = int(prefix.rpartition(".")[2])
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = _AttentionLevel(SelfAttention(vllm_config, layer, f"{prefix}.attn.attention"))
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = Mlp(vllm_config, f"{prefix}.mlp")

    def forward(self, hidden_TH: Tensor) -> Tensor:
        hidden_TH = hidden_TH + self.attn.attention(self.ln_1(hidden_TH))
        return hidden_TH + self.mlp(self.ln_2(hidden_TH))


@support_torch_compile
class Transformer(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.wte = VocabParallelEmbedding(config.vocab_size, config.hidden_size, prefix=f"{prefix}.wte")
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.start_layer, self.end_layer, self.h = make_layers(
            config.num_layers, lambda prefix: Block(vllm_config, prefix), prefix=f"{prefix}.h"
        )
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.wte(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            assert input_ids is not None or inputs_embeds is not None
            embeddings = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            hidden_TH = embeddings + self.wpe(positions)
        else:
            assert intermediate_tensors is not None
            hidden_TH = intermediate_tensors["hidden_states"]
        for block in self.h[self.start_layer : self.end_layer]:
            hidden_TH = block(hidden_TH)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_TH})
        return self.ln_f(hidden_TH)


class GPTNeoForCausalLM(nn.Module, SupportsPP):
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={".attention.bias": None, ".attention.masked_bias": None},  # causal masks in old checkpoints
        orig_to_new_stacked={f".{name}_proj": (".qkv_proj", name) for name in ("q", "k", "v")},
    )
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012 - vLLM reads a class attribute

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config, self.quant_config = config, vllm_config.quant_config
        self.transformer = Transformer(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "transformer"))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.transformer.wte)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.transformer.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.transformer.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        return self.transformer(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        if self.config.tie_word_embeddings:
            weights = ((name, weight) for name, weight in weights if name != "lm_head.weight")
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
