// The last hour: which model was on which GPU, the phases of switches, waits as bands, failures.
// The same drawing as that of `llmux sim --plot` (drawing.js), with zoom, hover and keys.

import { h } from "./dom.js";
import { coloursOf, describe, draw, itemsOf } from "./drawing.js";
import { clock, duration, minute, moment } from "./format.js";
import { history } from "./history.js";
import LOOK from "./look.js";

const HOUR = 3600, SHORTEST = 5;

let span = null; // seconds shown; null = all there is
let end = null; // null = now
let selected = -1;
let drag = null;

export const timelineView = {
  enter(app) {
    selected = -1;
    if (app.feed.head.version !== undefined) app.feed.loadEvents(); // else a key may be needed first
  },
  draw(app) {
    const now = app.feed.now();
    if (app.feed.events === null) {
      if (app.feed.state === "live") app.feed.loadEvents();
      const problem = app.feed.historyProblem;
      return h("p", { class: "empty" }, problem ? `Cannot load the last hour: ${problem}. Trying again.` : "Loading the last hour…");
    }
    const { story, items, colours } = told(app.feed, now);
    const window = bounds(story, now);
    const seen = items.filter((item) => item.end >= window.from && item.began <= window.to);
    const current = items.find((item) => item.id === selected);
    return [
      controls(app, window, now),
      h("p", { class: "figures", role: "status" }, current ? describe(current, clock) : `${moment(window.from)} to ${clock(window.to)}`),
      h("div", {
        key: "chart", class: "chart", tabindex: 0, role: "group",
        "aria-label": "Timeline. Left and right move, plus and minus zoom, up and down go from one entry to the next, Home shows the hour, End returns to now.",
        onkeydown: (event) => keys(app, event, seen, window, now),
        onwheel: (event) => wheel(app, event, window, now),
        onpointerdown: (event) => { drag = { x: event.clientX, window }; },
        onpointermove: (event) => pointer(app, event, window, now),
        onpointerup: () => { drag = null; },
        onpointerleave: () => { drag = null; },
      }, drawing(story, items, window, app)),
      legend(colours),
      list(app, now),
    ];
  },
};

// Once for each frame of the feed and each second: an hour of switches is thousands of events.
let made = { key: "" };

function told(feed, now) {
  const key = `${feed.revision} ${Math.floor(now)}`;
  if (made.key !== key) {
    const story = history(feed.events, feed.models, now - HOUR, now);
    const items = itemsOf(story, feed.head.gpu_count ?? 0);
    made = { key, story, items, colours: coloursOf(items) };
  }
  return made;
}

function bounds(story, now) {
  const all = Math.min(HOUR, Math.max(60, now - story.first));
  const length = span ?? all;
  const grain = Math.max(1, length / 1000); // what is less than a px need not be drawn anew
  const to = end ?? Math.ceil(now / grain) * grain;
  return { from: to - length, to };
}

// ---- moving about -----------------------------------------------------------------------------

function zoom(app, window, now, factor, at = window.to) {
  const length = window.to - window.from;
  span = Math.min(HOUR, Math.max(SHORTEST, length * factor));
  const share = (window.to - at) / length;
  move(app, at + share * span, now);
}

function move(app, to, now) {
  end = to >= now - 0.5 ? null : Math.max(to, now - HOUR + (span ?? 60));
  app.draw();
}

function keys(app, event, seen, window, now) {
  const length = window.to - window.from;
  const acts = {
    ArrowLeft: () => move(app, window.to - length / 5, now),
    ArrowRight: () => move(app, window.to + length / 5, now),
    "+": () => zoom(app, window, now, 0.5),
    "=": () => zoom(app, window, now, 0.5),
    "-": () => zoom(app, window, now, 2),
    Home: () => { span = HOUR; move(app, now, now); },
    End: () => move(app, now, now),
    ArrowUp: () => step(app, seen, -1),
    ArrowDown: () => step(app, seen, 1),
  };
  if (!acts[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  acts[event.key]();
}

function step(app, seen, by) {
  const order = [...seen].sort((a, b) => a.began - b.began);
  const at = order.findIndex((item) => item.id === selected);
  const next = order[at === -1 ? (by > 0 ? 0 : order.length - 1) : Math.min(order.length - 1, Math.max(0, at + by))];
  if (next) selected = next.id;
  app.draw();
}

function wheel(app, event, window, now) {
  if (!event.ctrlKey && Math.abs(event.deltaY) > Math.abs(event.deltaX) && !event.shiftKey) return; // the page scrolls
  event.preventDefault();
  const length = window.to - window.from;
  if (event.ctrlKey) zoom(app, window, now, event.deltaY > 0 ? 1.25 : 0.8, timeAt(event, window));
  else move(app, window.to + ((event.deltaX || event.deltaY) / 500) * length, now);
}

function timeAt(event, window) {
  const box = event.currentTarget.getBoundingClientRect();
  const share = (event.clientX - box.left - left(box.width)) / across(box.width);
  return window.from + Math.min(1, Math.max(0, share)) * (window.to - window.from);
}

function pointer(app, event, window, now) {
  if (drag !== null && event.buttons) {
    const width = across(event.currentTarget.clientWidth);
    const length = drag.window.to - drag.window.from;
    if (Math.abs(event.clientX - drag.x) > 3) {
      span ??= length;
      move(app, drag.window.to - ((event.clientX - drag.x) / width) * length, now);
    }
    return;
  }
  const id = event.target.getAttribute?.("data-item");
  if (id !== null && id !== undefined && id !== selected) {
    selected = id;
    app.draw();
  }
}

function controls(app, window, now) {
  const button = (label, text, act) => h("button", { "aria-label": label, title: label, onclick: act }, text);
  const length = window.to - window.from;
  return h("div", { class: "tools" },
    button("Zoom in", "+", () => zoom(app, window, now, 0.5, end === null ? window.to : (window.from + window.to) / 2)),
    button("Zoom out", "−", () => zoom(app, window, now, 2, end === null ? window.to : (window.from + window.to) / 2)),
    button("Earlier", "◀", () => move(app, window.to - length / 2, now)),
    button("Later", "▶", () => move(app, window.to + length / 2, now)),
    button("The whole hour", "hour", () => { span = HOUR; move(app, now, now); }),
    end === null ? h("span", { class: "dim" }, `last ${duration(length)}`) : h("button", { onclick: () => move(app, now, now) }, "Return to now"));
}

// ---- drawing ----------------------------------------------------------------------------------

const unit = () => Number.parseFloat(getComputedStyle(document.documentElement).fontSize) / 15; // px of a look's px
const left = (width) => (width / unit() < LOOK.left.from ? LOOK.left.narrow : LOOK.left.wide) * unit();
const across = (width) => Math.max(1, width - left(width) - LOOK.right * unit());
const hour = (at, every) => (every >= 60 ? minute(at) : clock(at));

function drawing(story, items, window, app) {
  const width = Math.max(280, (document.getElementById("content").clientWidth || 900) - 2);
  const size = { width, unit: unit(), gpus: app.feed.head.gpu_count ?? 0 };
  const { height, shapes } = draw(story, items, window, size, hour);
  return h("svg", { class: "drawing", width, height: Math.ceil(height), viewBox: `0 0 ${width} ${Math.ceil(height)}`, "aria-hidden": "true" },
    shapes.map((shape) => SHAPES[shape.kind](shape)));
}

const px = (number) => Math.round(number * 100) / 100;
const on = (shape, name) => (shape.id === selected ? `${name} on` : name);
const title = (shape) => h("title", {}, shape.title);

const SHAPES = {
  label: (shape) => [
    h("text", { key: `l${shape.y}`, x: shape.x, y: px(shape.y), class: "label" }, shape.text, title(shape)),
    shape.most ? h("text", { key: `m${shape.y}`, x: px(shape.mostX), y: px(shape.y), class: "most" }, shape.most) : null,
  ],
  rail: ({ x, y, width, height }) => h("rect", { key: `r${y}`, x, y: px(y), width, height: px(height), class: "rail" }),
  span: (shape) => [
    h("rect", {
      key: shape.id, x: px(shape.x), y: px(shape.y), width: px(shape.width), height: px(shape.height),
      fill: shape.fill, "fill-opacity": shape.opacity, class: on(shape, "item"), "data-item": shape.id,
    }, title(shape)),
    shape.inside ? h("text", { key: `t${shape.id}`, x: px(shape.x + 4), y: px(shape.y + shape.height / 2), fill: shape.ink, class: "inside" }, shape.inside) : null,
  ],
  wait: (shape) => h("path", {
    key: shape.id, d: `M${shape.points.map((point) => point.map(px).join()).join("L")}Z`,
    fill: shape.fill, "fill-opacity": shape.opacity, class: on(shape, "item"), "data-item": shape.id,
  }, title(shape)),
  failure: (shape) => h("path", { key: shape.id, d: cross(shape), class: on(shape, "failed"), "data-item": shape.id }, title(shape)),
  tick: ({ time, x, y, text, textY }) => [
    h("line", { key: `a${time}`, x1: px(x), x2: px(x), y1: 0, y2: px(y), class: "grid" }),
    h("text", { key: `x${time}`, x: px(x), y: px(textY), class: "tick" }, text),
  ],
};

function cross({ x, y, arm }) {
  const [west, east, north, south] = [x - arm, x + arm, y - arm, y + arm].map(px);
  return `M${west},${north}L${east},${south}M${east},${north}L${west},${south}`;
}

function legend(colours) {
  return h("ul", { class: "plain colours", "aria-label": "Colours" }, [...colours].map(([name, [fill]]) =>
    h("li", { key: name }, h("span", { class: "swatch", style: { "--c": fill } }), name)),
    h("li", { key: "  ", class: "dim" }, LOOK.legend));
}

function list(app, now) {
  const events = app.feed.events.filter((event) => event.type !== "queue").slice(-100).reverse();
  return h("section", { key: "events", "aria-labelledby": "h-events" },
    h("h2", { id: "h-events" }, "Events"),
    events.length === 0 ? h("p", { class: "dim" }, "Nothing happened in the last hour.") :
    h("ol", { class: "plain events" }, events.map((event) =>
      h("li", { key: `${event.time}/${event.id}` },
        h("time", { datetime: new Date(event.time * 1000).toISOString(), title: moment(event.time) }, clock(event.time)), " ",
        h("strong", {}, event.model), " ", words(event)))));
}

function words(event) {
  if (event.type === "transition") return `${event.from ?? "new"} → ${event.to}${event.reason ? ` (${event.reason})` : ""}`;
  if (event.type === "switch") return `serves after ${duration(event.duration_secs)}, ${event.cold ? "cold" : "woken"}${event.victims.length ? `, in place of ${event.victims.join(", ")}` : ""}`;
  if (event.type === "order") return `order ${event.order}: ${event.verb}, by ${event.by}: ${event.result}`;
  return event.type;
}
