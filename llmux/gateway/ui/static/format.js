// Numbers with their units, times as a person says them.

const MINUTE = 60, HOUR = 3600, DAY = 86400;

export function duration(seconds) {
  const s = Math.max(0, seconds);
  if (s < 1) return `${Math.round(s * 1000)} ms`;
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < MINUTE) return `${Math.round(s)} s`;
  if (s < HOUR) return `${Math.floor(s / MINUTE)} min ${Math.floor(s % MINUTE)} s`;
  if (s < DAY) return `${Math.floor(s / HOUR)} h ${Math.floor((s % HOUR) / MINUTE)} min`;
  return `${Math.floor(s / DAY)} d ${Math.floor((s % DAY) / HOUR)} h`;
}

// Whole seconds: what counts while somebody looks.
export const age = (seconds) => (seconds < 1 ? "0 s" : duration(seconds < 10 ? Math.floor(seconds) : seconds).replace(".0 ", " "));

export function bytes(count) {
  if (count === null || count === undefined) return "";
  if (count >= 2 ** 40) return `${(count / 2 ** 40).toFixed(1)} TiB`;
  if (count >= 2 ** 30) return `${(count / 2 ** 30).toFixed(1)} GiB`;
  return `${Math.round(count / 2 ** 20)} MiB`;
}

// "126.0 of 141.0 GiB": the unit once where it is the same.
export function bytesOf(count, total) {
  const [one, all] = [bytes(count), bytes(total)];
  const unit = all.slice(all.indexOf(" "));
  return `${one.endsWith(unit) ? one.slice(0, -unit.length) : one} of ${all}`;
}

export const percent = (share) => `${Math.round(share * 100)} %`;
export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

// Made once: toLocaleString makes one each time, which takes longer than all else of a drawing.
const CLOCK = new Intl.DateTimeFormat([], { timeStyle: "medium" });
const SHORT = new Intl.DateTimeFormat([], { timeStyle: "short" });
const MOMENT = new Intl.DateTimeFormat([], { dateStyle: "short", timeStyle: "medium" });

export const clock = (time) => CLOCK.format(time * 1000);
export const minute = (time) => SHORT.format(time * 1000);
export const moment = (time) => MOMENT.format(time * 1000);
