// The output of one model's engine as it is written: searchable, and it can be held.

import { lines, request } from "./api.js";
import { h } from "./dom.js";

const KEEP_LINES = 5000;

let watched = { model: "", abort: null, problem: "", ended: false };
let held = null; // lines that came while it is held
let search = "";

export const logsView = {
  leave: forget,
  keyChanged: forget,
  draw(app) {
    const names = [...app.feed.models.keys()];
    if (watched.model !== app.argument) begin(app, app.argument);
    return [
      h("div", { class: "tools" },
        h("label", { for: "log-model" }, "Model"),
        h("select", { id: "log-model", onchange: (event) => { location.hash = `logs/${encodeURIComponent(event.target.value)}`; } },
          h("option", { key: "", disabled: true, selected: app.argument === "" }, "choose"),
          names.map((name) => h("option", { key: name, selected: name === app.argument }, name))),
        h("label", { for: "log-search" }, "Search"),
        h("input", { id: "log-search", type: "search", autocomplete: "off", oninput: (event) => find(event.target.value) }),
        h("button", { "aria-pressed": held !== null ? "true" : "false", onclick: () => hold(app) }, held !== null ? `Go on (${held.length} new)` : "Pause"),
        h("button", { onclick: () => box()?.replaceChildren() }, "Clear")),
      watched.problem || watched.ended
        ? h("p", { class: watched.problem ? "strip bad" : "strip", role: "alert" }, watched.problem || "The stream ended.", " ",
          h("button", { onclick: () => begin(app, app.argument) }, "Connect again")) : null,
      h("div", { key: "log-lines", id: "log-lines", class: "log", own: true, role: "log", tabindex: 0, "aria-label": `Output of ${app.argument}` }),
    ];
  },
};

function forget() {
  watched.abort?.abort();
  watched = { model: "", abort: null, problem: "", ended: false };
}

const box = () => document.getElementById("log-lines");

async function begin(app, model) {
  watched.abort?.abort();
  const own = { model, abort: new AbortController(), problem: "", ended: false };
  watched = own;
  held = null;
  box()?.replaceChildren();
  if (!model) return;
  try {
    const response = await request(`logs/stream/${encodeURIComponent(model)}`, { signal: own.abort.signal });
    let batch = [];
    for await (const line of lines(response)) {
      if (watched !== own) return;
      if (batch.length === 0) requestAnimationFrame(() => { if (watched === own) add(app, batch); batch = []; });
      if (batch.length < 2 * KEEP_LINES) batch.push(line);
      else batch = [...batch.slice(-KEEP_LINES), line]; // no frame is drawn while the tab is hidden
    }
    own.ended = true;
  } catch (problem) {
    if (own.abort.signal.aborted) return;
    own.problem = problem.message;
  }
  app.draw();
}

function add(app, batch) {
  if (held !== null) {
    held = [...held, ...batch].slice(-KEEP_LINES);
    app.draw();
    return;
  }
  const target = box();
  if (target === null) return;
  const follows = target.scrollHeight - target.scrollTop - target.clientHeight < 40;
  const fragment = document.createDocumentFragment();
  for (const line of batch) {
    if (line === "") continue;
    const one = document.createElement("div");
    one.textContent = line;
    one.hidden = !matches(line);
    fragment.append(one);
  }
  target.append(fragment);
  while (target.childElementCount > KEEP_LINES) target.firstChild.remove();
  if (follows) target.scrollTop = target.scrollHeight;
}

const matches = (line) => search === "" || line.toLowerCase().includes(search);

function find(text) {
  search = text.trim().toLowerCase();
  for (const one of box()?.children ?? []) one.hidden = !matches(one.textContent);
}

function hold(app) {
  if (held === null) held = [];
  else {
    const batch = held;
    held = null;
    add(app, batch);
  }
  app.draw();
}
