"""The demo model on a GPU against the CPU backend and transformers in float32.

The GPU rounds activations to float16 as they enter a product. A logit is then known about as well
as float16 can write it, and where the two likeliest are closer than two neighbouring float16
numbers of their size, either may win. Such places are counted and their margins shown; everywhere
else the texts must be the same.
"""

import lzma
from dataclasses import dataclass

import numpy as np
import pytest
from clusterfusion import Engine
from philox import gumbel_noise, philox4x32_10
from recordings import DemoRecord, load_demo
from reference_model import relative_error

BATCH = 50
SEEDS = 1000
SAMPLED_TOKENS = 24


@pytest.fixture(scope="module")
def recording() -> DemoRecord:
    return load_demo()


@pytest.fixture(scope="module")
def engine(demo_model, gpu) -> Engine:
    return Engine(demo_model, device=gpu)


@pytest.fixture(scope="module")
def cpu_engine(demo_model) -> Engine:
    return Engine(demo_model, device="cpu")


@dataclass(frozen=True)
class Difference:
    """Where two texts part."""

    text: int
    place: int  # of the first different token
    margin: float  # by how much float32 prefers the token of the CPU
    resolution: float  # of float16 at the size of the larger logit

    def __str__(self) -> str:
        return (
            f"text {self.text}, token {self.place}: margin {self.margin:.2e}, "
            f"float16 resolves {self.resolution:.2e}"
        )


def resolution_of(logit: float) -> float:
    """The distance of neighbouring float16 numbers of this size."""
    return float(np.spacing(np.float16(abs(logit))))


def first_difference(tokens: list[int], expected: list[int]) -> int | None:
    pairs = enumerate(zip(tokens, expected, strict=True))
    return next((place for place, (a, b) in pairs if a != b), None)


def generate(engine: Engine, prompts: list[list[int]], **options) -> list[list[int]]:
    """New tokens of each prompt, computed in batches; a list of seeds is split along."""
    seeds = options.pop("seed", [0] * len(prompts))
    return [
        result.tokens
        for start in range(0, len(prompts), BATCH)
        for result in engine.generate(
            prompts[start : start + BATCH],
            seed=seeds[start : start + BATCH],
            ignore_eos=True,
            **options,
        )
    ]


def report(what: str, differences: list[Difference], count: int) -> None:
    print(f"{what}: {count - len(differences)} of {count} texts identical")
    for difference in sorted(differences, key=lambda d: -d.margin / d.resolution):
        print(f"  {difference}")


def test_greedy_texts(recording, engine, cpu_engine):
    """200 prompts x 64 tokens."""
    expected = recording.tokens.tolist()
    assert generate(cpu_engine, recording.prompts, max_new_tokens=64) == expected
    found = generate(engine, recording.prompts, max_new_tokens=64)
    differences = []
    for number, (prompt, tokens) in enumerate(zip(recording.prompts, found, strict=True)):
        place = first_difference(tokens, expected[number])
        if place is None:
            continue
        logits = cpu_engine.logits(prompt + expected[number][:place])[-1]
        best, other = logits[expected[number][place]], logits[tokens[place]]
        differences.append(Difference(number, place, best - other, resolution_of(best)))
    report("greedy", differences, len(found))
    assert [d for d in differences if d.margin >= d.resolution] == []


def test_every_greedy_choice(recording, engine, cpu_engine):
    """At all 12,800 places, also behind those where a text may part: the same likeliest token."""
    wrong, errors, places = [], [], 0
    for number, prompt in enumerate(recording.prompts):
        text = prompt + recording.tokens[number].tolist()
        expected = cpu_engine.logits(text)[len(prompt) - 1 : -1]
        found = engine.logits(text)[len(prompt) - 1 : -1]
        errors.append(relative_error(found, expected))
        for place in np.flatnonzero(found.argmax(-1) != recording.tokens[number]):
            best = expected[place].max()
            margin = best - expected[place, found[place].argmax()]
            wrong.append(Difference(number, int(place), margin, resolution_of(best)))
        places += len(expected)
    print(f"relative error of the logits: median {np.median(errors):.2e}, most {max(errors):.2e}")
    print(
        f"{len(wrong)} of {places} choices differ, at margins of at most",
        max((d.margin for d in wrong), default=0.0),
    )
    assert places == recording.tokens.size
    assert [d for d in wrong if d.margin >= d.resolution] == []
    assert max(errors) < 2e-3


def test_float32_kv_cache(recording, demo_model, gpu, engine, cpu_engine, tmp_path):
    """Its logits are the CPU's, and saved prompts give the same text in another such engine."""
    wide = Engine(demo_model, device=gpu, kv_dtype="float32")
    assert wide.info.kv_dtype == "float32"
    ratio = 1 if engine.info.kv_dtype == "float32" else 2
    assert wide.info.kv_bytes_per_position == ratio * engine.info.kv_bytes_per_position
    text = recording.prompts[0] + recording.tokens[0].tolist()
    assert relative_error(wide.logits(text), cpu_engine.logits(text)) < 2e-3
    prompt = (text * 3)[:130]
    expected = wide.generate(prompt, max_new_tokens=20, ignore_eos=True).tokens
    wide.save_prompt_cache(prompt, tmp_path / "prompt.cache")
    again = Engine(demo_model, device=gpu, kv_dtype="float32")
    assert again.load_prompt_cache(tmp_path / "prompt.cache", prompt) == 128
    assert again.generate(prompt, max_new_tokens=20, ignore_eos=True).tokens == expected


def test_perplexities(recording, engine, cpu_engine):
    """Of the recorded texts: within 0.05 % of the CPU backend, and near transformers'."""
    for tokens, expected in zip(recording.perplexity_tokens, recording.perplexities, strict=True):
        window = {"context": expected["context"], "stride": expected["stride"]}
        cpu = cpu_engine.perplexity(tokens, **window)
        found = engine.perplexity(tokens, **window)
        print(
            f"{expected['text']}, window {window}: {found.perplexity:.5f}, CPU "
            f"{cpu.perplexity:.5f}, transformers {expected['perplexity']:.5f}: "
            f"{found.perplexity / cpu.perplexity - 1:+.1e}"
        )
        assert found.scored_tokens == cpu.scored_tokens
        assert found.perplexity == pytest.approx(cpu.perplexity, rel=5e-4)
        assert found.perplexity == pytest.approx(expected["perplexity"], rel=1e-3)


@pytest.mark.parametrize("name", ["novels-valid.txt.xz", "wikitext-2-valid.txt"])
def test_perplexity_of_whole_texts(name, engine, cpu_engine, shared_data):
    data = (shared_data / name).read_bytes()
    text = lzma.decompress(data) if name.endswith(".xz") else data[:200_000]
    text = text.decode(errors="ignore")
    window = {"context": 1024, "stride": 1024}
    cpu = cpu_engine.perplexity(text, **window)
    found = engine.perplexity(text, **window)
    print(
        f"{name}, {found.scored_tokens} tokens: {found.perplexity:.5f}, CPU {cpu.perplexity:.5f}: "
        f"{found.perplexity / cpu.perplexity - 1:+.1e}"
    )
    assert found.perplexity == pytest.approx(cpu.perplexity, rel=5e-4)


def test_noise_in_numpy():
    """The known answer that Random123 publishes for philox4x32-10."""
    words = philox4x32_10(
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0)
    )
    assert [int(word) for word in words] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def noisy_scores(engine: Engine, text: list[int], seed: int, temperature: float) -> np.ndarray:
    """What sampling takes the largest of, from the CPU's logits; in units of logits."""
    logits = engine.logits(text)[-1]
    scores = (logits - logits.max()) / np.float32(temperature)
    return (scores + gumbel_noise(seed, len(text), len(logits))) * temperature


def test_sampled_texts(recording, engine, cpu_engine):
    """The same seed gives the same text, but where noisy logits tie as greedy ones may."""
    temperature, seeds = 0.9, [7919 * i + (i << 40) for i in range(SEEDS)]
    prompts = [recording.prompts[i % len(recording.prompts)] for i in range(SEEDS)]
    options = {"max_new_tokens": SAMPLED_TOKENS, "temperature": temperature, "seed": seeds}
    expected = generate(cpu_engine, prompts, **options)
    found = generate(engine, prompts, **options)
    differences = []
    for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        place = first_difference(found[number], expected[number])
        if place is None and number % 100 > 0:
            continue
        at = place or 0
        text = prompt + expected[number][:at]
        scores = noisy_scores(cpu_engine, text, seed, temperature)
        # The scores of this test are those of the sampler.
        assert scores.argmax() == expected[number][at]
        if place is not None:
            margin = scores.max() - scores[found[number][place]]
            largest = np.abs(cpu_engine.logits(text)[-1]).max()
            differences.append(Difference(number, place, margin, resolution_of(largest)))
    report("temperature 0.9", differences, SEEDS)
    assert [d for d in differences if d.margin >= d.resolution] == []


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 40},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"top_k": 50, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2},
    ],
    ids=lambda filters: "+".join(filters),
)
def test_filtered_texts(recording, engine, cpu_engine, filters):
    """Most texts are the same; which ones part depends on the last bits of the logits.

    That the choice itself is the Sampler's is tested to the last token in tests/gpu.
    """
    prompts, count = recording.prompts, len(recording.prompts)
    options = {"max_new_tokens": SAMPLED_TOKENS, "temperature": 0.8, "seed": list(range(count))}
    expected = generate(cpu_engine, prompts, **options, **filters)
    found = generate(engine, prompts, **options, **filters)
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    print(f"{filters}: {same} of {count} texts identical")
    assert same >= 0.8 * count


def test_unused_memory_never_shows(demo_model, gpu, recording, engine, monkeypatch):
    """With NaN in all device memory that nobody wrote, every bit is the same."""

    def results(engine: Engine) -> list:
        prompts = recording.prompts[:40]
        sampled = {"temperature": 0.8, "top_p": 0.95, "seed": list(range(40))}
        texts = [
            generate(engine, prompts, max_new_tokens=80),
            generate(engine, prompts, max_new_tokens=80, **sampled),
        ]
        logits = [engine.logits(recording.perplexity_tokens[0][:n]) for n in (1, 63, 64, 65, 300)]
        return [texts, [array.tobytes() for array in logits]]

    monkeypatch.setenv("CLUSTERFUSION_POISON", "1")
    poisoned = results(Engine(demo_model, device=gpu))
    monkeypatch.delenv("CLUSTERFUSION_POISON")
    assert poisoned == results(engine)
