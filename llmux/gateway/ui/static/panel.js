// The dialog: a model with all that is known and the orders it can be given, the key, the mode.
// An order with a consequence asks first and says what the consequence is.

import { key, post } from "./api.js";
import { h, render } from "./dom.js";
import { age, bytes, duration, plural } from "./format.js";
import { AWAKE, MOVING, ago, bar, doing, stateOf } from "./now.js";

const panel = () => document.getElementById("panel");
let shown = null; // {kind: "model", name, step, result, busy} | {kind: "key"} | {kind: "mode"}

export function openModel(app, name) {
  show(app, { kind: "model", name, step: null });
}

export function askKey(app) {
  show(app, { kind: "key" });
}

export function askMode(app) {
  show(app, { kind: "mode" });
}

function show(app, what) {
  shown = what;
  renderPanel(app);
  if (!panel().open) panel().showModal();
  panel().onclose = () => { shown = null; };
}

export function closePanel() {
  if (panel().open) panel().close();
  shown = null;
}

export function renderPanel(app) {
  if (shown === null) return;
  const content = { model: modelPanel, key: keyPanel, mode: modePanel }[shown.kind](app);
  render(panel(), h("div", { key: `${shown.kind} ${shown.name ?? ""}`, class: "panel" }, content));
}

const title = (...text) => h("header", {}, h("h2", { id: "panel-title" }, text),
  h("button", { class: "close", onclick: closePanel, "aria-label": "Close" }, "✕"));

// ---- a model ----------------------------------------------------------------------------------

function modelPanel(app) {
  const model = app.feed.models.get(shown.name);
  if (model === undefined) return [title(shown.name), h("p", {}, "This model is not configured any more.")];
  return [
    title(shown.name, " ", stateOf(model.state)),
    shown.step === null ? orders(app, model) : confirmation(app, model),
    shown.result ? h("p", { class: `strip ${shown.failed ? "bad" : "good"}`, role: "alert" }, shown.result) : null,
    facts(app, model),
  ];
}

function orders(app, model) {
  const links = h("p", { class: "links" },
    h("a", { href: `#logs/${encodeURIComponent(shown.name)}`, onclick: closePanel }, "Logs"),
    h("a", { href: `#try/${encodeURIComponent(shown.name)}`, onclick: closePanel }, "Try it"));
  if (!app.feed.head.may_order) return [links];
  const offered = Object.entries(ORDERS).filter(([, order]) => order.offered(model, app, shown.name));
  return [
    h("div", { class: "orders", role: "group", "aria-label": "Orders" }, offered.map(([name, order]) =>
      h("button", {
        key: name,
        disabled: Boolean(shown.busy),
        onclick: () => begin(app, name),
      }, shown.busy === name ? `${order.label}…` : order.label))),
    links,
  ];
}

const down = (model) => model.state === "stopped" || model.state === "failed" || model.state === "parked";

// offered: whether it makes sense now; consequence: null = no question is asked
const ORDERS = {
  load: {
    label: "Load", offered: down,
    verb: "wake", consequence: (model, app, name) => making(model, app, name),
  },
  park: {
    label: "Park", offered: (model) => model.state === "serving",
    verb: "sleep", consequence: (model, app) => `Parked as ${model.eviction}. ${ending(model, app)}`,
  },
  unload: {
    label: "Unload", offered: (model) => model.state !== "stopped" && !starts(model),
    verb: "../unload", consequence: (model, app) => `Its engine ends; the next request is a cold start${usual(model)}. ${ending(model, app)}`,
  },
  cancel: {
    label: "Cancel the start", offered: starts,
    verb: "../unload", consequence: (model) => `The start is given up${model.queue_depth ? ` and ${plural(model.queue_depth, "waiting request")} refused` : ""}.`,
  },
  pin: {
    label: "Pin", offered: (model) => !model.pinned,
    verb: "pin", body: (name) => ({ models: [name] }),
    consequence: (model, app, name) => `${name} stays resident until it is unpinned: it makes no room for others, whose requests wait. ${down(model) ? making(model, app, name) : ""}`,
  },
  unpin: {
    label: "Unpin", offered: (model) => model.pinned,
    verb: "unpin", consequence: () => null,
    // a pin of manual mode ends with that mode
    body: (name, app) => (app.feed.head.mode?.pinned === name ? {} : { models: [name] }),
  },
  restart: {
    label: "Restart", offered: (model) => model.state === "serving" || model.state === "parked",
    verb: "restart", body: (name) => ({ models: [name] }),
    consequence: (model, app) => `Its engine ends and starts as configured now${usual(model)}. ${ending(model, app)}`,
  },
  checkpoint: {
    label: "Make an image",
    offered: (model) => (model.state === "serving" || model.state === "stopped") && model.eviction?.endsWith("+checkpoint"),
    verb: "checkpoint",
    consequence: (model, app, name) => (down(model)
      ? `It is started${usual(model)}, and leaves its GPU again as its image is written. ${making(model, app, name)}`
      : `It leaves its GPU while its image is written; its next request wakes it from there. ${ending(model, app)}`),
  },
};

function starts(model) {
  return model.state === "starting" || model.state === "waking";
}

const usual = (model) => (model.usual_start_secs ? `, usually ${duration(model.usual_start_secs)}` : "");

function ending(model, app) {
  if (!model.in_flight) return "No request is in flight.";
  return `${plural(model.in_flight, "request")} in flight ${model.in_flight === 1 ? "is" : "are"} cut unless finished within ${duration(app.feed.head.drain_timeout_secs)}.`;
}

// Where a model was never placed any GPU may take it.
function making(model, app, name) {
  const others = [...app.feed.models].filter(([other, one]) => other !== name && AWAKE.has(one.state));
  const claimed = (gpu) => others.reduce((sum, [, one]) => sum + (one.gpus.includes(gpu) ? one.gpu_memory : 0), 0);
  const fits = (gpu) => claimed(gpu) + model.gpu_memory <= 1.001;
  const placed = model.gpus.length > 0;
  const places = placed ? model.gpus : [...Array(app.feed.head.gpu_count ?? 0).keys()];
  if (placed ? places.every(fits) : places.some(fits)) return "There is room: no model has to leave.";
  const neighbours = others.filter(([, one]) => one.state === "serving" && one.gpus.some((gpu) => places.includes(gpu)));
  if (!neighbours.length) return "It comes after the models that are on their way now.";
  return `Models that may have to leave: ${neighbours.map(([other, one]) => `${other} (${one.in_flight ? ending(one, app) : "idle"})`).join("; ")}`;
}

function begin(app, name) {
  shown.result = null;
  const consequence = ORDERS[name].consequence(app.feed.models.get(shown.name), app, shown.name);
  if (consequence === null) return give(app, name);
  shown.step = name;
  renderPanel(app);
  panel().querySelector(".confirm button.primary")?.focus();
}

function confirmation(app, model) {
  const order = ORDERS[shown.step];
  return h("div", { class: "confirm", key: shown.step },
    h("p", {}, h("strong", {}, `${order.label}? `), order.consequence(model, app, shown.name)),
    h("div", { class: "orders" },
      h("button", { class: "primary", onclick: () => give(app, shown.step) }, order.label),
      h("button", { onclick: () => { shown.step = null; renderPanel(app); } }, "Back")));
}

async function give(app, name) {
  const order = ORDERS[name];
  const target = shown;
  target.step = null;
  target.busy = name;
  renderPanel(app);
  try {
    const path = order.verb.startsWith("../") ? order.verb.slice(3) : `control/${order.verb}`;
    const body = order.body ? order.body(target.name, app) : { model: target.name };
    const answer = await post(path, body);
    finish(app, target, answer.message ?? "done", false);
  } catch (problem) {
    finish(app, target, problem.message, true);
  }
}

function finish(app, target, text, failed) {
  target.busy = null;
  target.result = text;
  target.failed = failed;
  if (shown === target) renderPanel(app);
  else toast(`${target.name ? `${target.name}: ` : ""}${text}`, failed);
}

function facts(app, model) {
  const now = app.feed.now();
  const time = (at) => (typeof at === "number" ? h("span", {}, ago(now, at), " ago") : null);
  const rows = [
    ["Under way", MOVING.has(model.state) ? h("span", {}, doing(model), bar(model, now)) : null],
    ["Why", model.why],
    ["Last failure", model.message ? h("span", { class: "failure" }, model.message) : null],
    ["Tried again", model.retry_at > now ? `in ${age(model.retry_at - now)}` : null],
    ["Failures in a row", model.failures || null],
    ["Pinned", model.pinned ? pinned(model, now) : null],
    ["In this state", typeof model.since === "number" ? h("span", {}, "for ", ago(now, model.since)) : null],
    ["In flight", plural(model.in_flight ?? 0, "request")],
    ["Waiting", model.queue_depth ? h("span", {}, plural(model.queue_depth, "request"), ago(now, model.oldest_since, ", oldest ")) : "nothing"],
    ["Last request", time(model.idle_since)],
    ["Parked as", model.parked_as],
    ["Parks as", model.eviction],
    ["Image on disk", model.image],
    ["GPU", model.gpus?.length ? `${model.gpus.join(" and ")}, ${Math.round((model.gpu_memory ?? 0) * 100)} % of each` : null],
    ["GPU memory", bytes(model.gpu_bytes)],
    ["Host memory", bytes(model.ram_bytes)],
    ["Last switch", model.last_switch ? lastSwitch(model.last_switch) : null],
    ["Configuration", model.stale ? "newer than its engine: restart it to apply" : null],
    ["Engine", model.engine_version],
    ["Unit", model.unit],
    ["Process", model.pid],
    ["Address", model.address],
  ];
  return h("dl", {}, rows.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) =>
    h("div", { key: name }, h("dt", {}, name), h("dd", {}, value))));
}

const pinned = (model, now) => (model.pinned_until > now ? `for another ${age(model.pinned_until - now)}` : "until it is unpinned");

function lastSwitch(last) {
  const up = last.cold ? `start ${duration(last.start_secs)}` : `wake ${duration(last.wake_secs)}`;
  const from = last.victims.length ? ` in place of ${last.victims.join(", ")}` : "";
  return `${duration(last.total_secs)}${from}: drain ${duration(last.drain_secs)}, park ${duration(last.park_secs)}, ${up}`;
}

// ---- the key and the mode ---------------------------------------------------------------------

function keyPanel(app) {
  const use = (event) => {
    event.preventDefault();
    const field = panel().querySelector("input");
    key.set(field.value.trim());
    field.value = "";
    closePanel();
    app.feed.restart();
    app.draw();
  };
  return [
    title("Key"),
    h("form", { onsubmit: use, method: "dialog" },
      h("label", { for: "key-field" }, "An admin key of this server"),
      h("input", {
        id: "key-field", type: "password", autocomplete: "off", spellcheck: "false", autofocus: true,
        required: true, pattern: "\\s*[!-~]+\\s*", title: "one word of ASCII characters",
      }),
      h("p", { class: "dim" }, "It stays in this tab: closing the tab forgets it."),
      h("div", { class: "orders" },
        h("button", { class: "primary", type: "submit" }, "Use this key"),
        key.get() ? h("button", { type: "button", onclick: () => { key.set(""); closePanel(); app.feed.restart(); app.draw(); } }, "Forget the key") : null)),
  ];
}

function modePanel(app) {
  const mode = app.feed.head.mode ?? {};
  const set = (verb, body) => async () => {
    const target = shown;
    try {
      finish(app, target, (await post(`control/${verb}`, body)).message, false);
    } catch (problem) {
      finish(app, target, problem.message, true);
    }
  };
  const manual = mode.mode === "manual";
  return [
    title("Mode"),
    h("p", {}, manual
      ? `Manual${mode.pinned ? `, ${mode.pinned} is pinned` : ""}: requests for models that are not resident are refused.`
      : "Automatic: a request makes its model resident."),
    h("div", { class: "orders" }, manual
      ? h("button", { class: "primary", onclick: set(mode.pinned ? "unpin" : "mode", mode.pinned ? {} : { mode: "auto" }) }, "Return to automatic")
      : h("button", { class: "primary", onclick: set("mode", { mode: "manual" }) }, "Make it manual")),
    shown.result ? h("p", { class: `strip ${shown.failed ? "bad" : "good"}`, role: "alert" }, shown.result) : null,
  ];
}

export async function cancelOrder(app, order) {
  try {
    toast((await post("control/cancel", { orders: [order.id] })).message, false);
  } catch (problem) {
    toast(problem.message, true);
  }
}

export function toast(text, failed) {
  const box = document.getElementById("toasts");
  const one = document.createElement("p");
  one.className = failed ? "toast bad" : "toast";
  one.textContent = text;
  box.append(one);
  setTimeout(() => one.remove(), 8000);
}
