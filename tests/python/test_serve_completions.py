"""The server's texts and log-probabilities are those of the engine alone, whoever asks."""

import asyncio
import json
import random
import shutil
import subprocess
from pathlib import Path

import clusterfusion
import pytest

openai = pytest.importorskip("openai", reason="openai is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from checkpoints import write_random_checkpoint  # noqa: E402
from serving import Served, events_of, serving, wait_for  # noqa: E402
from tokenizer_kinds import BYTES, llama2, with_awkward_tokens  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

PROMPT = "It was a cold evening in November, and the old house"
TEXTS = ["It was", "Good morning, dear Miss Benson", "  \n", "naïve — “quoted” 北京 🙂", "A" * 300]


@pytest.fixture(scope="module")
def served(demo_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    with serving(demo_model, folder, "--served-model-name", "demo") as server:
        yield server


@pytest.fixture(scope="module")
def engine(demo_model) -> clusterfusion.Engine:
    return clusterfusion.Engine(demo_model)


@pytest.fixture(scope="module")
def client(served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)


def test_openai_client(client, engine):
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=40, temperature=0.8, top_p=0.95, seed=3, n=2
    )
    alone = engine.generate(PROMPT, max_new_tokens=40, temperature=0.8, top_p=0.95, seed=3, n=2)
    assert [choice.text for choice in answer.choices] == [one.text for one in alone]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert {choice.finish_reason for choice in answer.choices} <= {"stop", "length"}
    assert answer.usage.prompt_tokens == len(alone[0].prompt_tokens)
    assert answer.usage.completion_tokens == sum(len(one.tokens) for one in alone)
    assert answer.object == "text_completion" and answer.model == "demo"


def test_openai_client_streams(client, engine):
    alone = engine.generate(PROMPT, max_new_tokens=60, temperature=0.7, seed=5)
    stream = client.completions.create(
        model="demo",
        prompt=PROMPT,
        max_tokens=60,
        temperature=0.7,
        seed=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    *chunks, last = chunks
    assert "".join(chunk.choices[0].text for chunk in chunks) == alone.text
    assert len(chunks) == len(alone.tokens)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.choices == []
    assert last.usage.completion_tokens == len(alone.tokens)
    assert len({chunk.id for chunk in chunks}) == 1


def test_openai_client_async(served, engine):
    """Several at once, streamed and whole: each as if it were alone."""

    async def one(client, prompt: str, seed: int) -> str:
        options = {"model": "demo", "prompt": prompt, "max_tokens": 30, "seed": seed}
        if seed % 2:
            answer = await client.completions.create(**options)
            return answer.choices[0].text
        stream = await client.completions.create(**options, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none") as client:
            return await asyncio.gather(
                *(one(client, prompt, seed) for prompt in TEXTS for seed in range(4))
            )

    texts = asyncio.run(all_of_them())
    alone = [
        engine.generate(prompt, max_new_tokens=30, temperature=1.0, seed=seed).text
        for prompt in TEXTS
        for seed in range(4)
    ]
    assert texts == alone


def random_body(rng: random.Random) -> tuple[dict, dict]:
    """A request, and what an engine is asked for the same."""
    body: dict = {"max_tokens": rng.randrange(0, 40), "seed": rng.randrange(-(2**63), 2**64)}
    same: dict = {"max_new_tokens": body["max_tokens"], "seed": body["seed"] % 2**64}
    body["temperature"] = same["temperature"] = rng.choice([0, 0.7, 1.0, 1.5])
    chosen = {
        "top_p": ("top_p", 0.9),
        "top_k": ("top_k", rng.choice([1, 20])),
        "min_p": ("min_p", 0.05),
        "repetition_penalty": ("repetition_penalty", 1.3),
        "presence_penalty": ("presence_penalty", 1.1),
        "frequency_penalty": ("frequency_penalty", -0.4),
        "min_tokens": ("min_new_tokens", min(3, body["max_tokens"])),
        "ignore_eos": ("ignore_eos", True),
        "stop": ("stop", rng.choice([".", ["the", ","], ["\n\n", "said Miss"]])),
        "stop_token_ids": ("stop_tokens", [rng.randrange(4096) for _ in range(20)]),
        "skip_special_tokens": ("skip_special_tokens", False),
        "logprobs": ("logprobs", rng.randrange(0, 4)),
    }
    for name in rng.sample(sorted(chosen), rng.randrange(0, 6)):
        option, value = chosen[name]
        body[name], same[option] = value, value
    if rng.random() < 0.3:
        biases = {rng.randrange(4096): rng.uniform(-100, 100) for _ in range(30)}
        body["logit_bias"] = {str(token): bias for token, bias in biases.items()}
        same["logit_bias"] = biases
    return body, same


@pytest.mark.parametrize("seed", range(12))
def test_any_options(served, engine, seed):
    """Whole and as a stream, with each kind of prompt."""
    rng = random.Random(seed)
    body, same = random_body(rng)
    ids = [rng.randrange(4096) for _ in range(rng.randrange(1, 30))]
    prompt = rng.choice([PROMPT, ids, TEXTS, [ids, ids[:1]], [PROMPT]])
    n = rng.randrange(1, 4)
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    alone = [engine.generate(one, n=n, **same) for one in (prompt if several else [prompt])]
    flat = [text for texts in alone for text in texts]
    whole = served.complete(prompt=prompt, n=n, return_token_ids=True, **body)
    assert [choice["text"] for choice in whole["choices"]] == [one.text for one in flat]
    assert [choice["token_ids"] for choice in whole["choices"]] == [one.tokens for one in flat]
    reasons = {"stop_token": "stop", "stop_string": "stop"}
    assert [choice["finish_reason"] for choice in whole["choices"]] == [
        reasons.get(one.finish_reason, "length") for one in flat
    ]
    streamed = served.client.post(
        "/v1/completions", json={"prompt": prompt, "n": n, "stream": True, **body}
    )
    texts = [""] * len(flat)
    for event in events_of(streamed.text):
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [one.text for one in flat]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [PROMPT, TEXTS[3], [17, 300, 5, 900, 4000], [9]])
@pytest.mark.parametrize(("max_tokens", "logprobs"), [(0, 1), (5, 0), (7, 3)])
def test_echo_with_logprobs(served, engine, prompt, max_tokens, logprobs, stream):
    """One entry for each token of the prompt, null for the first, and then the new ones."""
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "echo": True,
        "temperature": 0,
    }
    alone = engine.generate(
        prompt, max_new_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=logprobs
    )
    if stream:
        answer = served.client.post("/v1/completions", json={**body, "stream": True})
        events = [event["choices"][0] for event in events_of(answer.text)]
        choice = {"text": "".join(event["text"] for event in events), "logprobs": {}}
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [event["logprobs"][name] for event in events]
            choice["logprobs"][name] = (
                None if parts[0] is None else [one for part in parts for one in part]
            )
    else:
        (choice,) = served.complete(**body)["choices"]
    found = choice["logprobs"]
    shown = prompt if isinstance(prompt, str) else engine.decode(prompt, skip_special_tokens=False)
    assert choice["text"] == shown + alone.text
    scores = [*alone.prompt_logprobs[1:], *alone.logprobs]
    assert found["token_logprobs"] == [None, *(one.logprob for one in scores)]
    assert len(found["tokens"]) == len(alone.prompt_tokens) + len(alone.tokens)
    if not logprobs:
        assert found["top_logprobs"] is None
    else:
        assert found["top_logprobs"][0] is None
        for one, top in zip(scores, found["top_logprobs"][1:], strict=True):
            expected = sorted({*one.top.values(), one.logprob})
            assert sorted(set(top.values())) == expected
    whole_tokens = not any(token.startswith("bytes:") for token in found["tokens"])
    if whole_tokens and engine.config.eos_tokens[0] not in alone.tokens:
        assert "".join(found["tokens"]) == choice["text"]
        for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
            assert choice["text"][offset : offset + len(token)] == token


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A model whose tokenizer puts a token and a space before each text."""
    folder = tmp_path_factory.mktemp("llama")
    write_random_checkpoint(
        folder, hidden_size=32, num_layers=1, num_heads=2, vocab_size=2048, max_positions=256
    )
    spec = with_awkward_tokens(llama2())
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def served_llama(llama, tmp_path_factory):
    with serving(llama, tmp_path_factory.mktemp("serve-llama")) as server:
        yield server


def whole_choice(served: Served, stream: bool, **body: object) -> dict:
    """The one choice of an answer, put together if it is streamed."""
    if not stream:
        return served.complete(**body)["choices"][0]
    answer = served.client.post("/v1/completions", json={**body, "stream": True})
    events = [event["choices"][0] for event in events_of(answer.text)]
    names = ("tokens", "text_offset")
    logprobs = [event["logprobs"] for event in events]
    return {
        "text": "".join(event["text"] for event in events),
        "logprobs": {name: [one for part in logprobs for one in part[name]] for name in names},
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("prompt", ["The old house", " a</s>b", "<s>x", "", [1, 77, 2, 99]])
def test_offsets_are_those_of_the_text(served_llama, llama, prompt, echo, stream):
    """Special tokens that the text does not have take no room in it; decoding says where it is."""
    reference = Tokenizer.from_file(str(llama / "tokenizer.json"))
    specials = {t for t, a in reference.get_added_tokens_decoder().items() if a.special}
    body = {"prompt": prompt, "max_tokens": 60, "logprobs": 0, "echo": echo, "ignore_eos": True}
    ill_formed = [reference.token_to_id(byte) for byte in BYTES]  # of which U+FFFD is made
    bias = dict.fromkeys(ill_formed, -100.0) | dict.fromkeys(specials, 6.0)
    body |= {"seed": 5, "logit_bias": {str(token): value for token, value in bias.items()}}
    choice = whole_choice(served_llama, stream, **body)
    text, found = choice["text"], choice["logprobs"]
    shown = prompt if isinstance(prompt, str) else reference.decode(prompt, False)
    length = len(shown) if echo else 0
    offsets = found["text_offset"]
    new = offsets[-60:]
    names = {reference.id_to_token(token).replace("▁", " ") for token in specials}
    assert 3 < sum(token in names for token in found["tokens"][-60:]) < 57
    assert new[0] == length and offsets == sorted(offsets) and offsets[0] == 0
    for token, offset, following in zip(found["tokens"][-60:], new, [*new[1:], None], strict=True):
        if token in names:
            assert following in (offset, None)
        elif not token.startswith("bytes:"):
            assert text[offset : offset + len(token)] == token
    for token, offset in zip(found["tokens"][:-60], offsets, strict=False):
        if token != "<s>" or text.startswith("<s>"):
            own = token if text.startswith(token, offset) else token.removeprefix(" ")
            assert text[offset : offset + len(own)] == own


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_of_all_tokens_with_special_ones(served_llama, stream):
    body = {"prompt": "x", "max_tokens": 40, "logprobs": 0, "ignore_eos": True, "seed": 2}
    body |= {"logit_bias": {"2": 6.0}, "skip_special_tokens": False}
    choice = whole_choice(served_llama, stream, **body)
    assert choice["text"].count("</s>") > 3
    found = choice["logprobs"]
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset : offset + len(token)] == token


def test_offsets_end_with_the_text_before_a_stop(served, engine):
    """Tokens of a text that ends the answer are told, though it is cut off before them."""
    alone = engine.generate(PROMPT, max_new_tokens=30)
    stop = alone.text[10:24]
    (choice,) = served.complete(prompt=PROMPT, max_tokens=30, temperature=0, logprobs=0, stop=stop)[
        "choices"
    ]
    assert choice["text"] == alone.text[: alone.text.index(stop)]
    offsets = choice["logprobs"]["text_offset"]
    assert max(offsets) == len(choice["text"]) and offsets == sorted(offsets)


def test_parts_of_characters_are_spelt_as_bytes(served, engine):
    tokens = engine.encode("🙂")
    (choice,) = served.complete(prompt="🙂", max_tokens=0, echo=True, logprobs=1)["choices"]
    spelt = choice["logprobs"]["tokens"]
    assert len(spelt) == len(tokens) > 1
    data = b""
    for token in spelt:
        if token.startswith("bytes:"):
            data += bytes(int(part, 16) for part in token.removeprefix("bytes:\\x").split("\\x"))
        else:
            data += token.encode()
    assert data.decode() == "🙂"
    assert choice["text"] == "🙂"


def test_prompt_logprobs(served, engine):
    answer = served.complete(prompt=PROMPT, max_tokens=2, prompt_logprobs=2, temperature=0)
    found = answer["choices"][0]["prompt_logprobs"]
    alone = engine.generate(PROMPT, max_new_tokens=2, prompt_logprobs=2)
    assert found[0] is None and len(found) == len(alone.prompt_tokens)
    for entry, one in zip(found[1:], alone.prompt_logprobs[1:], strict=True):
        assert entry[str(one.token)]["logprob"] == one.logprob
        for token, logprob in one.top.items():
            assert entry[str(token)]["logprob"] == logprob
        ranks = {entry[str(token)]["rank"] for token in one.top}
        assert ranks == {1, 2}


def test_texts_without_a_seed_differ(served):
    """Two requests, and two prompts of one."""
    body = {"prompt": [PROMPT, PROMPT], "max_tokens": 30, "temperature": 1.0}
    answers = [served.complete(**body) for _ in range(2)]
    texts = [choice["text"] for answer in answers for choice in answer["choices"]]
    assert len(set(texts)) == 4


def test_a_draft_changes_no_text(demo_model, tmp_path, engine):
    body = {"prompt": [PROMPT, PROMPT * 3], "max_tokens": 60, "seed": 2, "temperature": 0.5}
    options = {"max_new_tokens": 60, "seed": 2, "temperature": 0.5}
    with serving(demo_model, tmp_path, "--draft", "ngram", "--draft-tokens", 4) as server:
        choices = server.complete(**body)["choices"]
    alone = engine.generate(body["prompt"], **options)
    assert [choice["text"] for choice in choices] == [one.text for one in alone]


def test_null_stands_for_the_default(served, engine):
    names = ["temperature", "top_p", "n", "stop", "logprobs", "logit_bias", "stream", "suffix"]
    body = dict.fromkeys([*names, "stream_options", "user", "best_of", "echo", "max_tokens"])
    answer = served.complete(prompt=PROMPT, seed=1, **body)
    alone = engine.generate(PROMPT, max_new_tokens=16, temperature=1.0, seed=1)
    assert answer["choices"][0]["text"] == alone.text


def test_models(client, served):
    (model,) = client.models.list().data
    assert model.id == "demo"
    assert client.models.retrieve("demo").id == "demo"
    assert model.max_model_len == 1024
    with pytest.raises(openai.NotFoundError) as found:
        client.models.retrieve("other")
    assert found.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt-4", prompt="x")


@pytest.mark.parametrize("text", [*TEXTS, "", "a\0b", "<|endoftext|>x"])
def test_tokenize_and_back(served, engine, text):
    answer = served.client.post("/tokenize", json={"prompt": text, "return_token_strs": True})
    tokens = answer.json()["tokens"]
    assert tokens == engine.encode(text)
    assert answer.json()["count"] == len(tokens) == len(answer.json()["token_strs"])
    back = served.client.post("/detokenize", json={"tokens": tokens})
    assert back.json()["prompt"] == text


def test_health_version_and_figures(served):
    assert served.client.get("/health").json() == {"status": "ok"}
    assert served.client.get("/health/live").status_code == 200
    assert served.client.get("/version").json() == {"version": clusterfusion.__version__}
    before = served.figures()
    served.complete(prompt=PROMPT, max_tokens=7, ignore_eos=True)
    label = '{model_name="demo"}'
    ended = f"vllm:e2e_request_latency_seconds_count{label}"

    def figures_after() -> dict[str, float] | None:
        """Which may come a moment after the answer."""
        found = served.figures()
        rests = found[f"vllm:num_requests_running{label}"] == 0
        return found if rests and found.get(ended, 0) > before.get(ended, 0) else None

    after = wait_for(figures_after)

    def rise(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert rise(f"vllm:generation_tokens_total{label}") == 7
    assert rise(f"vllm:prompt_tokens_total{label}") == 14
    assert rise(f"vllm:time_to_first_token_seconds_count{label}") == 1
    assert rise(ended) == 1
    success = 'vllm:request_success_total{finished_reason="length",model_name="demo"}'
    assert rise(success) == 1


def test_curl(served, engine):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stream": True}
    command = ["curl", "-sN", f"{served.url}/v1/completions", "-d", json.dumps(body)]
    output = subprocess.run(command, capture_output=True, timeout=300, check=True).stdout
    text = "".join(event["choices"][0]["text"] for event in events_of(output))
    assert text == engine.generate(PROMPT, max_new_tokens=12).text


def test_lm_eval_scores_are_those_in_process(served: Served, demo_model: Path):
    """local-completions with echo, beside the adapter that holds an engine itself."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    pytest.importorskip("tenacity", reason="lm_eval's extra 'api' is not installed")
    from clusterfusion.lm_eval import ClusterFusionLM
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    remote = LocalCompletionsAPI(
        base_url=served.url + "/v1/completions",
        model="demo",
        batch_size=4,
        max_length=1024,
    )
    # Both leave room for a new token, and cut the same from the left.
    local = ClusterFusionLM(pretrained=str(demo_model), device="cpu", batch_size=4, max_length=1022)
    pairs = [("It was a dark", " and stormy night"), ("Good", " morning, sir"), (PROMPT, " was")]
    pairs += [("naïve 北", "京 🙂"), ("word " * 1100, "and the end")]
    greedy = local.engine.generate(PROMPT, max_new_tokens=3).text
    pairs += [(PROMPT, greedy)]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(pairs)
    ]
    assert remote.loglikelihood(requests) == local.loglikelihood(requests)

    options = {"until": ["\n\n", "."], "max_gen_toks": 30, "temperature": 0}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(context, dict(options)), idx=i)
        for i, (context, _) in enumerate(pairs[:4])
    ]
    assert remote.generate_until(requests) == local.generate_until(requests)
