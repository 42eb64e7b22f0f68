// Asks GET /cluster once a second while the page is to be seen, and shows it. All text goes in as text, never as HTML.
"use strict";

const PERIOD = 1000;
const TIMEOUT = 5000;
const PICTURE_PERIOD = 15000;
const POINTS = 120;
const COLOURS = ["#c8484a", "#de822d", "#8c6cb0", "#c8a528", "#af5f8c", "#3ca0a5", "#7d6450", "#6e7680", "#8aa0b8"];
const KEPT = "#4e9a4e";

const history = { out: [], in: [], running: [], kv: [], percent: [] };
let troubleSince = null;
let pictureShown = 0;

const byId = (id) => document.getElementById(id);
const number = (value) => value >= 100 ? Math.round(value).toLocaleString("en") : value.toFixed(1);
const percent = (value) => value === null ? "unknown" : `${value.toFixed(1)} %`;
const time = (date) => date.toLocaleTimeString([], { hour12: false });

function seconds(value) {
  return value >= 1 ? `${value.toFixed(2)} s` : `${(1000 * value).toPrecision(3)} ms`;
}

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function sparkline(values, highest) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${POINTS} 28`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  const top = highest || Math.max(...values, 1e-9);
  const first = POINTS - values.length;
  line.setAttribute("class", "spark");
  line.setAttribute("points", values.map((value, i) => `${first + i},${(27 - 26 * Math.min(1, value / top)).toFixed(1)}`)
    .join(" "));
  svg.append(line);
  return svg;
}

function tile(title, value, note, values, highest) {
  const box = element("div", "", "tile");
  const list = element("dl");
  const shown = element("dd", value);
  if (note) shown.append(" ", element("small", note));
  list.append(element("dt", title), shown);
  box.append(list);
  if (values) box.append(sparkline(values, highest));
  return box;
}

function latency(title, view, windowSeconds) {
  if (view === null) return tile(title, "-", `no call in ${windowSeconds} s`);
  return tile(`${title} p50`, seconds(view.p50_seconds), `p99 ${seconds(view.p99_seconds)}`);
}

function remember(values, value) {
  values.push(value);
  if (values.length > POINTS) values.shift();
}

function showTiles(view) {
  const load = view.total;
  remember(history.out, load.generated_tokens_per_second);
  remember(history.in, load.prompt_tokens_per_second);
  remember(history.running, load.num_running);
  remember(history.kv, load.kv_usage);
  remember(history.percent, load.percent_of_optimal || 0);
  const ingress = view.ingress;
  byId("tiles").replaceChildren(
    tile("Tokens out", number(load.generated_tokens_per_second), "per second", history.out),
    tile("Tokens in", number(load.prompt_tokens_per_second), "per second", history.in),
    tile("Requests", String(load.num_running), `running, ${load.num_waiting} waiting`, history.running),
    tile("KV cache", `${(100 * load.kv_usage).toFixed(1)} %`, `${load.num_preemptions} preempted`, history.kv, 1),
    tile("Of the optimum", percent(load.percent_of_optimal), "last seconds", history.percent),
    latency("First token", ingress.time_to_first_token, ingress.window_seconds),
    latency("Per token", ingress.time_per_output_token, ingress.window_seconds),
  );
}

function showLosses(load) {
  const known = load.percent_of_optimal !== null;
  byId("optimum").textContent = known
    ? `${percent(load.percent_of_optimal)} of ${number(load.optimal_tokens_per_second)} tokens per second, over the last `
      + "seconds. An idle cluster loses all of it to having no requests, which is no fault."
    : "Unknown: no GEMM peak was measured on these replicas.";
  const parts = known ? [{ description: "useful tokens", percent: load.percent_of_optimal, colour: KEPT }]
    : [];
  load.losses.forEach((loss, i) => parts.push({ ...loss, colour: COLOURS[i % COLOURS.length] }));
  byId("waterfall").replaceChildren(...parts.map((part) => {
    const bar = element("span");
    bar.style.width = `${Math.min(100, part.percent)}%`;
    bar.style.background = part.colour;
    return bar;
  }));
  byId("losses").replaceChildren(...parts.map((part) => {
    const item = element("li");
    const mark = element("i");
    mark.style.background = part.colour;
    item.append(mark, element("span", part.description), element("b", percent(part.percent)));
    return item;
  }));
}

function replicaRow(replica) {
  const row = element("tr");
  const name = element("th", replica.id);
  name.scope = "row";
  row.append(name, element("td", replica.state, replica.state));
  const load = replica.load;
  if (load === null) {
    const detail = element("td", replica.detail || "", "detail");
    detail.colSpan = 8;
    row.append(detail);
    return row;
  }
  const kv = element("td");
  const meter = element("meter");
  meter.value = load.kv_usage;
  meter.high = 0.9;
  meter.optimum = 0;
  meter.setAttribute("aria-label", "KV cache in use");
  kv.append(meter, ` ${(100 * load.kv_usage).toFixed(0)} %`);
  const loss = load.losses[0];
  const ranks = element("td", String(replica.ranks.length));
  ranks.title = `processes ${replica.ranks.join(", ")} on ${replica.node}`;
  row.append(
    ranks,
    element("td", String(load.num_running), "number"), element("td", String(load.num_waiting), "number"), kv,
    element("td", number(load.prompt_tokens_per_second), "number"),
    element("td", number(load.generated_tokens_per_second), "number"),
    element("td", load.percent_of_optimal === null ? "-" : percent(load.percent_of_optimal), "number"),
    element("td", loss ? `${loss.description} ${percent(loss.percent)}` : ""),
  );
  return row;
}

function show(view) {
  byId("models").textContent = view.models.join(", ");
  document.title = `${view.models[0]} - nanoserve`;
  const restarts = `${view.num_restarts} restart${view.num_restarts === 1 ? "" : "s"}`;
  byId("summary").textContent = `${view.num_ready} of ${view.num_wanted} replicas ready, ${restarts}; `
    + `as of ${time(new Date(1000 * view.time))}`
    + (view.ingress.num_ingresses > 1 ? `; latencies of one of ${view.ingress.num_ingresses} ingresses` : "");
  byId("version").textContent = `Version ${view.version}.`;
  showTiles(view);
  showLosses(view.total);
  byId("replicas").replaceChildren(...view.replicas.map(replicaRow));
}

function trouble(error) {
  troubleSince = troubleSince || new Date();
  byId("trouble").hidden = false;
  byId("trouble").textContent = `No answer since ${time(troubleSince)} (${error.message}). Trying again every second; `
    + "the numbers below are the last ones known.";
}

async function look() {
  if (!document.hidden) {
    try {
      const answer = await fetch("/cluster", { signal: AbortSignal.timeout(TIMEOUT) });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      show(await answer.json());
      troubleSince = null;
      byId("trouble").hidden = true;
    } catch (error) {
      trouble(error);
    }
    if (Date.now() - pictureShown > PICTURE_PERIOD) record();
  }
  setTimeout(look, PERIOD);
}

function record() {
  pictureShown = Date.now();
  byId("record").disabled = true;
  byId("timeline").src = `/timeline.svg?at=${pictureShown}`;
}

byId("timeline").addEventListener("load", () => {
  byId("timeline").hidden = false;
  byId("record").disabled = false;
  byId("timeline-trouble").textContent = "";
});
byId("timeline").addEventListener("error", () => {
  byId("timeline").hidden = true;
  byId("record").disabled = false;
  byId("timeline-trouble").textContent = "No step could be recorded: no replica is ready.";
});
byId("record").addEventListener("click", record);
look();
