"""Records how transformers reads GPT-NeoX configurations, and checkpoints that it has saved.

Writes data/config_cases.json and the folders data/checkpoints/* for this folder's tests. Needs
torch and transformers. Usage: python tests/unit/model/record_transformers_cases.py
"""

import json
import pathlib
import shutil
import tempfile
from collections import OrderedDict
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, GPTNeoXConfig, GPTNeoXForCausalLM

DATA = pathlib.Path(__file__).parent / "data"
SIZES = {
    "model_type": "gpt_neox",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
CONFIG_CHANGES: list[dict[str, Any]] = [
    {},
    {"max_position_embeddings": 77, "layer_norm_eps": 1e-6},
    {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
    {"rotary_pct": 0.5, "rotary_emb_base": 5000},
    {"rotary_pct": 1.0, "rotary_emb_base": 10000.0, "rope_scaling": None},
    {"rotary_pct": 1, "rope_theta": None, "partial_rotary_factor": None},
    {"rotary_pct": 0.0},
    {"rotary_pct": 0.01},
    {"rotary_pct": 0.3},
    {"rotary_pct": 0.13},
    {"rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rope_theta": 10000},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 123.5}},
    {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}},
    {"rope_parameters": {"rope_type": "default"}, "rotary_pct": 0.5, "rotary_emb_base": 5000},
    {
        "rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 1.0},
        "rotary_pct": 0.5,
        "rotary_emb_base": 5000,
    },
    {"rope_scaling": {"type": "default"}, "rotary_pct": 1.0},
    {
        "rope_scaling": {"rope_type": "default", "rope_theta": 5.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 9.0},
    },
    {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
    {"eos_token_id": [0, 2], "bos_token_id": None},
    {"eos_token_id": None, "bos_token_id": 5},
    {"eos_token_id": 63},
    {"hidden_size": 40, "num_attention_heads": 4, "rotary_pct": 0.6},
    {"hidden_size": 80, "num_attention_heads": 1, "rotary_pct": 0.25},
]


def record_config(change: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """What transformers understands of config.json."""
    written = {**SIZES, **change}
    (folder / "config.json").write_text(json.dumps(written))
    config = AutoConfig.from_pretrained(folder)
    model = GPTNeoXForCausalLM(config)
    attention = model.gpt_neox.layers[0].attention
    eos = config.eos_token_id
    return {
        "config": written,
        "read": {
            "head_dim": attention.head_size,
            "rotary_dim": attention.rotary_ndims,
            "rope_theta": float(config.rope_parameters["rope_theta"]),
            "layer_norm_eps": config.layer_norm_eps,
            "max_positions": config.max_position_embeddings,
            "parallel_residual": config.use_parallel_residual,
            "attention_bias": attention.dense.bias is not None,
            "tied": config.tie_word_embeddings,
            "bos": config.bos_token_id,
            "eos": eos if isinstance(eos, list) else [] if eos is None else [eos],
        },
    }


def fnv1a(data: bytes) -> str:
    """The 64-bit FNV-1a hash, in hexadecimal."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return f"{value:016x}"


def record_checkpoint(name: str, dtype: torch.dtype, shard_size: str, **change: Any) -> None:
    """Saves a random model as transformers does, and beside it what its tensors hold."""
    torch.manual_seed(len(name))
    sizes = {key: value for key, value in SIZES.items() if key != "model_type"}
    config = GPTNeoXConfig(
        **{**sizes, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, **change}
    )
    model = GPTNeoXForCausalLM(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    folder = DATA / "checkpoints" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tensors = {
        key: {"shape": list(value.shape), "fnv1a": fnv1a(value.view(torch.uint8).numpy().tobytes())}
        for key, value in model.state_dict().items()
    }
    expected = {
        "transformers": transformers.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "num_parameters": model.num_parameters(),
        "tensors": tensors,
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def use_torch_files(name: str) -> None:
    """Turns a checkpoint's files into torch's, as transformers 4 wrote them, with its buffers."""
    folder = DATA / "checkpoints" / name
    mask = torch.tril(torch.ones(1, 1, 8, 8, dtype=torch.uint8))
    buffers = {"bias": mask, "masked_bias": torch.tensor(-1e9)}
    weight_map = {}
    for path in sorted(folder.glob("model*.safetensors")):
        shard = f"pytorch_{path.stem}.bin"
        tensors = OrderedDict(load_file(path))
        if "gpt_neox.layers.0.input_layernorm.weight" in tensors:
            tensors |= {f"gpt_neox.layers.0.attention.{key}": b for key, b in buffers.items()}
        torch.save(tensors, folder / shard)
        weight_map.update({key: shard for key in tensors})
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.unlink()
        content = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Writes everything."""
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        cases = [record_config(change, pathlib.Path(folder)) for change in CONFIG_CHANGES]
    lines = ",\n".join(json.dumps(case) for case in cases)
    version = json.dumps(transformers.__version__)
    (DATA / "config_cases.json").write_text(
        f'{{"transformers": {version}, "cases": [\n{lines}\n]}}\n'
    )
    record_checkpoint("untied_float32", torch.float32, "1GB")
    record_checkpoint("tied_float16", torch.float16, "1GB", tie_word_embeddings=True)
    record_checkpoint("sharded_bfloat16", torch.bfloat16, "4KB", use_parallel_residual=False)
    record_checkpoint("no_attention_bias_float16", torch.float16, "1GB", attention_bias=False)
    record_checkpoint("torch_file_float16", torch.float16, "1GB")
    use_torch_files("torch_file_float16")
    record_checkpoint("torch_shards_bfloat16", torch.bfloat16, "4KB")
    use_torch_files("torch_shards_bfloat16")


if __name__ == "__main__":
    main()
