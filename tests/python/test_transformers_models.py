"""Models that transformers has loaded: engines of their weights, and `model.generate` by us.

Beside transformers, and skipped where it is not installed.
"""

from __future__ import annotations

import copy
import gc
import pickle
import re
import warnings
import weakref
from typing import Any

import clusterfusion
import numpy as np
import pytest
from conftest import ROOT

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from clusterfusion._generate import PatchedGenerate  # noqa: E402
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM  # noqa: E402

DEMO = ROOT / "models" / "demo"
PROMPTS = ("It was a dark and stormy night", "The old gentleman", "Once")


@pytest.fixture(autouse=True)
def quiet_transformers() -> Any:
    """Only our warnings are looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r"transformers|torch")
        transformers.logging.set_verbosity_error()
        yield


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """More would wait for each other on models as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo() -> Any:
    model = GPTNeoXForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture
def patched(demo) -> Any:
    clusterfusion.patch(demo, threads=1)
    yield demo
    if "generate" in vars(demo):
        clusterfusion.unpatch(demo)


def small_model(dtype: Any = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
            "initializer_range": 0.5,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        | options
    )
    return GPTNeoXForCausalLM(config).to(dtype).eval()


def by_transformers(model: Any, *args: Any, **options: Any) -> Any:
    return type(model).generate(model, *args, **options)


def mine(model: Any, *args: Any, **options: Any) -> Any:
    """What the patched model generates, by the engine: a warning is an error here."""
    assert isinstance(model.generate, PatchedGenerate)
    return model.generate(*args, **options)


# Engines of loaded models.


def test_text_equals_that_of_the_files_and_of_transformers(demo, tokenizer):
    engine = clusterfusion.from_transformers(demo, tokenizer)
    assert engine.device == "cpu" and engine.info.kv_dtype == "float32"
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    found = engine.generate(PROMPTS[0], max_new_tokens=60)
    expected = by_transformers(demo, ids, max_new_tokens=60, do_sample=False)
    assert [*ids[0].tolist(), *found.tokens] == expected[0].tolist()
    logits = np.empty((ids.shape[1], engine.config.vocab_size), np.float32)
    engine.logits(ids[0].tolist(), out=logits)
    with torch.no_grad():
        np.testing.assert_allclose(logits, demo(ids).logits[0].numpy(), atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"use_parallel_residual": False},
        {"attention_bias": False},
        {"hidden_act": "gelu_new"},
    ],
    ids=["plain", "tied", "sequential", "no attention bias", "tanh"],
)
def test_logits_of_random_models(options, dtype):
    model = small_model(dtype, **options)
    engine = clusterfusion.from_transformers(model, threads=1)
    tokens = [5, 9, 2, 90, 41]
    logits = np.empty((len(tokens), 97), np.float32)
    engine.logits(tokens, out=logits)
    wide = copy.deepcopy(model).float()
    with torch.no_grad():
        expected = wide(torch.tensor([tokens])).logits[0].numpy()
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)
    assert engine.config.tied_embeddings == ("tie_word_embeddings" in options)
    with pytest.raises(FileNotFoundError):
        engine.encode("text")


RELATIVES = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": None, "head_dim": 12},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 20},
}


def small_relative(name: str, dtype: Any) -> Any:
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=50,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=0,
        **RELATIVES[name],
    )
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RELATIVES)
def test_llama_and_its_relatives(name, dtype):
    """Logits of the model in float32, and its greedy text."""
    model = small_relative(name, dtype)
    engine = clusterfusion.from_transformers(model, threads=1)
    assert engine.config.model_type == name.lower()
    tokens = [5, 9, 2, 90, 41]
    logits = np.empty((len(tokens), 97), np.float32)
    engine.logits(tokens, out=logits)
    with torch.no_grad():
        wide = copy.deepcopy(model).float()
        expected = wide(torch.tensor([tokens])).logits[0].numpy()
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    # .to() rounds the frequencies of the rotation as well.
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)
    if dtype != torch.float32:
        return
    ids = torch.tensor([tokens])
    expected = by_transformers(model, ids, max_new_tokens=20, do_sample=False)
    clusterfusion.patch(model, threads=1)
    assert mine(model, ids, max_new_tokens=20).tolist() == expected.tolist()


def test_weights_are_shared():
    """What is written to a matrix is seen, and the engine keeps it alive."""
    model = small_model()
    engine = clusterfusion.from_transformers(model, threads=1)

    def logits() -> np.ndarray:
        out = np.empty((2, 97), np.float32)
        engine.logits([1, 2], out=out)
        return out

    before = logits()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    assert np.array_equal(logits(), 2 * before)
    storage = weakref.ref(model.get_output_embeddings().weight)
    del model
    gc.collect()
    junk = [torch.full((97, 32), 7.0) for _ in range(50)]
    assert storage() is None and np.array_equal(logits(), 2 * before) and junk


def test_tokenizers_of_all_kinds(demo, tokenizer):
    expected = tokenizer(PROMPTS[0]).input_ids
    for given in (
        tokenizer,
        tokenizer.backend_tokenizer,
        DEMO,
        str(DEMO),
        clusterfusion.Tokenizer(DEMO),
    ):
        engine = clusterfusion.from_transformers(demo, given)
        assert engine.encode(PROMPTS[0]) == expected
    with pytest.raises(TypeError, match=r"^tokenizer: expected a fast tokenizer .*found int$"):
        clusterfusion.from_transformers(demo, 3)


def test_generation_config_is_the_models():
    model = small_model()
    model.generation_config = transformers.GenerationConfig(eos_token_id=[3, 4], max_new_tokens=5)
    engine = clusterfusion.from_transformers(model)
    assert engine.config.eos_tokens == (3, 4)
    generated = engine.generate([1], generation_config=True, ignore_eos=True)
    assert len(generated.tokens) == 5


def test_what_is_refused():
    with pytest.raises(
        TypeError, match=r"^model: expected a transformers.GPTNeoXForCausalLM, .*int"
    ):
        clusterfusion.from_transformers(3)
    with pytest.raises(TypeError, match=r"found GPTNeoXModel$"):
        clusterfusion.from_transformers(small_model().base_model)
    with pytest.raises(NotImplementedError, match=r"dtype float of 64 bits; expected F16"):
        clusterfusion.from_transformers(small_model(torch.float64))
    with pytest.raises(NotImplementedError, match=r"on 'meta'; load the model without offloading"):
        clusterfusion.from_transformers(small_model().to("meta"))
    model = small_model()
    model.lm_head_of_another = torch.nn.Linear(32, 97)
    with pytest.raises(ValueError, match=r"no place for: \"lm_head_of_another"):
        clusterfusion.from_transformers(model)
    with pytest.raises(ValueError, match=r"^device"):
        clusterfusion.from_transformers(small_model(), device="tpu")


# model.generate.


CALLS = {
    "nothing said": {},
    "max_new_tokens": {"max_new_tokens": 40},
    "max_length": {"max_length": 30},
    "min_new_tokens": {"max_new_tokens": 30, "min_new_tokens": 30},
    "min_length": {"max_length": 40, "min_length": 40},
    "repetition_penalty": {"max_new_tokens": 40, "repetition_penalty": 1.3},
    "no_repeat_ngram_size": {"max_new_tokens": 40, "no_repeat_ngram_size": 2},
    "eos": {"max_new_tokens": 40, "eos_token_id": [11, 25, 100]},
    "no eos": {"max_new_tokens": 40, "eos_token_id": None},
    "no cache": {"max_new_tokens": 10, "use_cache": False},
    "one beam": {"max_new_tokens": 10, "num_beams": 1, "num_return_sequences": 1},
    "a generation_config": {
        "generation_config": transformers.GenerationConfig(max_new_tokens=25, do_sample=False)
    },
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_greedy_texts_are_those_of_transformers(patched, tokenizer, options):
    assert patched.generation_config.do_sample, "the demo model's own word"
    if "generation_config" not in options:
        options = {"do_sample": False} | options
    for prompt in PROMPTS:
        encoded = tokenizer(prompt, return_tensors="pt")
        encoded.pop("token_type_ids", None)
        found = mine(patched, **encoded, **options)
        expected = by_transformers(patched, **encoded, **options)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
        assert torch.equal(mine(patched, encoded.input_ids, **options), expected)


def test_batches_with_padding(patched, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    encoded = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    encoded.pop("token_type_ids", None)
    for options in ({}, {"eos_token_id": [11, 25], "pad_token_id": 5}):
        options = {"do_sample": False, "max_new_tokens": 30} | options
        found = mine(patched, **encoded, **options)
        expected = by_transformers(patched, **encoded, **options)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", range(5))
def test_random_models_and_prompts(seed):
    model = small_model()
    clusterfusion.patch(model, threads=1)
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 97, (3, 9), generator=random)
    mask = torch.ones_like(ids)
    mask[1, : seed + 1] = 0
    options = {"attention_mask": mask, "max_new_tokens": 40, "pad_token_id": 96}
    assert torch.equal(mine(model, ids, **options), by_transformers(model, ids, **options))


def test_sampling_follows_torchs_seed(patched, tokenizer):
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids.repeat(3, 1)

    def sample(seed: int) -> Any:
        torch.manual_seed(seed)
        return mine(patched, ids, do_sample=True, max_new_tokens=20, temperature=0.8, top_p=0.9)

    one = sample(1)
    assert torch.equal(sample(1), one) and not torch.equal(sample(2), one)
    assert len({tuple(row) for row in one.tolist()}) == 3
    torch.manual_seed(1)
    likeliest = mine(patched, ids[:1], do_sample=True, max_new_tokens=20, top_k=1)
    expected = by_transformers(patched, ids[:1], max_new_tokens=20, do_sample=False)
    assert torch.equal(likeliest, expected)


class Listener:
    def put(self, value: Any) -> None: ...
    def end(self) -> None: ...


UNKNOWN = {
    "beams": ({"num_beams": 2}, "num_beams is not known"),
    "more texts": ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences is"),
    "a streamer": ({"streamer": Listener()}, "streamer is not known"),
    "scores": ({"return_dict_in_generate": True}, "return_dict_in_generate is not known"),
    "bad words": ({"bad_words_ids": [[5]]}, "bad_words_ids is not known"),
    "position_ids": ({"position_ids": torch.arange(3)[None]}, "position_ids is not known"),
    "typical_p": ({"typical_p": 0.5, "do_sample": True}, "typical_p is not known"),
    "a hole": ({"attention_mask": torch.tensor([[1, 0, 1]])}, "more than padding on the left"),
    "too long": ({"max_new_tokens": 70}, "beyond 64 positions"),
}


@pytest.mark.parametrize(("options", "reason"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_known_is_transformers(options, reason):
    model = small_model()
    clusterfusion.patch(model, threads=1)
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 5, "pad_token_id": 0} | options
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=rf"transformers generates this text: .*{reason}"):
        found = model.generate(ids, **options)
    torch.manual_seed(3)
    expected = by_transformers(model, ids, **options)
    found, expected = (getattr(ids, "sequences", ids) for ids in (found, expected))
    assert torch.equal(found, expected)
    model.generate(ids, **options)  # the second time it says nothing


def test_errors_are_those_of_transformers():
    model = small_model()
    clusterfusion.patch(model, threads=1)
    with (
        pytest.warns(UserWarning, match="no room for a new token"),
        pytest.raises(ValueError, match="max_new_tokens"),
    ):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=0)


def test_a_model_in_training_or_with_hooks_is_not_ours():
    model = small_model()
    clusterfusion.patch(model, threads=1)
    ids = torch.tensor([[5, 6, 7]])
    before = mine(model, ids, max_new_tokens=9)
    model.train()
    with pytest.warns(UserWarning, match="training mode"):
        model.generate(ids, max_new_tokens=9)
    model.eval()
    layer = model.gpt_neox.layers[0]
    hook = layer.mlp.register_forward_hook(lambda module, given, output: output * 0)
    with pytest.warns(UserWarning, match=r"hooks on gpt_neox\.layers\.0\.mlp"):
        assert not torch.equal(model.generate(ids, max_new_tokens=9), before)
    hook.remove()
    assert torch.equal(mine(model, ids, max_new_tokens=9), before)


def test_changed_weights_are_noticed():
    model = small_model()
    clusterfusion.patch(model, threads=1)
    ids = torch.tensor([[5, 6, 7]])
    first = mine(model, ids)
    with torch.no_grad():
        model.gpt_neox.layers[0].mlp.dense_4h_to_h.bias.add_(300 * (torch.arange(32) % 5))
    changed = mine(model, ids)
    assert torch.equal(changed, by_transformers(model, ids)) and not torch.equal(changed, first)
    model.load_state_dict(small_model().state_dict())
    assert torch.equal(mine(model, ids), first)
    model.half()
    assert mine(model, ids).shape == first.shape


def test_copies_have_engines_of_their_own():
    model = small_model()
    clusterfusion.patch(model, threads=1)
    ids = torch.tensor([[5, 6, 7]])
    expected = mine(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(mine(other, ids), expected)
        assert other.generate._model is other


def test_unpatch():
    model = small_model()
    clusterfusion.patch(model, threads=1)
    with pytest.raises(ValueError, match="that is not patched, found one that is"):
        clusterfusion.patch(model)
    mine(model, torch.tensor([[5]]))
    engine = weakref.ref(model.generate._engine)
    clusterfusion.unpatch(model)
    gc.collect()
    assert engine() is None
    assert "generate" not in vars(model)
    with pytest.raises(ValueError, match=r"clusterfusion.patch\(\) patched"):
        clusterfusion.unpatch(model)
    with pytest.raises(TypeError, match=r"unknown option 'thread'"):
        clusterfusion.patch(model, thread=1)
    with pytest.raises(TypeError, match=r"expected a transformers\.GPTNeoXForCausalLM"):
        clusterfusion.patch(torch.nn.Linear(1, 1))


def test_the_code_of_the_documentation(demo, tokenizer, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(code, {})
    ids = tokenizer("It was a dark", return_tensors="pt").input_ids
    expected = by_transformers(demo, ids, max_new_tokens=20, do_sample=False)
    lines = capsys.readouterr().out
    assert lines.startswith(tokenizer.decode(expected[0, ids.shape[1] :]))
    assert "It was a dark" in lines
