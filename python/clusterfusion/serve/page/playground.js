"use strict";
// The playground: streams a completion with log-probabilities and shows them on hover.

const at = (id) => document.getElementById(id);
let running = null; // an AbortController while text streams

function headers() {
  const key = at("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function request() {
  const body = {
    prompt: at("prompt").value,
    max_tokens: Number(at("max_tokens").value),
    temperature: Number(at("temperature").value),
    top_p: Number(at("top_p").value),
    top_k: Number(at("top_k").value),
    logprobs: 5,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (at("seed").value !== "") body.seed = Number(at("seed").value);
  if (at("stop").value !== "") body.stop = at("stop").value;
  return body;
}

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function span(text, kind) {
  const made = document.createElement("span");
  made.className = kind;
  made.textContent = text;
  at("output").append(made);
  return made;
}

function showToken(choice) {
  const made = span(choice.text, "token");
  const scores = choice.logprobs;
  if (!scores || !scores.tokens.length) return;
  const own = scores.token_logprobs[0];
  // The less likely, the darker behind it.
  made.style.background = `rgb(42 111 219 / ${Math.min(0.35, -own * 0.06)})`;
  made.dataset.tip = [
    `${JSON.stringify(scores.tokens[0])}  ${own.toFixed(3)}  ${percent(own)}`,
    ...Object.entries(scores.top_logprobs[0]).map(
      ([token, logprob]) => `  ${percent(logprob)}  ${JSON.stringify(token)}`,
    ),
  ].join("\n");
}

const percent = (logprob) => `${(Math.exp(logprob) * 100).toFixed(1).padStart(5)} %`;

function showFigures(usage, began, first, server) {
  const seconds = (performance.now() - first) / 1000;
  const parts = [
    `${usage.prompt_tokens} + ${usage.completion_tokens} tokens`,
    `first after ${(first - began).toFixed(0)} ms`,
  ];
  if (usage.completion_tokens > 1) {
    const rate = (usage.completion_tokens - 1) / seconds;
    parts.push(`${rate.toFixed(0)} tokens/s`);
    const ceiling = server.read_ceiling_bytes_per_second;
    if (ceiling) {
      const share = (rate * server.bytes_per_token) / ceiling;
      parts.push(`${(share * 100).toFixed(0)} % of the memory ceiling`);
    }
  }
  at("figures").textContent = parts.join(" · ");
}

async function failure(answer) {
  const text = await answer.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${answer.status}: ${text}`;
  }
}

async function generate() {
  running = new AbortController();
  at("go").disabled = true;
  at("halt").disabled = false;
  at("error").textContent = at("figures").textContent = "";
  at("output").replaceChildren();
  span(at("prompt").value, "prompt");
  const began = performance.now();
  let first = 0;
  try {
    const answer = await fetch("/v1/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(request()),
      signal: running.signal,
    });
    if (!answer.ok) throw new Error(await failure(answer));
    for await (const event of eventsOf(answer)) {
      first ||= performance.now();
      if (event.error) throw new Error(event.error.message);
      if (event.choices.length) showToken(event.choices[0]);
      if (event.usage) showFigures(event.usage, began, first, await server);
    }
  } catch (error) {
    if (error.name !== "AbortError") at("error").textContent = error.message;
  } finally {
    running = null;
    at("go").disabled = false;
    at("halt").disabled = true;
    document.body.dataset.done = "yes";
  }
}

const server = fetch("/page-info")
  .then((answer) => answer.json())
  .catch(() => ({}));
server.then((info) => {
  at("model").textContent = [info.model, info.device].filter(Boolean).join(" · ");
});

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) generate();
});
at("halt").addEventListener("click", () => running?.abort());

const tip = at("tip");
at("output").addEventListener("mouseover", (event) => {
  const text = event.target.dataset.tip;
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const box = event.target.getBoundingClientRect();
  tip.style.left = `${Math.min(box.left, window.innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${box.bottom + 6}px`;
});
at("output").addEventListener("mouseleave", () => {
  tip.hidden = true;
});
