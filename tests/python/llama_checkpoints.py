"""Random Llama, Mistral, Qwen2 and Qwen3 checkpoints in Hugging Face layout: see checkpoints.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import DTYPE_TAGS, Tensor, TensorList, train_tokenizer, write_weights

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# What `rope` of make_llama_config() may be, as Llama 3.1 and Qwen have it, with numbers
# that make a difference within a few hundred positions.
ROPE_SCALINGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 48,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40},
    "yarn_factors": {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.9,
        "mscale_all_dim": 0.6,
    },
}


def rope_config(style: str, theta: float, scaling: dict[str, Any] | None, dtype: str) -> dict:
    """The part of a configuration that is spelled in two ways: see make_llama_config()."""
    if style == "old":
        return {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": dtype}
    if style == "new":
        rope = scaling or {"rope_type": "default"}
        return {"rope_parameters": {"rope_theta": theta, **rope}, "dtype": dtype}
    raise ValueError(f"config_style must be 'old' or 'new', not {style!r}")


def make_llama_config(
    *,
    family: str = "llama",
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    intermediate_size: int = 96,
    vocab_size: int = 320,
    max_positions: int = 256,
    rope: str = "plain",
    rope_theta: float = 10000.0,
    eps: float = 1e-6,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    tied: bool = False,
    dtype: str = "float16",
    config_style: str = "old",
    **others: Any,
) -> dict:
    """What config.json says of a model.

    head_dim: None leaves the key out, which means hidden_size / num_heads (Qwen3: 128).
    rope: one of ROPE_SCALINGS.
    attention_bias, mlp_bias: where the family has a choice.
    config_style: "old" spells rope_theta and rope_scaling, "new" rope_parameters.
    others: further keys, such as sliding_window.
    """
    config = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": intermediate_size,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": eps,
        "tie_word_embeddings": tied,
        **rope_config(config_style, rope_theta, ROPE_SCALINGS[rope], dtype),
        **others,
    }
    if head_dim is not None:
        config["head_dim"] = head_dim
    if family in ("llama", "qwen3"):
        config["attention_bias"] = attention_bias
    if family == "llama":
        config["mlp_bias"] = mlp_bias
    if family == "mistral":
        config.setdefault("sliding_window", None)
    return config


def head_dim_of(config: dict) -> int:
    """Of a configuration of make_llama_config()."""
    if "head_dim" not in config and config["model_type"] == "qwen3":
        return 128
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def list_llama_tensors(config: dict, tags: tuple[str, str], seed: int, prefix: str) -> list[Tensor]:
    """All tensors of a checkpoint with this configuration, in the order of the model."""
    hidden, inner, vocab = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    family, head_dim = config["model_type"], head_dim_of(config)
    rows = {
        "q": config["num_attention_heads"] * head_dim,
        "k": config["num_key_value_heads"] * head_dim,
        "v": config["num_key_value_heads"] * head_dim,
    }
    found = TensorList(tags, seed, "lm_head")
    logit_std = 2.5 / np.sqrt(hidden)
    tied = config["tie_word_embeddings"]
    found.add(f"{prefix}embed_tokens.weight", (vocab, hidden), 0.0, logit_std if tied else 0.5)
    for index in range(config["num_hidden_layers"]):
        layer = f"{prefix}layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found.add(f"{layer}.{norm}.weight", (hidden,), 1.0, 0.2)
        bias = config.get("attention_bias", False)
        for name, count in rows.items():
            found.add_linear(
                f"{layer}.self_attn.{name}_proj", count, hidden, 1.2, bias or family == "qwen2"
            )
        found.add_linear(f"{layer}.self_attn.o_proj", hidden, rows["q"], 1.0, bias)
        if family == "qwen3":
            for name in ("q", "k"):
                found.add(f"{layer}.self_attn.{name}_norm.weight", (head_dim,), 1.2, 0.3)
        bias = config.get("mlp_bias", False)
        found.add_linear(f"{layer}.mlp.gate_proj", inner, hidden, 1.4, bias)
        found.add_linear(f"{layer}.mlp.up_proj", inner, hidden, 1.4, bias)
        found.add_linear(f"{layer}.mlp.down_proj", hidden, inner, 1.0, bias)
    found.add(f"{prefix}norm.weight", (hidden,), 1.0, 0.2)
    if not tied:
        found.add("lm_head.weight", (vocab, hidden), 0.0, logit_std)
    return found.tensors


def write_llama_checkpoint(
    folder: Path | str,
    *,
    dtype: str = "float16",
    seed: int = 0,
    prefix: bool = True,
    shards: int = 1,
    vector_dtype: str | None = None,
    tokenizer: str | None = None,
    weights: str = "safetensors",
    **config_options: Any,
) -> Path:
    """Writes a checkpoint folder and returns its path: write_random_checkpoint()'s arguments.

    prefix: tensor names begin with "model." (but for the head).
    config_options: those of make_llama_config().
    """
    config = make_llama_config(dtype=dtype, **config_options)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tags = (DTYPE_TAGS[dtype], DTYPE_TAGS[vector_dtype or dtype])
    tensors = list_llama_tensors(config, tags, seed, "model." if prefix else "")
    write_weights(folder, tensors, shards, weights)
    if tokenizer == "train":
        train_tokenizer(folder, config["vocab_size"])
    return folder
