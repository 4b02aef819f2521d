// What both pages share: the reader's key, requests with it, and small builders. Text enters the page as text only.

const KEY = "bitmill.key";
const UNITS = ["B", "kB", "MB", "GB", "TB"];

export const byId = (id) => document.getElementById(id);
export const terminal = (status) => ["succeeded", "failed", "cancelled", "expired"].includes(status);

export class Unauthorised extends Error {}

/** Ask the API; an answer that is not a success throws its problem's detail. 304 answers null. */
export async function ask(path, { method = "GET", etag = "" } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (etag) headers["If-None-Match"] = etag;
  const answer = await fetch(path, { method, headers, cache: "no-store" });
  if (answer.status === 304) return null;
  const body = await answer.json();
  if (answer.status === 401) throw new Unauthorised(body.detail);
  if (!answer.ok) throw new Error(body.hint ? `${body.detail} (${body.hint})` : body.detail);
  return { body, etag: answer.headers.get("ETag") ?? "" };
}

/** Keep calling `work`, which answers the seconds until its next call, or null to stop. Asks for the key when needed. */
export function keepUp(work) {
  let timer = 0;
  const turn = async () => {
    clearTimeout(timer);
    let wait = 5;
    try {
      wait = document.hidden ? 2 : await work();
      say("");
      show(true);
    } catch (error) {
      if (error instanceof Unauthorised) return askForKey(error.message);
      say(`${error.message}. Trying again.`);
    }
    if (wait !== null) timer = setTimeout(turn, 1000 * wait);
  };
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, byId("key").value.trim());
    turn();
  });
  byId("forget").addEventListener("click", () => {
    sessionStorage.removeItem(KEY);
    location.reload();
  });
  turn();
  return turn;
}

function show(signedIn) {
  byId("key-form").hidden = signedIn;
  byId("content").hidden = !signedIn;
  byId("forget").hidden = !sessionStorage.getItem(KEY);
}

function askForKey(reason) {
  const refused = sessionStorage.getItem(KEY) !== null;
  sessionStorage.removeItem(KEY);
  show(false);
  say(refused ? reason : "");
  byId("key").focus();
}

export function say(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

/** Let the browser download by itself: it can send no header, so the key rides in a cookie of that URL for a minute. */
export function lendKey(path) {
  const key = sessionStorage.getItem(KEY);
  const secure = location.protocol === "https:" ? "; secure" : "";
  if (key) document.cookie = `bitmill_download=${key}; path=${path}; max-age=60; samesite=strict${secure}`;
}

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  const { data = {}, ...rest } = properties;
  Object.assign(made, rest);
  Object.assign(made.dataset, data);
  made.append(...children);
  return made;
}

export const badge = (status) => element("span", { className: `badge ${status}`, textContent: status });

export const bar = (share, status, label) => {
  const made = element("progress", { max: 1, value: share, className: status });
  made.setAttribute("aria-label", label);
  return made;
};

export function numbers(list, entries) {
  const shown = entries.filter(([, value]) => value !== "");
  list.replaceChildren(
    ...shown.map(([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))),
  );
}

export function size(bytes) {
  if (bytes === null || bytes === undefined) return "";
  let unit = 0;
  let value = bytes;
  while (value >= 1000 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return unit === 0 ? `${value} B` : `${value.toFixed(2)} ${UNITS[unit]}`;
}

export const number = (value, digits) => (value === null || value === undefined ? "" : value.toFixed(digits));

/** Three digits; an exponent where a table of zeros would not be read. */
export function short(value) {
  if (value === null || value === undefined) return "";
  return value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(2) : value.toPrecision(3);
}

export const when = (text) => (text ? new Date(text).toLocaleString() : "");

export function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}
