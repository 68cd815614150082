"""Hidden states, steering and ablation against the float64 oracle, and beside transformers."""

from __future__ import annotations

import threading
from pathlib import Path

import clusterfusion
import numpy as np
import pytest
from checkpoints import write_random_checkpoint
from reference_model import ReferenceModel, relative_error

ERROR_BOUND = 1e-6  # of float32 activations, whatever the checkpoint's type
TOKENS = [5, 17, 0, 255, 33, 33, 91, 4, 120, 7, 64]
SETTINGS = {
    "parallel": {},
    "sequential": {"parallel_residual": False, "seed": 3},
    "no attention bias": {"attention_bias": False, "seed": 4},
    "bfloat16": {"dtype": "bfloat16", "seed": 5},
    "awkward": {"hidden_size": 51, "num_heads": 3, "num_layers": 4, "rotary_pct": 0.5, "seed": 6},
}


class HookedReference(ReferenceModel):
    """The oracle, with its activations written down by TransformerLens' names, and changed."""

    def __init__(self, folder: Path, steering=None, ablated_heads=None, ablated_mlps=()):
        super().__init__(folder)
        self.steering, self.ablated_heads = steering or {}, ablated_heads or {}
        self.ablated_mlps = ablated_mlps
        self.seen: dict[str, np.ndarray] = {}

    def heads(self, x, name):
        heads = super().heads(x, name)
        for head in self.ablated_heads.get(int(name.split(".")[1]), []):
            heads[:, head * self.head_dim : (head + 1) * self.head_dim] = 0
        return heads

    def attention(self, x, name):
        out = self.seen[f"blocks.{name.split('.')[1]}.hook_attn_out"] = super().attention(x, name)
        return out

    def mlp(self, x, name):
        layer = int(name.split(".")[1])
        out = super().mlp(x, name) * (layer not in self.ablated_mlps)
        self.seen[f"blocks.{layer}.hook_mlp_out"] = out
        return out

    def layer(self, x, name):
        layer = int(name.split(".")[1])
        steering = np.asarray(self.steering.get(layer, 0.0), np.float64)
        if steering.ndim == 2:
            padded = np.zeros_like(x)
            rows = min(len(x), len(steering))
            padded[:rows] = steering[:rows]
            steering = padded
        x = x + steering
        self.seen[f"blocks.{layer}.hook_resid_pre"] = x
        after = self.seen[f"blocks.{layer}.hook_resid_post"] = super().layer(x, name)
        return after

    def layer_norm(self, x, name):
        normed = super().layer_norm(x, name)
        if name == "final_layer_norm":
            self.seen["ln_final.hook_normalized"] = normed
        return normed


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def checkpoint(request, tmp_path) -> Path:
    return write_random_checkpoint(tmp_path, **request.param)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> clusterfusion.Engine:
    return clusterfusion.Engine(
        write_random_checkpoint(tmp_path_factory.mktemp("checkpoint")), device="cpu"
    )


def steering_of(engine: clusterfusion.Engine, size: float = 1.0) -> dict[int, np.ndarray]:
    """A vector for one layer, and positions for another."""
    random = np.random.default_rng(1)
    hidden = engine.config.hidden_size
    return {
        1: random.normal(size=hidden).astype(np.float32) * np.float32(size),
        0: random.normal(size=(6, hidden)).astype(np.float32) * np.float32(size),
    }


def test_activations_equal_the_oracle(checkpoint):
    oracle = HookedReference(checkpoint)
    oracle.logits(TOKENS)
    engine = clusterfusion.Engine(checkpoint, device="cpu")
    found = engine.hidden_states(TOKENS, at=list(oracle.seen))
    assert list(found) == list(oracle.seen)
    for name, values in found.items():
        assert values.dtype == np.float32
        assert values.shape == (len(TOKENS), engine.config.hidden_size)
        assert relative_error(values, oracle.seen[name]) <= ERROR_BOUND, name


def test_interventions_equal_the_oracle(checkpoint):
    engine = clusterfusion.Engine(checkpoint, device="cpu")
    plain = engine.logits(TOKENS)
    steering = steering_of(engine)
    heads, mlps = {0: [1], 1: [0, 2]}, [1]
    oracle = HookedReference(
        checkpoint, {layer: 2 * v.astype(np.float64) for layer, v in steering.items()}, heads, mlps
    )
    exact = oracle.logits(TOKENS)
    engine.steer(steering, 2.0)
    engine.ablate(heads, mlps)
    assert relative_error(engine.logits(TOKENS), exact) <= 3 * ERROR_BOUND
    assert relative_error(plain, exact) > 0.01
    for name, values in engine.hidden_states(TOKENS, at=list(oracle.seen)).items():
        if not oracle.seen[name].any():
            assert name == "blocks.1.hook_mlp_out"
            assert not values.any()
            continue
        assert relative_error(values, oracle.seen[name]) <= 3 * ERROR_BOUND, name
    # Token by token as well.
    steered = engine.generate(TOKENS[:4], max_new_tokens=6, ignore_eos=True).tokens
    assert steered == oracle.greedy(TOKENS[:4], 6)[0]
    engine.steer(None)
    engine.ablate()
    assert np.array_equal(engine.logits(TOKENS), plain)


def test_names_of_transformers_are_those_of_transformer_lens(engine):
    layers = engine.config.num_layers
    found = engine.hidden_states(TOKENS)
    assert list(found) == [f"hidden_states[{i}]" for i in range(layers + 1)]
    pairs = {
        "blocks.1.hook_resid_pre": "hidden_states[1]",
        "blocks.0.hook_resid_post": "hidden_states[1]",
        "gpt_neox.layers.0": "hidden_states[1]",
        "ln_final.hook_normalized": f"hidden_states[{layers}]",
        "gpt_neox.final_layer_norm": "hidden_states[-1]",
        "blocks.1.hook_attn_out": "gpt_neox.layers.1.attention",
        "blocks.1.hook_mlp_out": "gpt_neox.layers.1.mlp",
    }
    found = engine.hidden_states(TOKENS, at=[*pairs, *pairs.values()])
    for name, other in pairs.items():
        assert np.array_equal(found[name], found[other])


def test_layers_stand_for_a_star(engine):
    assert list(engine.hidden_states(TOKENS, layers=[1, 0], at="hook_attn_out")) == [
        "blocks.1.hook_attn_out",
        "blocks.0.hook_attn_out",
    ]
    assert list(engine.hidden_states([1], layers=range(1), at=("gpt_neox.layers.*.mlp",))) == [
        "gpt_neox.layers.0.mlp"
    ]


def test_arrays_outlive_the_engine_and_speak_dlpack(tmp_path):
    folder = write_random_checkpoint(tmp_path)
    with clusterfusion.Engine(folder, device="cpu") as engine:
        values = engine.hidden_states(TOKENS)["hidden_states[0]"]
    exact = ReferenceModel(folder).weights["embed_in.weight"][TOKENS]
    assert np.array_equal(values, exact.astype(np.float32))
    assert np.array_equal(np.from_dlpack(values), values)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"at": "blocks.0.hook_q"}, ValueError, r"no activation is called 'blocks\.0\.hook_q'.*"),
        ({"at": "blocks.99.hook_mlp_out"}, IndexError, "names layer 99"),
        ({"at": "hook_mlp_out", "layers": [99]}, IndexError, "layers: 99"),
        ({"at": "gpt_neox.final_layer_norm", "layers": [0]}, ValueError, "no name has a"),
        ({"at": []}, ValueError, "at least one name"),
        ({"at": 5}, TypeError, "at: expected a name"),
        ({"at": [5]}, TypeError, "at: expected a name"),
        ({"layers": "12"}, TypeError, "layers: expected a list of integers"),
        ({"layers": [1.5]}, TypeError, r"layers\[0\]: expected an integer"),
        ({"prompt": []}, ValueError, "at least 1 token"),
        ({"prompt": [1, 10**6]}, IndexError, r"tokens\[1\]"),
    ],
)
def test_hidden_states_refuse(engine, arguments, error, message):
    with pytest.raises(error, match=message):
        engine.hidden_states(**{"prompt": TOKENS, **arguments})


def test_a_with_block_puts_back_what_held_before(engine):
    plain = engine.logits(TOKENS)
    first, second = steering_of(engine), {0: np.ones(engine.config.hidden_size)}
    engine.steer(first)
    outside = engine.logits(TOKENS)
    with engine.steer(second, 3.0), engine.ablate(mlps=[0]):
        inside = engine.logits(TOKENS)
    assert not np.array_equal(inside, outside)
    assert np.array_equal(engine.logits(TOKENS), outside)
    with pytest.raises(RuntimeError, match="on purpose"), engine.steer(None):
        assert np.array_equal(engine.logits(TOKENS), plain)
        raise RuntimeError("on purpose")
    assert np.array_equal(engine.logits(TOKENS), outside)
    engine.steer(None)
    assert np.array_equal(engine.logits(TOKENS), plain)


def test_positions_behind_the_array_stay_as_they_are(engine):
    plain = engine.hidden_states(TOKENS, [0], "hook_resid_pre")["blocks.0.hook_resid_pre"]
    rows = np.arange(4 * engine.config.hidden_size, dtype=np.float32).reshape(4, -1)
    with engine.steer({0: rows}, -0.5):
        found = engine.hidden_states(TOKENS, [0], "hook_resid_pre")["blocks.0.hook_resid_pre"]
    assert np.array_equal(found[:4], plain[:4] - 0.5 * rows)
    assert np.array_equal(found[4:], plain[4:])


def test_a_running_text_ends_as_it_began(engine):
    options = {"max_new_tokens": 20, "ignore_eos": True}
    expected = engine.generate(TOKENS, **options).tokens
    stream = engine.stream(TOKENS, **options)
    next(stream)
    with engine.steer(steering_of(engine, 5.0)):
        assert engine.generate(TOKENS, **options).tokens != expected
        for _ in stream:
            pass
    assert stream.results[0].tokens == expected


def test_steering_from_several_threads(engine):
    """Each request is steered as one of those that were asked for, never by a mixture."""
    vectors = [None, steering_of(engine), {1: np.ones(engine.config.hidden_size)}]
    allowed = []
    for vector in vectors:
        with engine.steer(vector):
            allowed.append(engine.logits(TOKENS).tobytes())
    stop = threading.Event()

    def keep_steering() -> None:
        while not stop.is_set():
            for vector in vectors:
                engine.steer(vector)

    thread = threading.Thread(target=keep_steering)
    thread.start()
    found = {engine.logits(TOKENS).tobytes() for _ in range(50)}
    stop.set()
    thread.join()
    engine.steer(None)
    assert found <= set(allowed)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({9: [0.0] * 64},), IndexError, "layer 9 is none"),
        (({0: [0.0] * 63},), ValueError, r"vectors\[0\]: expected shape \[64\].*found \[63\]"),
        (({0: np.zeros((2, 3, 64))},), ValueError, r"found \[2, 3, 64\]"),
        (({0: np.zeros((0, 64))},), ValueError, r"found \[0, 64\]"),
        (({0: [float("nan")] * 64},), ArithmeticError, "element 0 is nan"),
        (({0: [1e30] * 64}, 1e30), ArithmeticError, "times the scale"),
        (({0: [1.0] * 64}, float("inf")), ArithmeticError, "scale is inf"),
        (({0: ["a"] * 64},), TypeError, r"vectors\[0\]: expected numbers"),
        (([1.0] * 64,), TypeError, "vectors: expected a dict"),
        (({"0": [1.0] * 64},), TypeError, "vectors: expected an integer"),
        (({0: [1.0] * 64}, "big"), TypeError, "scale"),
    ],
)
def test_steer_refuses(engine, arguments, error, message):
    assert engine.config.hidden_size == 64
    plain = engine.logits(TOKENS)
    with pytest.raises(error, match=message):
        engine.steer(*arguments)
    assert np.array_equal(engine.logits(TOKENS), plain)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({9: [0]},), IndexError, "layer 9"),
        (({0: [4]},), IndexError, "has no head 4"),
        (({0: [1, 1]},), ValueError, "named twice"),
        ((None, [9]), IndexError, "layer 9"),
        ((None, [0, 0]), ValueError, "named twice"),
        (([0],), TypeError, "heads: expected a dict"),
        (({0: 1},), TypeError, r"heads\[0\]: expected a list"),
        ((None, 1), TypeError, "mlps: expected a list"),
    ],
)
def test_ablate_refuses(engine, arguments, error, message):
    assert engine.config.num_heads == 4
    with pytest.raises(error, match=message):
        engine.ablate(*arguments)


def test_torch_tensors_steer(engine):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    vector = steering_of(engine)[1]
    with engine.steer({1: vector}):
        expected = engine.logits(TOKENS)
    for tensor in (torch.tensor(vector), torch.nn.Parameter(torch.tensor(vector))):
        with engine.steer({1: tensor}):
            assert np.array_equal(engine.logits(TOKENS), expected)
    with engine.steer({1: torch.tensor(vector).bfloat16()}):
        assert not np.array_equal(engine.logits(TOKENS), expected)
    states = engine.hidden_states(TOKENS)["hidden_states[0]"]
    assert np.array_equal(torch.from_dlpack(states).numpy(), states)


def transformers_activations(model, tokens: list[int], interventions: dict) -> dict:
    """By the modules' names and as the tuple of hidden states; with hooks that change the way."""
    torch = pytest.importorskip("torch")
    seen = {}

    def keep(name):
        def hook(module, arguments, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output)[0]

        return hook

    def add(vector):
        def hook(module, arguments):
            return (arguments[0] + torch.tensor(vector), *arguments[1:])

        return hook

    handles = []
    for name, module in model.named_modules():
        if name.endswith((".attention", ".mlp", "final_layer_norm")):
            handles.append(module.register_forward_hook(keep(name)))
    for layer, vector in interventions.items():
        handles.append(model.gpt_neox.layers[layer].register_forward_pre_hook(add(vector)))
    with torch.no_grad():
        output = model(torch.tensor([tokens]), output_hidden_states=True)
    for handle in handles:
        handle.remove()
    for index, state in enumerate(output.hidden_states):
        seen[f"hidden_states[{index}]"] = state[0]
    return {name: values.float().numpy() for name, values in seen.items()}


@pytest.mark.parametrize("name", ["parallel", "sequential", "no attention bias"])
def test_beside_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    folder = write_random_checkpoint(tmp_path, **SETTINGS[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = clusterfusion.Engine(folder, device="cpu")
    expected = transformers_activations(model, TOKENS, {})
    found = engine.hidden_states(TOKENS, at=list(expected))
    for key, values in expected.items():
        assert relative_error(found[key], values) <= 3 * ERROR_BOUND, key
    vector = steering_of(engine)[1]
    expected = transformers_activations(model, TOKENS, {1: vector})
    with engine.steer({1: vector}):
        found = engine.hidden_states(TOKENS, at=list(expected))
    # transformers may note a layer's input before the hook has changed it.
    expected.pop("hidden_states[1]")
    for key in expected:
        assert relative_error(found[key], expected[key]) <= 3 * ERROR_BOUND, key


def test_on_a_gpu(gpu, demo_model):
    """Activations stay there, and torch takes them without a copy; steering is the CPU's."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    on_cpu = clusterfusion.Engine(demo_model, device="cpu")
    on_gpu = clusterfusion.Engine(demo_model, device=gpu)
    states = on_cpu.hidden_states(TOKENS)
    for name, values in on_gpu.hidden_states(TOKENS).items():
        tensor = torch.from_dlpack(values)
        assert tensor.device.type == on_gpu.device
        assert tensor.shape == states[name].shape
        assert relative_error(tensor.cpu().numpy(), states[name]) <= 5e-3, name
    vectors = {2: states["hidden_states[2]"][3], 0: states["hidden_states[1]"][:5]}
    for engine in (on_cpu, on_gpu):
        engine.steer(vectors, 2.0)
        engine.ablate({1: [0, 2]}, [5])
    exact, found = on_cpu.logits(TOKENS), on_gpu.logits(TOKENS)
    assert relative_error(found, exact) <= 5e-3
    # What torch has there steers as well.
    on_gpu.steer({2: torch.from_dlpack(on_gpu.hidden_states(TOKENS)["hidden_states[2]"])})
