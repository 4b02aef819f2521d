// The list of jobs, newest first, kept up to date.

import { ask, badge, bar, byId, element, keepUp, number, numbers, short, size, terminal, when } from "./api.js";

let pages = 1;

async function refresh() {
  const [jobs, more] = await listed();
  const [usage, workers] = await Promise.all([ask("/v1/usage"), ask("/v1/workers")]);
  numbers(byId("service"), [
    ["Workers", String(workers.body.items.filter((worker) => worker.state === "alive").length)],
    ["Jobs queued", String(usage.body.queued_jobs)],
    ["Jobs running", String(usage.body.running_jobs)],
    ["Checkpoints", size(usage.body.checkpoint_bytes)],
    ["Artefacts", size(usage.body.artefact_bytes)],
  ]);
  document.querySelector("#jobs tbody").replaceChildren(...jobs.map(row));
  byId("jobs").hidden = jobs.length === 0;
  byId("empty").hidden = jobs.length > 0;
  byId("older").hidden = !more;
  return jobs.some((job) => !terminal(job.status)) ? 2 : 5;
}

/** The jobs of as many pages as the reader has asked for, and whether there are more. */
async function listed() {
  const found = [];
  const query = new URLSearchParams({ limit: "50" });
  if (byId("status").value) query.set("status", byId("status").value);
  for (let page = 0; page < pages; page += 1) {
    const { body } = await ask(`/v1/jobs?${query}`);
    found.push(...body.items);
    if (!body.next_cursor) return [found, false];
    query.set("cursor", body.next_cursor);
  }
  return [found, true];
}

function row(job) {
  const summary = job.summary ?? {};
  const name = element("a", { href: `/jobs/${job.id}`, textContent: job.name || job.id.slice(0, 16) });
  const cell = (label, text) => element("td", { className: "number", textContent: text, data: { label } });
  return element(
    "tr",
    {},
    element("td", {}, name),
    element("td", {}, badge(job.status)),
    element("td", {}, bar(job.progress, job.status, `Progress of ${job.name || job.id}`)),
    cell("bits per parameter", number(summary.bits_per_param, 3)),
    cell("size", size(summary.size_bytes)),
    cell("KL", short(summary.kl_mean)),
    element("td", { className: "quiet", textContent: when(job.created_at) }),
  );
}

const refreshNow = keepUp(refresh);
byId("status").addEventListener("change", () => {
  pages = 1;
  refreshNow();
});
byId("older").addEventListener("click", () => {
  pages += 1;
  refreshNow();
});
