"""Llamas of random weights, made where they run, and views of them that share the weights."""

import copy
from collections.abc import Callable
from itertools import chain

import torch
from torch import nn
from transformers import AutoModel, LlamaConfig

from benchmarks.gpu.plan import Shape
from pipeline.model.layers import decoder_layers


def random_llama(shape: Shape, device: torch.device) -> nn.Module:
    """Return the base model in bfloat16 with the weights that transformers begins training with; nothing is read."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=131072,
    )
    torch.manual_seed(0)
    with torch.device(device):  # 8B would take a minute on the CPU, and as long again to be copied
        model = AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    ready: nn.Module = model.eval().requires_grad_(False)
    return ready


def twin(model: nn.Module) -> nn.Module:
    """Return another model with the same weights in memory: to be tapped and compiled without changing this one."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def matrix_products(model: nn.Module, positions: int) -> Callable[[], None]:
    """Return the products of a batch of positions with every matrix of the layers, and nothing else."""
    linears = [module for layer in decoder_layers(model) for module in layer.modules() if isinstance(module, nn.Linear)]
    inputs = {
        width: torch.randn(positions, width, dtype=weight.dtype, device=weight.device)
        for width, weight in ((module.in_features, module.weight) for module in linears)
    }

    @torch.inference_mode()
    def products() -> None:
        for linear in linears:
            linear(inputs[linear.in_features])

    return products
