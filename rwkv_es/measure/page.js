"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const AXES = { step: ["Steps", "s"], elapsed: ["Time", "t"], tokens: ["Tokens", "k"] };
const KINDS = { all: "All", best: "Best", worst: "Worst", middle: "Middle" };
const state = { axis: "step", kind: "all", shown: data.runs.map(() => true), limit: 30, limitHeld: 6 };
const colour = (i) => `var(--c${i % 8})`;
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "g"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "colour") node.style.setProperty("--of", value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// ---- numbers and texts
function number(value, unit = "") {
  if (value === null || value === undefined) return "missing";
  if (typeof value !== "number") return String(value);
  if (unit === "bytes") return bytes(value);
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(2).replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}
function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (Math.abs(value) >= 1000 && i < 4) { value /= 1000; i += 1; }
  return `${Number(value.toPrecision(3))} ${units[i]}`;
}
function big(value) {
  for (const [size, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (value >= size) return `${Number((value / size).toPrecision(3))}${name}`;
  }
  return String(Math.round(value));
}
function duration(seconds) {
  const s = Math.round(seconds), h = Math.floor(s / 3600), m = Math.floor((s % 3600) / 60);
  return h ? `${h} h ${String(m).padStart(2, "0")}` : m ? `${m}:${String(s % 60).padStart(2, "0")} min` : `${s} s`;
}
const onAxis = { step: (x) => number(x), elapsed: duration, tokens: big };

// ---- curves
function niceTicks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const ticks = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-6; t += step) ticks.push(Number(t.toPrecision(12)));
  return ticks;
}
function timeTicks(high, count) {
  const step = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 604800]
    .find((s) => s >= high / count) || 604800;
  return Array.from({ length: Math.floor(high / step) + 1 }, (_, i) => i * step);
}
function linesOf(chart) {
  const lines = [];
  data.runs.forEach((run, r) => {
    if (!state.shown[r]) return;
    chart.names.forEach((name, n) => {
      const found = run.series[name];
      if (!found) return;
      const alone = data.runs.length === 1;
      lines.push({
        name, run: r, x: found.at.map((i) => run[state.axis][i]), y: found.values,
        spread: chart.band && run.series[chart.band] ? found.at.map((i) => at(run.series[chart.band], i)) : null,
        colour: colour(alone ? n : r), label: alone ? (chart.names.length > 1 ? name : "") : run.name,
      });
    });
  });
  return lines.filter((line) => line.y.length);
}
const at = (series, row) => { const i = series.at.indexOf(row); return i < 0 ? 0 : series.values[i]; };

function drawChart(figure, chart) {
  const lines = linesOf(chart), old = figure.querySelector("svg");
  figure.hidden = !lines.length;
  if (!lines.length) return;
  const width = Math.max(260, figure.clientWidth - 26), height = 190, left = 56, right = 10, top = 8, bottom = 22;
  const low = Math.min(...lines.flatMap((l) => l.y.map((v, i) => v - (l.spread ? l.spread[i] : 0))));
  const high = Math.max(...lines.flatMap((l) => l.y.map((v, i) => v + (l.spread ? l.spread[i] : 0))));
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  const most = chart.unit === "share" ? Math.max(1, high) : Infinity;  // no room above what can be
  const y0 = low >= 0 && low - room < 0 ? 0 : low - room, y1 = Math.min(high + room, most);
  const x1 = Math.max(1e-9, ...lines.flatMap((l) => l.x));
  const X = (x) => left + (width - left - right) * x / x1, Y = (y) => top + (height - top - bottom) * (1 - (y - y0) / (y1 - y0));
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": chart.title, height });
  for (const t of niceTicks(y0, y1, 4)) {
    svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: Y(t), y2: Y(t) }),
      make("text", { x: left - 7, y: Y(t) + 4, "text-anchor": "end" }, number(t, chart.unit)));
  }
  const ticks = state.axis === "elapsed" ? timeTicks(x1, width / 90) : niceTicks(0, x1, width / 90);
  for (const t of ticks) {
    if (state.axis === "step" && !Number.isInteger(t)) continue;
    const anchor = t === 0 ? "start" : X(t) > width - 30 ? "end" : "middle";
    svg.append(make("text", { x: X(t), y: height - 6, "text-anchor": anchor }, onAxis[state.axis](t)));
  }
  for (const line of lines) {
    const points = line.x.map((x, i) => [X(x), Y(line.y[i])]);
    if (line.spread) {
      const edge = (sign) => line.x.map((x, i) => `${X(x).toFixed(1)},${Y(line.y[i] + sign * line.spread[i]).toFixed(1)}`);
      svg.append(make("path", { class: "band", colour: line.colour, d: `M${edge(1).join("L")}L${edge(-1).reverse().join("L")}Z` }));
    }
    svg.append(make("path", { colour: line.colour, d: "M" + points.map((p) => p.map((v) => v.toFixed(1)).join(",")).join("L") }));
    if (points.length <= 24) points.forEach(([x, y]) => svg.append(make("circle", { colour: line.colour, cx: x, cy: y, r: 2.6 })));
  }
  const cursor = make("g");
  svg.append(cursor);
  old ? old.replaceWith(svg) : figure.append(svg);
  const read = figure.querySelector(".read");
  const xs = [...new Set(lines.flatMap((l) => l.x))].sort((a, b) => a - b);
  function show(x) {
    cursor.replaceChildren();
    const spans = lines.map((line) => {
      const i = x === null ? line.x.length - 1 : nearest(line.x, x);
      if (x !== null) cursor.append(make("circle", { colour: line.colour, cx: X(line.x[i]), cy: Y(line.y[i]), r: 4 }));
      return make("span", {}, make("i", { class: "dot", colour: line.colour }), `${line.label} ${number(line.y[i], chart.unit)}`.trim());
    });
    if (x !== null) cursor.prepend(make("line", { class: "cursor", x1: X(x), x2: X(x), y1: top, y2: height - bottom }));
    read.replaceChildren(x === null ? "now" : `${AXES[state.axis][0].toLowerCase()} ${onAxis[state.axis](x)}`, ...spans);
  }
  const follow = (event) => {
    const box = svg.getBoundingClientRect();
    show(xs[nearest(xs, ((event.clientX - box.left) * width / box.width - left) / (width - left - right) * x1)]);
  };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", () => show(null));
  let place = null;
  figure.onkeydown = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") { place = null; show(null); }
    if (!by) return;
    event.preventDefault();
    place = Math.min(xs.length - 1, Math.max(0, place === null ? (by > 0 ? 0 : xs.length - 1) : place + by));
    show(xs[place]);
  };
  figure.onblur = () => show(null);
  show(null);
}
function nearest(values, x) {
  let best = 0;
  values.forEach((v, i) => { if (Math.abs(v - x) <= Math.abs(values[best] - x)) best = i; });
  return best;
}
function drawCharts() {
  document.querySelectorAll("#charts figure").forEach((figure, i) => drawChart(figure, data.charts[i]));
}

// ---- answers
function marked(text, wanted) {
  if (!wanted) return [text];
  const parts = [], lower = text.toLowerCase();
  let from = 0;
  for (let i = lower.indexOf(wanted); i >= 0 && wanted; i = lower.indexOf(wanted, from)) {
    parts.push(text.slice(from, i), make("mark", {}, text.slice(i, i + wanted.length)));
    from = i + wanted.length;
  }
  return [...parts, text.slice(from)];
}
function said(sample, wanted) {
  if (!sample.turns) return make("pre", {}, ...marked(sample.completion, wanted));
  return make("pre", { class: "turns" }, ...sample.turns.map(([answer, reply, reward]) => make("div", {},
    make("span", {}, ...marked(answer.trim(), wanted)), make("span", { class: "reply" }, ...marked(reply.trim(), wanted)),
    ...(reward ? [make("b", {}, number(reward))] : []))));
}
function score(reward) {
  const kind = reward === null ? "bad" : reward >= 1 ? "good" : reward <= 0 ? "bad" : "";
  return make("span", { class: `score ${kind}` }, `reward ${number(reward)}`);
}
function runName(sample) {
  return data.runs.length > 1 ? [make("span", {}, make("i", { class: "dot", colour: colour(sample.run) }), ` ${data.runs[sample.run].name}`)] : [];
}
const samples = data.runs.flatMap((run, r) => run.samples.map((s) => ({ ...s, run: r })));
const matches = (wanted, ...texts) => !wanted || texts.some((text) => text.toLowerCase().includes(wanted));

function drawSamples() {
  const wanted = byId("find").value.trim().toLowerCase();
  const found = samples.filter((s) => s.kind !== "held out" && state.shown[s.run]
    && (state.kind === "all" || s.kind === state.kind) && matches(wanted, s.prompt, s.completion)).reverse();
  byId("found").textContent = `${found.length} answers${wanted ? ` with “${byId("find").value.trim()}”` : ""}, the newest first`;
  const nodes = found.slice(0, state.limit).map((s) => make("article", { class: "answer" },
    make("div", { class: "head" }, score(s.reward), make("span", {}, `${s.kind} of step ${s.step}`), ...runName(s)),
    make("pre", { class: "prompt" }, ...marked(s.prompt, wanted)), said(s, wanted)));
  byId("samples").replaceChildren(...nodes, ...more(found.length, "limit", drawSamples));
}
function drawHeld() {
  const wanted = byId("find-held").value.trim().toLowerCase(), groups = new Map();
  for (const s of samples.filter((one) => one.kind === "held out" && state.shown[one.run])) {
    const key = `${s.run} ${s.prompt}`;
    groups.set(key, [...(groups.get(key) || []), s]);
  }
  const found = [...groups.values()].filter((g) => matches(wanted, ...g.flatMap((s) => [s.prompt, s.completion])));
  const nodes = found.slice(0, state.limitHeld).map((group) => {
    const first = group[0], last = group[group.length - 1];
    const side = (s, words) => make("div", {}, make("div", { class: "head" }, make("span", {}, words), score(s.reward)),
      said(s, wanted));
    const sides = group.length > 1 ? [side(first, first.step ? `after step ${first.step}` : "before"), side(last, `after step ${last.step}`)]
      : [side(first, `after step ${first.step}`)];
    return make("article", { class: "answer" }, make("div", { class: "head" }, ...runName(first)),
      make("pre", { class: "prompt" }, ...marked(first.prompt, wanted)), make("div", { class: "pair" }, ...sides));
  });
  const none = make("p", { class: "dim" }, wanted ? "Nothing found." : "No held-out answers are noted yet.");
  byId("held").replaceChildren(...(nodes.length ? nodes : [none]), ...more(found.length, "limitHeld", drawHeld));
}
function more(count, which, draw) {
  if (count <= state[which]) return [];
  return [make("button", { class: "more", onclick: () => { state[which] *= 3; draw(); } }, `Show more (${count - state[which]})`)];
}

// ---- tables
function drawSummary() {
  byId("summary").replaceChildren(...data.runs.map((run, r) => {
    const last = (name) => (run.series[name] ? run.series[name].values.at(-1) : null);
    const tile = (title, value, small = "") => (value === null || value === undefined ? [] :
      [make("div", {}, make("dt", {}, title), make("dd", {}, value, make("small", {}, small)))]);
    const held = run.before === null && run.best === null ? null : number(run.best ?? run.before);
    const arrow = run.before !== null && run.best !== null && run.best_step ? ` from ${number(run.before)}` : "";
    const speed = last("tokens_per_s"), memory = last("peak_memory_bytes"), gpu = last("peak_gpu_memory_bytes");
    return make("div", { class: "run" },
      make("h3", {}, ...(data.runs.length > 1 ? [make("i", { class: "dot", colour: colour(r) })] : []), run.name,
        make("span", { class: `state ${run.state}` }, run.state), make("span", { class: "dim unit" }, run.about)),
      make("dl", { class: "tiles" },
        ...tile("Best held-out reward", held, arrow),
        ...tile("Steps", number(run.steps), ` of ${number(run.planned)}`),
        ...tile("Reward of the members", last("reward_mean") === null ? null : number(last("reward_mean"))),
        ...tile("Time", run.elapsed.length ? duration(run.elapsed.at(-1)) : null),
        ...tile("Tokens", run.tokens.length ? big(run.tokens.at(-1)) : null),
        ...tile("Tokens a second", speed === null ? null : number(Math.round(speed))),
        ...tile("Peak memory", memory === null ? null : bytes(memory)),
        ...tile("Peak GPU memory", gpu === null ? null : bytes(gpu))));
  }));
}
function drawTables() {
  const heads = data.runs.length > 1 ? data.runs.map((run) => make("th", {}, run.name)) : [make("th", {}, "Value")];
  const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.series)))];
  byId("numbers").replaceChildren(make("table", {},
    make("thead", {}, make("tr", {}, make("th", {}, "Name"), ...heads, make("th", {}, "What it is"))),
    make("tbody", {}, ...names.map((name) => make("tr", {}, make("th", {}, name),
      ...data.runs.map((run) => make("td", { class: "num" }, run.series[name] ? number(run.series[name].values.at(-1), (data.glossary[name] || {}).unit) : "–")),
      make("td", { class: "dim about" }, (data.glossary[name] || {}).meaning || ""))))));
  const keys = [...new Set(data.runs.flatMap((run) => Object.keys(run.options)))];
  const text = (run, key) => (key in run.options ? run.options[key] : "–");
  byId("options").replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, make("th", {}, "Option"), ...heads)),
    make("tbody", {}, ...keys.map((key) => make("tr", { class: new Set(data.runs.map((run) => text(run, key))).size > 1 ? "differs" : "" },
      make("th", {}, key), ...data.runs.map((run) => make("td", {}, text(run, key))))))));
}

// ---- controls
function segments(id, choices, key, draw) {
  const buttons = Object.entries(choices).map(([value, title]) => make("button", {
    role: "radio", "aria-checked": state[key] === value, "data-value": value,
    onclick: () => choose(id, key, value, draw),
    onkeydown: (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      const next = by && buttons[buttons.indexOf(event.currentTarget) + by];
      if (next) { next.focus(); next.click(); event.preventDefault(); }
    },
  }, title));
  byId(id).append(...buttons);
}
function choose(id, key, value, draw) {
  state[key] = value;
  byId(id).querySelectorAll("button").forEach((b) => b.setAttribute("aria-checked", b.dataset.value === value));
  draw();
}
segments("axis", Object.fromEntries(Object.entries(AXES).map(([k, v]) => [k, v[0]])), "axis", drawCharts);
segments("kinds", KINDS, "kind", drawSamples);
if (data.runs.length > 1) {
  byId("runs").append(...data.runs.map((run, r) => make("button", {
    "aria-pressed": "true",
    onclick: (event) => {
      state.shown[r] = !state.shown[r];
      event.currentTarget.setAttribute("aria-pressed", state.shown[r]);
      drawCharts(); drawSamples(); drawHeld();
    },
  }, make("i", { class: "dot", colour: colour(r) }), run.name)));
}
byId("charts").append(...data.charts.map((chart) => make("figure", { tabindex: "0" },
  make("figcaption", {}, chart.title, make("span", { class: "unit" }, chart.unit && chart.unit !== "bytes" ? ` · ${chart.unit}` : "")),
  make("div", { class: "read" }))));
byId("find").addEventListener("input", () => { state.limit = 30; drawSamples(); });
byId("find-held").addEventListener("input", () => { state.limitHeld = 6; drawHeld(); });
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input");
  if (typing && event.key === "Escape") event.target.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const axis = Object.keys(AXES).find((name) => AXES[name][1] === event.key);
  if (axis) choose("axis", "axis", axis, drawCharts);
  if (event.key === "/") { event.preventDefault(); byId("find").focus(); }
});
let width = 0;
new ResizeObserver(() => {
  if (document.body.clientWidth !== width) { width = document.body.clientWidth; drawCharts(); }
}).observe(document.body);
drawSummary(); drawTables(); drawHeld(); drawSamples();
