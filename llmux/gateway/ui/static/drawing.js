// The drawing of the timeline as plain values: what is where, how wide, in which colour. Pure.
// llmux/sim/drawing.py makes the same of the same events; tests/system/page compares the two.

import { duration, plural } from "./format.js";
import LOOK from "./look.js";

// Spans on GPUs, waits, failures: each with a place, a time and a name of its own.
export function itemsOf(story, gpus) {
  const items = [];
  const byTime = story.spans.filter((one) => LOOK.shades[one.state] !== undefined).sort((a, b) => a.began - b.began);
  for (let gpu = 0; gpu < gpus; gpu += 1) {
    const ends = []; // of each slot of the lane; several models may be on one GPU
    const own = [];
    for (const one of byTime) {
      if (!one.gpus.includes(gpu)) continue;
      let slot = ends.findIndex((slot) => slot.model === one.model || slot.until <= one.began + 0.1);
      if (slot === -1) slot = ends.length;
      ends[slot] = { model: one.model, until: one.end };
      own.push({ ...one, kind: "span", gpu, slot, id: `s${gpu}/${one.id}` });
    }
    for (const item of own) items.push({ ...item, slots: ends.length });
  }
  for (const wait of story.waits) items.push({ ...wait, kind: "wait", id: `w${wait.model}/${wait.began}` });
  for (const failure of story.failures) items.push({ ...failure, kind: "failure", end: failure.began, id: `f${failure.id}` });
  return items;
}

// Only what is drawn takes a colour: of fifty models few are.
export function coloursOf(items) {
  const names = [...new Set(items.filter((item) => item.kind !== "failure").map((item) => item.model))].sort();
  return new Map(names.map((name, at) => [name, LOOK.colours[at % LOOK.colours.length]]));
}

// window: {from, to} in seconds; size: {width in px, unit: px of a look's px, gpus}; clock: time → words.
// Returns {height, shapes}; a shape is {kind, …} with its numbers in px.
export function draw(story, items, window, size, clock) {
  const place = places(story, items, window, size);
  const colours = coloursOf(items);
  const shapes = [];
  for (let gpu = 0; gpu < size.gpus; gpu += 1) {
    const y = place.gpu(gpu);
    shapes.push(label(`GPU ${gpu}`, "", y + LOOK.lane * size.unit * 0.7, place), rail(y, place.heights[gpu], place));
  }
  for (const name of place.lanes) {
    const y = place.model(name);
    shapes.push(label(name, story.most.get(name) || "", y + LOOK.thin * size.unit * 0.75, place), rail(y, LOOK.thin * size.unit, place));
  }
  const edges = new Map(); // of each slot: where the last span ends
  for (const item of items) {
    if (item.end < window.from || item.began > window.to) continue;
    if (item.kind === "span") {
      const shape = spanShape(item, colours, place, edges);
      if (shape === null) continue;
      shapes.push(shape);
    } else if (item.kind === "wait") shapes.push(waitShape(item, story, window, colours, place));
    else shapes.push(failureShape(item, place));
    shapes.at(-1).title = describe(item, clock);
  }
  shapes.push(...axis(window, place, clock));
  return { height: place.height, shapes };
}

function places(story, items, window, { width, unit, gpus }) {
  const left = (width / unit < LOOK.left.from ? LOOK.left.narrow : LOOK.left.wide) * unit;
  const right = width - LOOK.right * unit;
  const scale = (right - left) / Math.max(window.to - window.from, 1e-9);
  const slots = Array(gpus).fill(1);
  const waiting = new Set();
  for (const item of items) {
    if (item.kind === "span") slots[item.gpu] = item.slots;
    else waiting.add(item.model);
  }
  const lanes = story.models.filter((name) => waiting.has(name));
  const heights = slots.map((count) => Math.max(LOOK.lane, LOOK.slot * count) * unit);
  const tops = [];
  let y = LOOK.gap * unit;
  for (const height of heights) {
    tops.push(y);
    y += height + LOOK.gap * unit;
  }
  const at = new Map();
  for (const name of lanes) {
    at.set(name, y);
    y += (LOOK.thin + LOOK.gap) * unit;
  }
  return {
    width, unit, left, right, lanes, heights, axis: y + 4 * unit, height: y + LOOK.axis * unit,
    x: (time) => left + (Math.min(window.to, Math.max(window.from, time)) - window.from) * scale,
    gpu: (index) => tops[index],
    model: (name) => at.get(name),
  };
}

function label(text, most, y, { left, unit }) {
  const room = Math.max(3, Math.floor((left - (4 + LOOK.letter * String(most).length) * unit) / (LOOK.letter * unit)) - 1);
  return { kind: "label", x: 2 * unit, y, text: text.length > room ? `${text.slice(0, room - 1)}…` : text, title: text, most: String(most), mostX: left - 4 * unit };
}

const rail = (y, height, { left, right }) => ({ kind: "rail", x: left, y, width: Math.max(0, right - left), height });

// Null where it would lie on the px of another: an hour of switches is more than there are px.
function spanShape(item, colours, place, edges) {
  const height = place.heights[item.gpu] / item.slots;
  const x = place.x(item.began), end = place.x(item.end), slot = `${item.gpu}/${item.slot}`;
  if (end < (edges.get(slot) ?? -1)) return null;
  const width = Math.max(1, end - x);
  edges.set(slot, x + width);
  const [fill, ink] = colours.get(item.model);
  const fits = item.state === "serving" && width > (LOOK.letter * item.model.length + 8) * place.unit && height > 11 * place.unit;
  return {
    kind: "span", id: item.id, x, y: place.gpu(item.gpu) + item.slot * height, width,
    height: Math.max(2, height - (item.slots > 1 ? 1 : 0)), fill, opacity: LOOK.shades[item.state], inside: fits ? item.model : "", ink,
  };
}

function waitShape(item, story, window, colours, place) {
  const thin = LOOK.thin * place.unit, base = place.model(item.model) + thin;
  const most = Math.max(1, story.most.get(item.model) ?? 1);
  const points = [[place.x(item.began), base]];
  item.steps.forEach((one, at) => {
    const until = item.steps[at + 1]?.time ?? item.end;
    if (until < window.from || one.time > window.to) return;
    const y = base - (thin * one.waiting) / most;
    points.push([place.x(one.time), y], [place.x(until), y]);
  });
  points.push([Math.max(place.x(item.end), points[0][0] + 1), base]);
  return { kind: "wait", id: item.id, points: thinned(points), fill: colours.get(item.model)[0], opacity: LOOK.wait };
}

// Of many steps within a px the highest is drawn.
function thinned(points) {
  const kept = [];
  for (const [x, y] of points) {
    const last = kept.at(-1);
    if (kept.length > 2 && x - kept.at(-2)[0] < 0.5) kept[kept.length - 1] = [x, Math.min(last[1], y)];
    else kept.push([x, y]);
  }
  kept[kept.length - 1] = points.at(-1);
  return kept;
}

function failureShape(item, place) {
  return { kind: "failure", id: item.id, x: place.x(item.began), y: place.model(item.model) + (LOOK.thin * place.unit) / 2, arm: 5 * place.unit };
}

function axis(window, place, clock) {
  const length = window.to - window.from;
  const most = Math.max(2, Math.floor((place.width - place.left) / (90 * place.unit)));
  const every = LOOK.steps.find((one) => length / one <= most) ?? LOOK.steps.at(-1);
  const shapes = [];
  for (let time = Math.ceil(window.from / every) * every; time <= window.to; time += every) {
    const x = place.x(time);
    if (place.width - x < 40 * place.unit) continue; // its text would be cut
    shapes.push({ kind: "tick", time, x, y: place.axis, text: clock(time, every), textY: place.axis + 14 * place.unit });
  }
  return shapes;
}

export function describe(item, clock) {
  const lasted = duration(item.end - item.began);
  if (item.kind === "wait") return `${item.model}: up to ${plural(item.most, "request")} waited ${lasted}, from ${clock(item.began)}`;
  if (item.kind === "failure") return `${item.model} failed at ${clock(item.began)}: ${item.reason}`;
  return `${item.model} ${item.state} on GPU ${item.gpus.join(", ")}, ${lasted} from ${clock(item.began)}${item.reason ? ` (${item.reason})` : ""}${phases(item.change)}`;
}

const phases = (change) => (change
  ? `; switch of ${duration(change.duration_secs)}: drain ${duration(change.drain_secs)}, park ${duration(change.park_secs)}, ${change.cold ? "start" : "wake"} ${duration(change.up_secs)}`
  : "");
