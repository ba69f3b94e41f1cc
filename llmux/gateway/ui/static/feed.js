// The state of the server as the page knows it: fed by server-sent events, continued after a cut.
// They are read with fetch, since EventSource cannot send a key.

import { Failure, key, lines, request } from "./api.js";

const SILENT_MS = 40_000; // the server says something every 15 s
const HIDDEN_MS = 60_000; // a tab that is not looked at gives its connection back
const KEEP_SECS = 3600;
const KEEP_EVENTS = 10_000; // as many as the supervisor keeps

const nameOf = (event) => `${event.time}/${event.id}`;

export class Feed extends EventTarget {
  head = {};
  models = new Map();
  events = null; // of the last hour, once the timeline asked for them
  historyProblem = ""; // why they could not be loaded
  usable = null; // models that a key may use which may not see the state; null = it may
  revision = 0; // grows with all that follows
  state = "connecting"; // live, cut, key, forbidden
  problem = "";
  heardAt = 0; // by this computer's clock, ms
  #skew = 0; // the server's clock minus ours, s
  #last = "";
  #abort = null;
  #loading = null;
  #again = false; // the history is to be loaded once more
  #meanwhile = []; // events that came while the history was on its way

  now() {
    return Date.now() / 1000 + this.#skew;
  }

  // needsKey: the server has keys; it is not asked without one before the user wants that.
  async run(needsKey) {
    let pause = 500;
    if (needsKey && !key.get()) {
      this.#set("key", "");
      await this.#keyChanged();
    }
    document.addEventListener("visibilitychange", () => this.#visibility());
    for (;;) {
      await this.#visible();
      const began = Date.now(), used = key.get();
      try {
        await this.#listen();
        this.#set("cut", "the server ended the connection");
      } catch (problem) {
        if (problem instanceof Failure && problem.status === 401) this.#set("key", problem.message);
        else if (problem instanceof Failure && problem.status === 403) await this.#forbidden(problem);
        else this.#set("cut", problem.message || "the connection was lost");
      }
      if (key.get() !== used) continue;
      if (this.state === "key" || this.state === "forbidden") await this.#keyChanged();
      else if (!document.hidden) {
        pause = Date.now() - began > 5000 ? 500 : Math.min(pause * 2, 8000);
        // not all tabs at the same moment
        await new Promise((done) => setTimeout(done, pause * (0.5 + Math.random())));
      }
    }
  }

  // After another key was given: what the former one showed is forgotten.
  restart() {
    this.#last = "";
    this.head = {};
    this.models = new Map();
    this.events = null;
    this.usable = null;
    this.#set("connecting", "");
    this.dispatchEvent(new Event("key"));
    this.#abort?.abort(new Failure(0, "another key was given"));
  }

  // A key that may not see the state may use models: these are asked for once.
  async #forbidden(problem) {
    try {
      this.usable = (await (await request("v1/models")).json()).data.map((model) => model.id);
    } catch {
      this.usable = null; // nothing can be offered
    }
    this.#set("forbidden", problem.message);
  }

  #keyChanged() {
    return new Promise((done) => this.addEventListener("key", done, { once: true }));
  }

  async #listen() {
    const abort = new AbortController();
    this.#abort = abort;
    const silence = { timer: 0 };
    const heard = () => {
      this.heardAt = Date.now();
      clearTimeout(silence.timer);
      silence.timer = setTimeout(() => abort.abort(new Failure(0, `nothing was heard for ${SILENT_MS / 1000} s`)), SILENT_MS);
    };
    heard();
    try {
      const headers = this.#last ? { "last-event-id": this.#last } : {};
      const response = await request("ui/feed", { headers, signal: abort.signal });
      let id = "";
      for await (const line of lines(response)) {
        heard();
        if (line.startsWith("id: ")) id = line.slice(4);
        else if (line.startsWith("data: ")) {
          this.#take(JSON.parse(line.slice(6)));
          this.#last = id;
        }
      }
    } finally {
      clearTimeout(silence.timer);
    }
  }

  #take(frame) {
    this.revision += 1;
    this.#skew = frame.now - Date.now() / 1000;
    if (frame.full) {
      this.head = frame.head;
      this.models = new Map(Object.entries(frame.models));
      if (this.events) this.loadEvents();
    } else {
      Object.assign(this.head, frame.head);
      for (const [name, change] of Object.entries(frame.models ?? {})) this.#change(name, change);
    }
    if (frame.history && this.events) this.loadEvents(true);
    else if (frame.events) this.#addEvents(frame.events);
    this.#set("live", "");
  }

  #change(name, change) {
    if (change === null) this.models.delete(name);
    else this.models.set(name, { ...this.models.get(name), ...change });
  }

  #addEvents(events) {
    if (this.#loading) this.#meanwhile.push(...events);
    if (this.events === null) return;
    const since = this.now() - KEEP_SECS;
    this.events = [...this.events.filter((event) => event.time > since), ...events].slice(-KEEP_EVENTS);
  }

  // anew: what is on its way may be of before.
  loadEvents(anew = false) {
    if (this.#loading && anew) this.#again = true;
    this.#loading ??= request("ui/history")
      .then((response) => response.json())
      .then(({ events }) => {
        const known = new Set(events.map(nameOf));
        this.events = [...events, ...this.#meanwhile.filter((event) => !known.has(nameOf(event)))];
        this.historyProblem = "";
      })
      .catch((problem) => (this.historyProblem = problem.message))
      .finally(() => {
        this.#meanwhile = [];
        this.#loading = null;
        this.revision += 1;
        if (this.#again) this.loadEvents();
        this.#again = false;
        this.#changed();
      });
  }

  #set(state, problem) {
    this.state = state;
    this.problem = problem;
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }

  #visibility() {
    clearTimeout(this.hiding);
    if (document.hidden) this.hiding = setTimeout(() => this.#abort?.abort(new Failure(0, "the tab was not looked at")), HIDDEN_MS);
  }

  #visible() {
    if (!document.hidden) return null;
    return new Promise((done) => {
      const look = () => {
        if (document.hidden) return;
        document.removeEventListener("visibilitychange", look);
        done();
      };
      document.addEventListener("visibilitychange", look);
    });
  }
}
