// A prompt for a model, its answer as it streams, and how fast that was.

import { lines, request } from "./api.js";
import { h } from "./dom.js";
import { duration } from "./format.js";

const idle = { state: "idle", text: "", first: null, tokens: 0, began: 0, ended: 0, problem: "", abort: null };
let run = { ...idle };

export const tryView = {
  keyChanged() { // its answer is not the next one's to read
    run.abort?.abort();
    run = { ...idle };
  },
  draw(app) {
    const names = app.feed.usable ?? [...app.feed.models.keys()];
    const chosen = app.argument || names[0];
    return [
      h("form", { class: "try", onsubmit: (event) => { event.preventDefault(); send(app); } },
        h("label", { for: "try-model" }, "Model"),
        h("select", { id: "try-model" }, names.map((name) =>
          h("option", { key: name, selected: name === chosen }, name))),
        h("label", { for: "try-prompt" }, "Prompt"),
        h("textarea", { id: "try-prompt", rows: 4, required: true, placeholder: "Say something to the model" }),
        h("label", { for: "try-most" }, "Tokens at most"),
        h("input", { id: "try-most", type: "number", min: 1, max: 100000, value: "256" }),
        h("div", { class: "orders" },
          h("button", { class: "primary", type: "submit", disabled: run.state === "running" }, "Send"),
          run.state === "running" ? h("button", { type: "button", onclick: () => run.abort.abort() }, "Stop") : null)),
      run.state === "idle" ? null : h("section", { key: "answer", class: "card answer", "aria-labelledby": "h-answer" },
        h("h2", { id: "h-answer" }, "Answer"),
        h("p", { class: "figures", role: "status" }, figures()),
        run.problem ? h("p", { class: "strip bad", role: "alert" }, run.problem) : null,
        h("div", { class: "text", tabindex: 0, "aria-label": "The answer" }, run.text)),
    ];
  },
};

function figures() {
  const now = run.state === "running" ? performance.now() : run.ended;
  if (run.first === null) {
    return run.state === "running" ? `Waiting for the first token, ${duration((now - run.began) / 1000)} so far` : "No token came.";
  }
  const seconds = (now - run.first) / 1000;
  const speed = run.tokens > 1 && seconds > 0 ? `${((run.tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  return [`First token after ${duration((run.first - run.began) / 1000)}`, `${run.tokens} tokens`, speed, run.wait].filter(Boolean).join(" · ");
}

async function send(app) {
  const value = (id) => document.getElementById(id).value;
  const own = { ...idle, state: "running", began: performance.now(), abort: new AbortController() };
  run = own;
  app.draw();
  const body = {
    model: value("try-model"),
    messages: [{ role: "user", content: value("try-prompt") }],
    max_tokens: Number(value("try-most")) || 256,
    stream: true,
    stream_options: { include_usage: true },
  };
  try {
    const response = await request("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal: own.abort.signal });
    const waited = Number(response.headers.get("x-llmux-wait-ms"));
    if (waited > 0) own.wait = `waited ${duration(waited / 1000)} for the model`;
    for await (const line of lines(response)) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") take(own, JSON.parse(line.slice(6)));
      app.draw();
    }
    own.state = "done";
  } catch (problem) {
    own.state = "failed";
    own.problem = own.abort.signal.aborted ? "Stopped." : problem.message;
  }
  own.ended = performance.now();
  app.draw();
}

function take(own, chunk) {
  if (chunk.error) throw new Error(chunk.error.message);
  const delta = chunk.choices?.[0]?.delta ?? {};
  const text = delta.content || delta.reasoning_content || "";
  if (text) {
    own.first ??= performance.now();
    own.text += text;
    own.tokens += 1; // vLLM sends a chunk per token; the usage at the end says it exactly
  }
  if (chunk.usage?.completion_tokens) own.tokens = chunk.usage.completion_tokens;
}
