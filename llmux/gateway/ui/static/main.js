// The page: one feed, the views, the bar above them. Drawn when something changed, and each second.

import { key } from "./api.js";
import { h, render } from "./dom.js";
import { Feed } from "./feed.js";
import { age, clock } from "./format.js";
import { logsView } from "./logs.js";
import { nowView } from "./now.js";
import { askKey, askMode, closePanel, openModel, renderPanel } from "./panel.js";
import { timelineView } from "./timeline.js";
import { tryView } from "./try.js";

const VIEWS = { now: nowView, timeline: timelineView, try: tryView, logs: logsView };
const TITLES = { now: "Now", timeline: "Timeline", try: "Try", logs: "Logs" };

export const feed = new Feed();
const app = { feed, draw, openModel: (name) => openModel(app, name), argument: "" };
let current = null;
let due = false;

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // a hash that was written by hand
  }
}

function route() {
  const [name, ...rest] = location.hash.slice(1).split("/");
  const view = VIEWS[name] ? name : "now";
  const argument = decoded(rest.join("/"));
  if (current === view && argument === app.argument) return;
  if (current !== null) VIEWS[current].leave?.(app);
  const content = document.getElementById("content");
  if (current !== null && current !== view) {
    render(content); // views share no elements
    content.focus();
  }
  current = view;
  app.argument = argument;
  document.title = `${TITLES[view]} · llmux`;
  VIEWS[view].enter?.(app);
  draw();
}

function draw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    render(document.getElementById("bar"), ...bar());
    render(document.getElementById("content"), content());
    renderPanel(app);
  });
}

function content() {
  if (feed.state === "key") return needKey();
  if (feed.state === "forbidden") return forbidden();
  if (feed.heardAt === 0 || feed.head.version === undefined) {
    return h("p", { key: "wait", class: "empty" }, feed.problem ? `Cannot reach llmux: ${feed.problem}. Trying again.` : "Connecting…");
  }
  return h("div", { key: current, class: `view ${current}` }, h("h1", { class: "unseen" }, TITLES[current]), VIEWS[current].draw(app));
}

const needKey = () =>
  h("section", { key: "need-key", class: "notice" },
    h("h1", {}, key.get() ? "This key is not valid" : "A key is needed"),
    h("p", {}, "This server gives its state to admin keys. The key stays in this tab and is forgotten with it."),
    h("div", { class: "orders" },
      h("button", { class: "primary", onclick: () => askKey(app) }, "Enter a key"),
      key.get() ? null : h("button", { onclick: () => feed.restart() }, "Go on without a key")));

// A key that may use models is offered just that.
const forbidden = () => [
  h("section", { key: "forbidden", class: feed.usable ? "" : "notice" },
    h("h1", { class: "title" }, feed.usable ? "This key may use models" : "The state is not shown here"),
    h("p", {}, feed.usable ? "To watch and to steer, an admin key is needed." : feed.problem, " ",
      h("button", { onclick: () => askKey(app) }, key.get() ? "Enter another key" : "Enter a key"))),
  feed.usable ? h("div", { key: "usable", class: "view try" },
    feed.usable.length ? VIEWS.try.draw(app) : h("p", {}, "It may use no model that is configured.")) : null,
];

function bar() {
  const head = feed.head;
  return [
    h("div", { class: "brand" }, h("strong", {}, "llmux"), h("span", { class: "host" }, head.host ?? "")),
    h("nav", { "aria-label": "Views" },
      (feed.state === "forbidden" ? [] : Object.keys(TITLES)).map((name) =>
        h("a", { key: name, href: `#${name}`, "aria-current": current === name ? "page" : null }, TITLES[name]))),
    h("div", { class: "state" }, connection(), mode(head), keyButton(head)),
    notice(head),
  ];
}

function connection() {
  if (feed.state === "live") return h("span", { key: "c", class: "pill ok", title: `last heard ${clock(feed.heardAt / 1000)}` }, "live");
  if (feed.state === "cut" && feed.heardAt) {
    return h("span", { key: "c", class: "pill bad", role: "alert" }, "cut off");
  }
  const text = feed.state === "connecting" ? "connecting" : feed.usable ? "models only" : "no access";
  return h("span", { key: "c", class: "pill" }, text);
}

function mode(head) {
  if (head.mode === undefined || feed.state === "forbidden" || feed.state === "key") return null;
  const text = head.mode.pinned ? `pinned: ${head.mode.pinned}` : head.mode.mode === "manual" ? "manual" : "automatic";
  if (!head.may_order) return h("span", { key: "mode", class: "pill" }, text);
  return h("button", { key: "mode", class: "pill", onclick: () => askMode(app), "aria-label": `Mode: ${text}. Change` }, text);
}

function keyButton(head) {
  if (!key.get() && !head.may_order) return null;
  return h("button", { key: "key", class: "pill", onclick: () => askKey(app) }, "key");
}

function notice(head) {
  if (feed.state === "cut" && feed.heardAt) {
    const silent = age(Date.now() / 1000 - feed.heardAt / 1000);
    return h("p", { key: "n", class: "strip bad" }, `Cut off: ${feed.problem}. What is shown is ${silent} old; trying again.`);
  }
  if (head.supervisor !== undefined && head.supervisor !== "up" && feed.state === "live") {
    return h("p", { key: "n", class: "strip bad" }, `The supervisor does not answer: ${head.supervisor}. Models that serve go on; what is shown is of before.`);
  }
  if (head.may_order === false && feed.state === "live") {
    return h("p", { key: "n", class: "strip" }, "Watching only: without keys nothing that comes over TCP gives orders. Set gateway.keys_file, or use the llmux command as root.");
  }
  return null;
}

addEventListener("hashchange", route);
feed.addEventListener("change", draw);
feed.addEventListener("key", () => {
  closePanel();
  for (const view of Object.values(VIEWS)) view.keyChanged?.();
  draw();
});
setInterval(draw, 1000);
route();
feed.run(document.querySelector("meta[name=llmux-keys]").content === "yes");
