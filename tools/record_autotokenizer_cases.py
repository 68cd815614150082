"""Records the ids that transformers' AutoTokenizer gives where files beside tokenizer.json speak.

Writes tests/data/autotokenizer_cases.json for tests/python/test_awkward_files.py: the demo model's
tokenizer.json with other files beside it, the ids of one text, and the versions used.
Needs `transformers` (without torch).
Usage: python tools/record_autotokenizer_cases.py
"""

import json
import shutil
import tempfile
from pathlib import Path

import tokenizers
import transformers

ROOT = Path(__file__).resolve().parents[1]
TEXT = "Hello [PAD] there </s> <|endoftext|>"
PAD = {
    "content": "[PAD]",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": True,
}
USUAL = dict.fromkeys(["bos_token", "eos_token", "unk_token"], "<|endoftext|>")
# Keys of tokenizer_config.json beside the usual ones, and other files.
CASES: dict[str, tuple[dict, dict]] = {
    "usual": ({}, {"special_tokens_map.json": USUAL}),
    "no prefix space": ({"add_prefix_space": False}, {}),
    "prefix space": ({"add_prefix_space": True}, {}),
    "prefix space, plain class": (
        {"add_prefix_space": True, "tokenizer_class": "PreTrainedTokenizerFast"},
        {},
    ),
    "bos": ({"add_bos_token": True}, {}),
    "eos": ({"add_eos_token": True}, {}),
    "pad token": ({"pad_token": "[PAD]"}, {}),
    "known pad token": ({"pad_token": "<|padding|>"}, {}),
    "other eos token": ({"eos_token": "</s>"}, {}),
    "additional tokens": ({"additional_special_tokens": ["[PAD]"]}, {}),
    "extra tokens": ({"extra_special_tokens": ["[PAD]"]}, {}),
    "added tokens by id": ({"added_tokens_decoder": {"4096": PAD}}, {}),
    "added_tokens.json": ({}, {"added_tokens.json": {"[PAD]": 4096}}),
    "known added_tokens.json": ({}, {"added_tokens.json": {"<|endoftext|>": 0}}),
    "special_tokens_map.json": ({}, {"special_tokens_map.json": {"pad_token": "[PAD]"}}),
    "map with objects": ({}, {"special_tokens_map.json": {"pad_token": PAD}}),
    "map with a list": ({}, {"special_tokens_map.json": {"additional_special_tokens": ["[PAD]"]}}),
    "longest text": ({"model_max_length": 3}, {}),
}


def record(config: dict, files: dict) -> dict:
    """The files of one case and the ids that AutoTokenizer gives with them."""
    config = {"tokenizer_class": "GPTNeoXTokenizer", **USUAL, **config}
    files = {"tokenizer_config.json": config, **files}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(ROOT / "models/demo/tokenizer.json", folder)
        (folder / "config.json").write_text('{"model_type": "gpt_neox"}')
        for file, content in files.items():
            (folder / file).write_text(json.dumps(content))
        ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    return {"files": files, "ids": ids}


def main() -> None:
    """Records all cases."""
    recording = {
        "versions": {
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "text": TEXT,
        "cases": {name: record(*case) for name, case in CASES.items()},
    }
    path = ROOT / "tests/data/autotokenizer_cases.json"
    path.write_text(json.dumps(recording, indent=1) + "\n")


if __name__ == "__main__":
    main()
