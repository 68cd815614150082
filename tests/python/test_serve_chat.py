"""Chats: prompts as transformers renders them, answers as the engine gives them alone."""

import json
import shutil
from pathlib import Path

import clusterfusion
import pytest

openai = pytest.importorskip("openai", reason="openai is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from clusterfusion.serve.chat_template import ChatTemplate, TemplateRefusedError  # noqa: E402
from serving import serving  # noqa: E402

# Of kinds that models come with: ChatML, Llama 2's, Zephyr's, with loops and a refusal.
TEMPLATES = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}",
    "blocks": "{%- for message in messages %}\n    {%- if message.role == 'user' %}\n"
    "        {{- 'User: ' + message.content }}\n    {%- else %}\n"
    "        {%- generation %}\n        {{- 'Bot: ' + message.content + eos_token }}\n"
    "        {%- endgeneration %}\n    {%- endif %}\n"
    "    {%- if loop.last %}{% break %}{% endif %}\n"
    "{%- endfor %}\n{{ messages | tojson }}\n{%- if add_generation_prompt %}\nBot:{% endif %}",
}
TALK = [
    {"role": "user", "content": "Good morning — “dear” 北京"},
    {"role": "assistant", "content": "Good morning, sir."},
    {"role": "user", "content": "What is the matter?"},
]
TOKENS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_renders_as_transformers(demo_model, name, begins, count):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model)
    expected = tokenizer.apply_chat_template(
        TALK[:count],
        chat_template=TEMPLATES[name],
        add_generation_prompt=begins,
        tokenize=False,
    )
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    assert template.render(TALK[:count], add_generation_prompt=begins) == expected


def test_renders_what_the_templates_say():
    """The same by hand, so that it is tested without transformers."""
    render = {
        name: ChatTemplate(source, TOKENS).render(TALK[:2], add_generation_prompt=True)
        for name, source in TEMPLATES.items()
    }
    user, bot = (message["content"] for message in TALK[:2])
    assert render["chatml"] == (
        f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{bot}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render["llama"] == f"<|endoftext|>[INST] {user} [/INST] {bot} <|endoftext|>"
    listed = json.dumps(TALK[:2], ensure_ascii=False)
    assert render["blocks"] == f"User: {user}Bot: {bot}<|endoftext|>{listed}Bot:"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ (messages | attr('__class__')).__base__ }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
        "{{ messages[99].role.x.y }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_templates_are_in_a_sandbox(source):
    with pytest.raises(TemplateRefusedError):
        ChatTemplate(source, {}).render(TALK, add_generation_prompt=True)


def test_finds_the_models_template(demo_model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in demo_model.iterdir():
        (folder / file.name).symlink_to(file)
    assert ChatTemplate.find(clusterfusion.Engine(demo_model), None) is None
    config = json.loads((demo_model / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").unlink()

    def rendered(chat_template: object, file: Path | None = None) -> str:
        more = {} if chat_template is None else {"chat_template": chat_template}
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, **more}))
        template = ChatTemplate.find(clusterfusion.Engine(folder), file)
        return template.render(TALK, add_generation_prompt=False)

    assert rendered("a{{ eos_token }}") == "a<|endoftext|>"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "b"}]
    assert rendered(named) == "b"
    (folder / "chat_template.jinja").write_text("c{{ messages | length }}")
    assert rendered("a") == "c3"
    (folder / "mine.jinja").write_text("d")
    assert rendered("a", folder / "mine.jinja") == "d"


@pytest.fixture(scope="module")
def served(demo_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    (folder / "chat.jinja").write_text(TEMPLATES["chatml"])
    with serving(demo_model, folder, "--chat-template", folder / "chat.jinja") as server:
        yield server


def test_openai_client_chats(served, demo_model):
    engine = clusterfusion.Engine(demo_model)
    client = openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)
    options = {"model": str(demo_model), "messages": TALK, "max_tokens": 25, "seed": 4}
    prompt = ChatTemplate(TEMPLATES["chatml"], TOKENS).render(TALK, add_generation_prompt=True)
    ids = engine.encode(prompt, add_special_tokens=False)
    alone = engine.generate(
        ids, max_new_tokens=25, temperature=1.0, seed=4, n=2, logprobs=2, ignore_eos=False
    )
    whole = client.chat.completions.create(**options, n=2, logprobs=True, top_logprobs=2)
    assert whole.object == "chat.completion"
    for choice, one in zip(whole.choices, alone, strict=True):
        assert choice.message.role == "assistant" and choice.message.content == one.text
        content = choice.logprobs.content
        assert [entry.logprob for entry in content] == [score.logprob for score in one.logprobs]
        for entry, score in zip(content, one.logprobs, strict=True):
            assert [top.logprob for top in entry.top_logprobs] == list(score.top.values())
            assert bytes(entry.bytes).decode(errors="replace") == engine.decode(
                [score.token], skip_special_tokens=False
            )
    assert whole.usage.prompt_tokens == len(ids)
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alone[0].text
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)


def test_an_answer_is_no_longer_than_the_memory(demo_model, tmp_path):
    """Where the client says nothing of its length: the KV cache has room for half a context."""
    template = tmp_path / "chatml.jinja"
    template.write_text(TEMPLATES["chatml"])
    options = ["--chat-template", template, "--kv-bytes", 2 << 20]
    with serving(demo_model, tmp_path, *options) as server:
        body = {"messages": TALK, "temperature": 0, "ignore_eos": True}
        answer = server.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
    statistics = clusterfusion.Engine(demo_model, kv_bytes=2 << 20).serving_statistics()
    assert 0 < statistics.kv_pages * 64 < 1024
    assert usage["total_tokens"] == statistics.kv_pages * 64


def test_any_variable_of_a_template(served):
    body = {"messages": TALK, "max_tokens": 1, "chat_template_kwargs": {"self": 1, "mode": "x"}}
    assert served.client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    ("shown", "content", "expected"),
    [
        ("message.content", "I am  ", "I am  "),
        ("message.content", " I am\n", " I am\n"),
        ("message.content | trim", "I am  ", "I am"),
    ],
)
def test_white_space_stays_where_the_template_keeps_it(shown, content, expected):
    source = "{% for message in messages %}{{ " + shown + " }}<end>{% endfor %}"
    talk = [{"role": "assistant", "content": content}]
    text = ChatTemplate(source, {}).render(
        talk, add_generation_prompt=False, continue_final_message=True
    )
    assert text == expected


@pytest.mark.parametrize("templates", [[{"foo": 1}], [{"name": "default"}], ["x"], [None]])
def test_a_list_that_names_no_templates(demo_model, tmp_path, templates):
    folder = tmp_path / "model"
    shutil.copytree(demo_model, folder)
    config = {"chat_template": templates}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template: expected a text"):
        ChatTemplate.find(clusterfusion.Engine(folder), None)


def test_a_message_goes_on(served, demo_model):
    engine = clusterfusion.Engine(demo_model)
    talk = [*TALK, {"role": "assistant", "content": [{"type": "text", "text": "The matter is"}]}]
    body = {
        "messages": talk,
        "max_completion_tokens": 8,
        "temperature": 0,
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    answer = served.client.post("/v1/chat/completions", json=body).json()
    whole = ChatTemplate(TEMPLATES["chatml"], TOKENS).render(
        [*TALK, {"role": "assistant", "content": "The matter is"}], add_generation_prompt=False
    )
    prompt = whole.removesuffix("<|im_end|>\n")
    assert prompt.endswith("The matter is")
    alone = engine.generate(prompt, max_new_tokens=8)
    assert answer["choices"][0]["message"]["content"] == alone.text


def test_without_a_template_chats_are_refused(demo_model, tmp_path):
    with serving(demo_model, tmp_path) as server:
        body = {"messages": TALK}
        answer = server.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "no_chat_template"
