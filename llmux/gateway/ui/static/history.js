// From events to spans, waits and failures. Pure. llmux/sim/story.py does the same for the simulator.

export function history(events, models, from, now) {
  const byModel = new Map();
  for (const event of events) {
    if (event.type === "order") continue;
    if (!byModel.has(event.model)) byModel.set(event.model, []);
    byModel.get(event.model).push(event);
  }
  for (const name of models.keys()) if (!byModel.has(name)) byModel.set(name, []);
  const names = [...byModel.keys()].sort();
  const story = { models: names, spans: [], waits: [], failures: [], most: new Map(), first: now };
  for (const name of names) {
    const own = byModel.get(name);
    story.spans.push(...spansOf(name, own, models.get(name), from, now));
    const waits = waitsOf(name, own, models.get(name), from, now);
    story.waits.push(...waits);
    story.most.set(name, Math.max(0, ...waits.map((wait) => wait.most)));
    for (const event of own) {
      if (event.type === "transition" && event.to === "failed") story.failures.push({ model: name, began: event.time, reason: event.reason, id: `${event.time}/${event.id}` });
    }
  }
  if (events.length) story.first = Math.max(from, Math.min(now, events[0].time - 1));
  return story;
}

function spansOf(name, events, row, from, now) {
  const moves = events.filter((event) => event.type === "transition" || event.type === "removed");
  const spans = [];
  const add = (state, began, end, gpus, reason, id) => {
    if (end > from && state !== "stopped" && state !== "parked") spans.push({ model: name, state, began: Math.max(from, began), end, gpus, reason, id });
  };
  if (moves.length === 0) {
    if (row) add(row.state, Math.max(from, row.since ?? from), now, row.gpus ?? [], "", name);
    return spans;
  }
  const first = moves[0];
  if (first.from) add(first.from, first.time - (first.duration_secs ?? 0), first.time, first.gpus ?? [], "", `${name}/first`);
  moves.forEach((move, at) => {
    if (move.type === "removed") return;
    // the change of epochs of a supervisor's restart leaves no event: the next says where it came from
    add(move.to, move.time, moves[at + 1]?.time ?? now, move.gpus ?? [], move.reason, `${move.time}/${move.id}`);
  });
  let at = 0; // both are in the order of time
  for (const change of events.filter((event) => event.type === "switch")) {
    while (at < spans.length && (spans[at].state !== "serving" || spans[at].began <= change.time - 0.5)) at += 1;
    if (spans[at]?.began < change.time + 0.5) spans[at].change = change;
  }
  return spans;
}

function waitsOf(name, events, row, from, now) {
  const waits = [];
  let open = null;
  const close = (time) => {
    if (open === null) return;
    if (time > from) waits.push({ ...open, end: time });
    open = null;
  };
  for (const event of events) {
    if (event.type !== "queue") continue;
    if (event.waiting === 0) close(event.time);
    else {
      open ??= { model: name, began: Math.max(from, event.time), most: 0, steps: [] };
      open.steps.push({ time: event.time, waiting: event.waiting });
      open.most = Math.max(open.most, event.waiting);
    }
  }
  if (row?.queue_depth > 0) {
    const began = row.oldest_since ?? now;
    open ??= { model: name, began, most: row.queue_depth, steps: [{ time: began, waiting: row.queue_depth }] };
    close(now);
  } else if (open !== null) close(open.steps.at(-1).time + 1); // its end was not noted
  return waits;
}
