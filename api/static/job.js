// One job: its steps as they go on, then its numbers, tensors and artefacts.

import { ask, badge, bar, byId, duration, element, keepUp, lendKey, number, numbers, say, short, size, terminal, when } from "./api.js";

const path = `/v1/jobs/${document.body.dataset.job}`;
const SHOWN_TENSORS = 2000;
let etag = "";
let shown = "";

async function refresh() {
  const answer = await ask(path, { etag });
  if (answer !== null) {
    etag = answer.etag;
    render(answer.body);
    await renderResults(answer.body);
    if (terminal(answer.body.status)) return null;
  }
  return 1;
}

function render(job) {
  document.title = `${job.name || "Job"} · ${job.status} · Bitmill`;
  byId("name").textContent = job.name || "Job";
  byId("status").className = `badge ${job.status}`;
  byId("status").textContent = job.status;
  byId("progress").value = job.progress;
  byId("progress").className = job.status;
  byId("left").textContent = `${Math.round(100 * job.progress)} %${job.eta_s === null ? "" : `, ${duration(job.eta_s)} left`}`;
  byId("cancel").hidden = !["queued", "running"].includes(job.status);
  byId("retry").hidden = !["failed", "cancelled", "expired"].includes(job.status);
  byId("steps").replaceChildren(...job.steps.map(step));
  byId("recipe").textContent = JSON.stringify(job.recipe, null, 2);
  renderFailure(job.failure);
  renderSummary(job.summary ?? {});
  renderFacts(job);
}

function step(one) {
  const name = one.kind === "quantise" ? `quantise ${one.index}` : one.kind;
  const again = one.attempts > 1 ? `attempt ${one.attempts}` : "";
  const message = [again, one.message].filter(Boolean).join(", ");
  return element(
    "li",
    {},
    element("span", { textContent: name }),
    bar(one.progress, one.status, `Progress of ${name}`),
    element("span", { className: "percent", textContent: `${Math.round(100 * one.progress)} %` }),
    badge(one.status),
    ...(message ? [element("span", { className: "message", textContent: message })] : []),
  );
}

function renderFailure(failure) {
  byId("failure").hidden = !failure;
  if (!failure) return;
  const place = failure.tensor || failure.where;
  byId("failure-detail").textContent = (place ? `${place}: ` : "") + failure.detail;
  byId("failure-hint").textContent = failure.hint;
  byId("failure-code").textContent = `${failure.code} in ${failure.step}`;
}

function renderSummary(summary) {
  numbers(byId("summary"), [
    ["Bits per parameter", number(summary.bits_per_param, 4)],
    ["Size of the weights", size(summary.size_bytes)],
    ["KL, measured (nats/token)", short(summary.kl_mean)],
    ["KL, predicted (nats/token)", short(summary.predicted_kl)],
    ["Perplexity, quantised", number(summary.perplexity, 3)],
    ["Perplexity, original", number(summary.reference_perplexity, 3)],
  ]);
}

function renderFacts(job) {
  const facts = [
    ["Checkpoint", job.checkpoint],
    ["Created", when(job.created_at)],
    ["Started", when(job.started_at)],
    ["Finished", when(job.finished_at)],
    ["Labels", Object.entries(job.labels).map(([key, value]) => `${key}=${value}`).join(", ")],
    ["Retry of", job.retry_of ?? ""],
  ].filter(([, value]) => value);
  byId("facts").replaceChildren(
    ...facts.flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]),
  );
}

/** Tensors and artefacts, asked for again only when another step has ended. */
async function renderResults(job) {
  const done = job.steps.filter((one) => ["succeeded", "reused"].includes(one.status)).length;
  const state = `${job.status} ${done}`;
  if (state === shown) return;
  const [tensors, artefacts] = await Promise.all([ask(`${path}/tensors`), ask(`${path}/artefacts`)]);
  renderTensors(tensors.body.items);
  byId("artefacts-panel").hidden = artefacts.body.items.length === 0;
  byId("artefacts").replaceChildren(...artefacts.body.items.map(file));
  shown = state;
}

function renderTensors(tensors) {
  const more = tensors.length > SHOWN_TENSORS ? `, the first ${SHOWN_TENSORS} shown` : "";
  byId("tensors-panel").hidden = tensors.length === 0;
  byId("tensor-count").textContent = `${tensors.length}${more}`;
  const cell = (text) => element("td", { className: "number", textContent: text });
  const rows = tensors.slice(0, SHOWN_TENSORS).map((tensor) =>
    element(
      "tr",
      {},
      element("td", { textContent: tensor.name }),
      element("td", { textContent: tensor.shape.join(" × ") }),
      element("td", {}, element("code", { textContent: tensor.format })),
      cell(number(tensor.bits, 3)),
      cell(short(tensor.relative_rms_error)),
      cell(short(tensor.fisher_mean)),
      cell(short(tensor.predicted_kl)),
    ),
  );
  document.querySelector("#tensors tbody").replaceChildren(...rows);
}

function file(artefact) {
  const url = `/v1/artefacts/${artefact.id}/content`;
  const link = element("a", { href: url, textContent: "Download" });
  link.addEventListener("click", () => lendKey(url));
  return element(
    "li",
    {},
    element("span", { className: "path", textContent: artefact.path }),
    element("span", { className: "quiet", textContent: size(artefact.size) }),
    link,
    element("code", { className: "digest", textContent: `sha256 ${artefact.sha256}` }),
  );
}

async function act(verb) {
  try {
    const { body } = await ask(`${path}/${verb}`, { method: "POST" });
    if (body.id === document.body.dataset.job) refreshNow();
    else location.assign(`/jobs/${body.id}`);
  } catch (error) {
    say(error.message);
  }
}

const refreshNow = keepUp(refresh);
byId("cancel").addEventListener("click", () => act("cancel"));
byId("retry").addEventListener("click", () => act("retry"));
