// What is where, who waits for what, and why.

import { cancelOrder } from "./panel.js";
import { h } from "./dom.js";
import { age, bytes, bytesOf, moment, percent, plural } from "./format.js";

export const STATES = {
  serving: "●", draining: "◑", parking: "◔", parked: "◌", waking: "◔", starting: "◔", stopping: "◔", stopped: "○", failed: "✕",
};
export const MOVING = new Set(["draining", "parking", "waking", "starting", "stopping"]);
const FEW = 8; // models that need no filter
export const AWAKE = new Set(["serving", "draining", "starting", "waking", "parking", "stopping"]);

export const nowView = {
  draw(app) {
    const models = [...app.feed.models.entries()];
    const now = app.feed.now();
    return [
      underWay(app, models, now),
      orders(app, now),
      gpus(app, models),
      queue(app, models, now),
      table(app, models, now),
    ];
  },
};

export function ago(now, time, before = "") {
  if (time === null || time === undefined) return null;
  return h("time", { datetime: new Date(time * 1000).toISOString(), title: moment(time) }, `${before}${age(now - time)}`);
}

export const stateOf = (state) =>
  h("span", { class: `pill s-${state}` }, h("span", { "aria-hidden": "true" }, STATES[state] ?? "·"), ` ${state}`);

// ---- a switch under way -----------------------------------------------------------------------

function underWay(app, models, now) {
  const moving = models.filter(([, model]) => MOVING.has(model.state));
  if (!moving.length) return null;
  return h("section", { key: "under-way", class: "card under-way", "aria-labelledby": "h-way" },
    h("h2", { id: "h-way" }, "Under way"),
    h("ul", { class: "plain" }, moving.map(([name, model]) =>
      h("li", { key: name, class: "way" },
        h("span", { class: "way-what" }, nameButton(app, name), " ", stateOf(model.state), " ", doing(model)),
        bar(model, now),
        h("span", { class: "way-when" }, ago(now, model.phase_since ?? model.since, "for "), expected(model, now))))));
}

export function doing(model) {
  if (model.phase_text) {
    const progress = model.progress && model.progress.total ? `, ${amount(model.progress)}` : "";
    return model.phase_text + progress;
  }
  if (model.state === "draining") return `${plural(model.in_flight, "request")} to finish${model.wanted_by ? `, then ${model.wanted_by}` : ""}`;
  if (model.state === "parking" && model.wanted_by) return `to make room for ${model.wanted_by}`;
  return "";
}

function amount({ done, total, unit }) {
  return unit === "bytes" ? bytesOf(done, total) : `${done} of ${total} ${unit}`;
}

function expected(model, now) {
  if (typeof model.done_at === "number") return `, about ${age(model.done_at - now)} left`;
  if (typeof model.usual_secs === "number") return `, usually ${age(model.usual_secs)}`;
  const last = model.last_switch?.start_secs ?? model.last_switch?.wake_secs;
  return last && (model.state === "starting" || model.state === "waking") ? `, last time ${age(last)}` : "";
}

export function bar(model, now) {
  let share = null;
  if (model.progress?.total) share = model.progress.done / model.progress.total;
  else if (typeof model.done_at === "number" && model.usual_secs) share = 1 - (model.done_at - now) / model.usual_secs;
  if (share === null) return null;
  share = Math.min(1, Math.max(0, share));
  const text = percent(share);
  return h("span", { class: "progress", role: "progressbar", "aria-label": "progress", "aria-valuenow": Math.round(share * 100), "aria-valuemin": 0, "aria-valuemax": 100, title: text },
    h("span", { style: { "--w": text.replace(" ", "") } }));
}

function orders(app, now) {
  const given = app.feed.head.orders ?? [];
  if (!given.length) return null;
  return h("section", { key: "orders", "aria-labelledby": "h-orders" },
    h("h2", { id: "h-orders" }, "Orders"),
    h("ul", { class: "plain queue" }, given.map((order) =>
      h("li", { key: order.id, class: "card order" },
        h("span", {}, `Order ${order.id}: ${order.verb} ${order.models.join(", ")}, by ${order.by}, `, ago(now, order.since, "for ")),
        app.feed.head.may_order && order.cancellable
          ? h("button", { onclick: () => cancelOrder(app, order), "aria-label": `Cancel order ${order.id}` }, "Cancel") : null))));
}

// ---- GPUs -------------------------------------------------------------------------------------

function gpus(app, models) {
  const count = app.feed.head.gpu_count ?? 0;
  const seen = new Map((app.feed.head.gpus ?? []).map((gpu) => [gpu.index, gpu]));
  const cards = [];
  for (let index = 0; index < count; index += 1) cards.push(gpuCard(app, index, models, seen.get(index)));
  if (!cards.length) return null;
  return h("section", { key: "gpus", "aria-labelledby": "h-gpus" },
    h("h2", { id: "h-gpus" }, "GPUs"),
    app.feed.head.gpu_observer !== "ok" && app.feed.head.gpu_observer !== undefined
      ? h("p", { class: "strip bad" }, `GPU memory cannot be seen: ${app.feed.head.gpu_observer}`) : null,
    h("div", { class: "gpus" }, cards));
}

export function segments(index, models, gpu) {
  const parts = [];
  for (const [name, model] of models) {
    if (!model.gpus?.includes(index)) continue;
    const used = gpu && model.gpu_bytes ? model.gpu_bytes / model.gpus.length / gpu.total_bytes : null;
    if (AWAKE.has(model.state)) parts.push({ name, state: model.state, claim: model.gpu_memory, used, held: model.gpu_bytes });
    else if (used) parts.push({ name, state: model.state, claim: used, used, held: model.gpu_bytes, residue: true });
  }
  if (gpu && gpu.used_bytes !== undefined) {
    const foreign = gpu.used_bytes - (gpu.engines_bytes ?? gpu.used_bytes);
    if (foreign > 2 ** 27) parts.push({ name: "other processes", foreign: true, claim: foreign / gpu.total_bytes, used: foreign / gpu.total_bytes, held: foreign });
  }
  return parts;
}

function gpuCard(app, index, models, gpu) {
  const parts = segments(index, models, gpu);
  const used = gpu?.used_bytes === undefined ? "" : `${gpu.total_bytes ? bytesOf(gpu.used_bytes, gpu.total_bytes) : bytes(gpu.used_bytes)} used`;
  const claimed = parts.filter((part) => !part.foreign && !part.residue).reduce((sum, part) => sum + part.claim, 0);
  return h("article", { key: `gpu${index}`, class: "card gpu" },
    h("h3", {}, `GPU ${index} `, h("span", { class: "dim" }, [claimed ? `${percent(claimed)} claimed` : "free", used].filter(Boolean).join(", "))),
    h("div", { class: "gpu-bar", "aria-hidden": "true" },
      parts.map((part) =>
        h("span", {
          key: part.name,
          class: `seg ${part.foreign ? "foreign" : part.residue ? "residue" : `s-${part.state}`}`,
          style: { "--w": `${Math.min(100, part.claim * 100)}%`, "--u": `${part.used === null ? 100 : Math.min(100, (part.used / part.claim) * 100)}%` },
          title: describe(part),
        }))),
    h("ul", { class: "plain legend" }, parts.map((part) =>
      h("li", { key: part.name }, part.foreign ? h("span", {}, part.name) : nameButton(app, part.name), h("span", { class: "dim", title: describe(part) }, ` ${brief(part)}`)))));
}

function brief(part) {
  const held = part.held ? bytes(part.held) : "";
  if (part.foreign) return held;
  return [part.state, part.residue ? "" : percent(part.claim), held].filter(Boolean).join(", ");
}

function describe(part) {
  const held = part.held ? bytes(part.held) : "";
  if (part.foreign) return `${held}, not llmux's`;
  if (part.residue) return `${part.state}, still holds ${held}`;
  return [`${part.state}`, `${percent(part.claim)} claimed`, held && `${held} used`].filter(Boolean).join(", ");
}

// ---- the queue --------------------------------------------------------------------------------

function queue(app, models, now) {
  const waiting = models.filter(([, model]) => model.queue_depth > 0);
  waiting.sort((a, b) => (a[1].oldest_since ?? now) - (b[1].oldest_since ?? now));
  return h("section", { key: "queue", "aria-labelledby": "h-queue" },
    h("h2", { id: "h-queue" }, "Queue"),
    waiting.length === 0 ? h("p", { class: "dim" }, "No request waits.") :
      h("ol", { class: "plain queue" }, waiting.map(([name, model]) =>
        h("li", { key: name, class: "card" },
          nameButton(app, name), " ",
          h("strong", {}, plural(model.queue_depth, "request")), " ", ago(now, model.oldest_since, "oldest "),
          h("span", { class: "why" }, model.why || "")))));
}

// ---- models -----------------------------------------------------------------------------------

export const nameButton = (app, name) =>
  h("button", { class: "name", onclick: () => app.openModel(name), "aria-haspopup": "dialog" }, name);

let filter = ""; // of names and states; rows keep their places, so that none jumps away from a hand

function filterField(app, models) {
  if (models.length <= FEW) return null;
  return h("p", { key: "filter", class: "filter" },
    h("label", { for: "filter-field" }, "Filter"),
    h("input", { id: "filter-field", type: "search", autocomplete: "off", placeholder: "name or state", oninput: (event) => { filter = event.target.value.trim().toLowerCase(); app.draw(); } }));
}

const passes = ([name, model]) => name.toLowerCase().includes(filter) || model.state.startsWith(filter);

function counts(models) {
  const found = new Map();
  for (const [, model] of models) found.set(model.state, (found.get(model.state) ?? 0) + 1);
  return [...found].map(([state, count]) => `${count} ${state}`).join(", ");
}

function table(app, models, now) {
  const cell = (role, label, ...content) => h("td", { role, "data-label": label }, content);
  const column = (text) => h("th", { role: "columnheader", scope: "col" }, text);
  return h("section", { key: "models", "aria-labelledby": "h-models" },
    h("h2", { id: "h-models" }, plural(models.length, "model"), h("span", { class: "dim counts" }, models.length > FEW ? ` ${counts(models)}` : "")),
    filterField(app, models),
    models.length === 0 ? h("p", { class: "dim" }, "No model is configured.") :
    h("table", { role: "table", class: "models" },
      h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, ["Model", "State", "What and why", "In flight", "Waiting", "Memory"].map(column))),
      h("tbody", { role: "rowgroup" }, models.filter((one) => models.length <= FEW || passes(one)).map(([name, model]) =>
        h("tr", { role: "row", key: name, class: `row s-${model.state}` },
          h("th", { role: "rowheader", scope: "row" }, nameButton(app, name), tags(model)),
          cell("cell", "State", stateOf(model.state), " ", ago(now, model.since, "for ")),
          cell("cell", "What and why", what(model, now)),
          cell("cell", "In flight", h("span", { class: model.in_flight ? "num" : "num dim" }, model.in_flight ?? 0)),
          cell("cell", "Waiting", h("span", { class: model.queue_depth ? "num hot" : "num dim" }, model.queue_depth ?? 0),
            model.queue_depth ? ago(now, model.oldest_since, " oldest ") : null),
          cell("cell", "Memory", memory(model)))))));
}

function tags(model) {
  return [
    model.pinned ? h("span", { class: "tag", title: model.pinned_until ? `until ${moment(model.pinned_until)}` : "until it is unpinned" }, "pinned") : null,
    model.stale ? h("span", { class: "tag warn", title: "the engine was started with an earlier configuration" }, "older configuration") : null,
    model.image ? h("span", { class: "tag", title: `image on disk: ${model.image}` }, "image") : null,
  ];
}

function what(model, now) {
  const lines = [];
  if (model.state === "failed") {
    const again = model.retry_at > now ? `tried again in ${age(model.retry_at - now)}` : "";
    // its row says which model it is, and its state what could not be done
    const cause = (model.message ?? "failed").replace(/^cannot \w+ (model )?\S+: /, "");
    lines.push(h("span", { class: "failure", title: model.message ?? "" }, cause), again ? h("span", {}, again) : null);
  } else if (MOVING.has(model.state)) {
    lines.push(h("span", {}, doing(model) || model.why || ""), bar(model, now));
  } else if (model.why && model.queue_depth) {
    lines.push(h("span", {}, model.why));
  } else if (model.parked_as) {
    lines.push(h("span", { class: "dim" }, `as ${model.parked_as}`));
  } else if (model.idle_since && model.state === "serving") {
    lines.push(h("span", { class: "dim" }, ago(now, model.idle_since, "idle for ")));
  }
  return lines;
}

function memory(model) {
  const parts = [];
  if (model.gpu_bytes) parts.push(`${bytes(model.gpu_bytes)} GPU`);
  if (model.ram_bytes) parts.push(`${bytes(model.ram_bytes)} RAM`);
  if (model.gpus?.length && AWAKE.has(model.state)) parts.unshift(`GPU ${model.gpus.join(", ")}`);
  // broken between its parts only
  return h("span", { class: "dim" }, parts.map((part) => part.replaceAll(" ", "\u00a0")).join(" · "));
}
