// Requests to this server, with the key of this tab. The key is nowhere but in sessionStorage.

const KEY = "llmux-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY)),
};

export class Failure extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (options.body) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(`../${path}`, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (problem) {
    if (options.signal?.aborted) throw problem; // with the reason that it was given
    throw new Failure(0, "the server cannot be reached");
  }
  if (!response.ok) throw new Failure(response.status, await messageOf(response));
  return response;
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

export const post = async (path, body) => (await request(path, { method: "POST", body: JSON.stringify(body) })).json();

// Text as it arrives, one line after the other, without its end.
export async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      yield* parts;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
