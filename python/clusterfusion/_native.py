"""The functions of the C++ library, by the names that python/src exports them under.

Each call releases the GIL. An error of the library arrives as the Python exception that its kind
names (include/clusterfusion/error.hpp), with the library's own message.
"""

from pathlib import Path
from typing import Any

try:
    import tvm_ffi
except ImportError as error:
    raise ImportError(
        "clusterfusion needs the package apache-tvm-ffi (0.1.15 or newer), which cannot be "
        f"imported ({error}); install it with: python -m pip install 'apache-tvm-ffi>=0.1.15'"
    ) from error

from clusterfusion._native_call import NativeFunction, interrupt_at_exit

_LIBRARY = "libclusterfusion_ffi.so"

# Beyond those that apache-tvm-ffi knows already.
for _exception in (
    ArithmeticError,
    FileNotFoundError,
    InterruptedError,
    NotImplementedError,
    OSError,
    PermissionError,
):
    tvm_ffi.register_error(_exception)


def find_library(folders: list[str]) -> Path:
    """Returns the path of the shared library in one of the folders.

    Args:
        folders: The package's folders; an editable installation has two.

    Raises:
        ImportError: No folder holds it.
    """
    for folder in folders:
        path = Path(folder) / _LIBRARY
        if path.is_file():
            return path
    raise ImportError(
        f"{_LIBRARY} is not in {' or '.join(folders)}: this is the source tree or an incomplete "
        "installation; install the package with: python -m pip install . (in the project's folder)"
    )


def load_library(path: Path) -> Any:
    """Loads the shared library.

    Raises:
        ImportError: It cannot be loaded; the message names what is missing.
    """
    try:
        return tvm_ffi.load_module(path)
    except Exception as error:
        raise ImportError(
            f"{path} cannot be loaded: {error}. A system library may be missing (ldd {path} tells "
            "which), or the library was built for another system or apache-tvm-ffi; install what "
            "is missing, or rebuild: python -m pip install --force-reinstall --no-deps ."
        ) from error


def find_function(library: Any, name: str) -> NativeFunction:
    """Returns an exported function that releases the GIL while it runs.

    Raises:
        ImportError: The library does not export it.
    """
    try:
        return NativeFunction(library.get_function(name))
    except AttributeError as error:
        raise ImportError(
            f"{_LIBRARY} has no function '{name}': it belongs to another version of clusterfusion "
            "than the Python files; reinstall: python -m pip install --force-reinstall ."
        ) from error


def _package_folders() -> list[str]:
    import clusterfusion

    return list(clusterfusion.__path__)


_library = load_library(find_library(_package_folders()))

version = find_function(_library, "version")
interrupt_at_exit(find_function(_library, "set_calls_ending"))

tokenizer_open = find_function(_library, "tokenizer_open")
tokenizer_warnings = find_function(_library, "tokenizer_warnings")
tokenizer_encode = find_function(_library, "tokenizer_encode")
tokenizer_encode_batch = find_function(_library, "tokenizer_encode_batch")
tokenizer_decode = find_function(_library, "tokenizer_decode")
tokenizer_vocab_size = find_function(_library, "tokenizer_vocab_size")
tokenizer_token_to_id = find_function(_library, "tokenizer_token_to_id")
tokenizer_id_to_token = find_function(_library, "tokenizer_id_to_token")
tokenizer_token_bytes = find_function(_library, "tokenizer_token_bytes")

hub_is_name = find_function(_library, "hub_is_name")
hub_cache = find_function(_library, "hub_cache")
hub_find = find_function(_library, "hub_find")

engine_open = find_function(_library, "engine_open")
engine_from_tensors = find_function(_library, "engine_from_tensors")
engine_config = find_function(_library, "engine_config")
engine_info = find_function(_library, "engine_info")
engine_generation_config = find_function(_library, "engine_generation_config")
engine_warnings = find_function(_library, "engine_warnings")
engine_serving_statistics = find_function(_library, "engine_serving_statistics")
engine_save_prompt_cache = find_function(_library, "engine_save_prompt_cache")
engine_load_prompt_cache = find_function(_library, "engine_load_prompt_cache")
engine_tokenizer = find_function(_library, "engine_tokenizer")
engine_start = find_function(_library, "engine_start")
engine_logits = find_function(_library, "engine_logits")
engine_score = find_function(_library, "engine_score")
engine_score_all = find_function(_library, "engine_score_all")
engine_encode_pair = find_function(_library, "engine_encode_pair")
engine_loglikelihood = find_function(_library, "engine_loglikelihood")
engine_perplexity = find_function(_library, "engine_perplexity")
engine_perplexity_of_text = find_function(_library, "engine_perplexity_of_text")
engine_measure_read_ceiling = find_function(_library, "engine_measure_read_ceiling")
engine_hidden_states = find_function(_library, "engine_hidden_states")
engine_steer = find_function(_library, "engine_steer")
engine_ablate = find_function(_library, "engine_ablate")

generation_next = find_function(_library, "generation_next")
generation_cancel = find_function(_library, "generation_cancel")
generation_results = find_function(_library, "generation_results")

feed_open = find_function(_library, "feed_open")
feed_start = find_function(_library, "feed_start")
feed_cancel = find_function(_library, "feed_cancel")
feed_take = find_function(_library, "feed_take")
feed_prompt_scores = find_function(_library, "feed_prompt_scores")

ops_attention_mlp_up = find_function(_library, "ops_attention_mlp_up")
ops_mlp_down = find_function(_library, "ops_mlp_down")
ops_decoder_layer = find_function(_library, "ops_decoder_layer")
ops_general_attention_mlp_up = find_function(_library, "ops_general_attention_mlp_up")
ops_general_decoder_layer = find_function(_library, "ops_general_decoder_layer")
ops_check_graph_context = find_function(_library, "ops_check_graph_context")
ops_as_bfloat16 = find_function(_library, "ops_as_bfloat16")
