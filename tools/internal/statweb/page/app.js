"use strict";

// Everything shown comes from other processes: it is set as text, never as markup.

const $ = id => document.getElementById(id);
const svgNS = "http://www.w3.org/2000/svg";

function el(tag, cls, text) {
  const e = document.createElement(tag);
  if (cls) e.className = cls;
  if (text !== undefined) e.textContent = text;
  return e;
}

function svg(tag, attrs) {
  const e = document.createElementNS(svgNS, tag);
  for (const k in attrs) e.setAttribute(k, attrs[k]);
  return e;
}

function si(n, unit) {
  const prefixes = ["", "k", "M", "G", "T", "P"];
  let i = 0;
  while (n >= 999.5 && i < prefixes.length - 1) { n /= 1000; i++; }
  const digits = n >= 99.95 || (i === 0 && Number.isInteger(n)) ? 0 : n >= 9.995 ? 1 : i === 0 ? 1 : 2;
  return n.toFixed(digits) + (unit || i ? "\u202f" : "") + prefixes[i] + (unit || "");
}

// Numbers above 2^53 come as strings of digits.
const grouped = n => String(n).replace(/\B(?=(\d{3})+$)/g, "\u202f");

function nice(max) {
  if (!(max > 0)) return 1;
  const p = 10 ** Math.floor(Math.log10(max));
  for (const m of [1, 2, 4, 5, 10]) if (m * p >= max) return m * p;
  return 10 * p;
}

const plots = [
  { title: "Frames per second", rx: "rx_frames", tx: "tx_frames", unit: "" },
  { title: "Bits per second", rx: "rx_bits", tx: "tx_bits", unit: "bit" },
  { title: "Ring slots in use, mean", rx: "rx_used", tx: "tx_used", unit: "", ring: true },
  { title: "Frames lost per second", rx: "rx_lost", tx: "tx_lost", unit: "" },
];

const W = 400, H = 132, left = 46, right = 6, above = 8, below = 20;

// A Plot is one chart of one device. It is made once and drawn again.
class Plot {
  constructor(kind) {
    this.kind = kind;
    this.root = el("div", "plot");
    this.root.append(el("h3", "", kind.title));
    const now = el("div", "now");
    this.now = {};
    this.label = {};
    for (const dir of ["rx", "tx"]) {
      const span = el("span", dir);
      span.append(el("i"), this.label[dir] = el("span", "", dir), " ");
      this.now[dir] = el("b", "", "–");
      span.append(this.now[dir]);
      now.append(span);
    }
    this.when = el("span", "when");
    now.append(this.when);
    this.svg = svg("svg", { role: "img", "aria-label": kind.title, tabindex: 0 });
    this.frame = svg("g");
    this.area = {}; this.line = {}; this.dot = {};
    this.svg.append(this.frame);
    for (const dir of ["rx", "tx"]) this.svg.append(this.area[dir] = svg("path", { class: "area " + dir }));
    for (const dir of ["rx", "tx"]) this.svg.append(this.line[dir] = svg("path", { class: "line " + dir }));
    this.svg.append(this.cross = svg("line", { class: "cross", y1: above, y2: H - below }));
    for (const dir of ["rx", "tx"]) this.svg.append(this.dot[dir] = svg("circle", { class: dir, r: 4 }));
    this.svg.addEventListener("pointermove", e => this.point(e.clientX - this.svg.getBoundingClientRect().left));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("blur", () => this.leave());
    this.svg.addEventListener("keydown", e => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
      if (!step || !this.samples.length) return;
      e.preventDefault();
      const i = this.at === null ? this.samples.length - 1 : this.at + step;
      this.select(Math.min(Math.max(i, 0), this.samples.length - 1));
    });
    this.root.append(now, this.svg);
    this.samples = [];
    this.at = null;
  }

  // draw draws samples. Of a frontend's receive ring, posted, the slots in use are
  // buffers that wait for frames: there a full ring is at rest, where a full transmit
  // ring is saturated, so it has another line and another word.
  draw(series, samples, span, posted) {
    const k = this.kind, w = this.svg.clientWidth || W;
    posted = !!k.ring && posted;
    this.root.classList.toggle("posted", posted);
    this.label.rx.textContent = posted ? "rx posted" : "rx";
    this.label.rx.title = posted ? "buffers that wait for frames: all of them, when nothing is received" : "";
    this.samples = samples;
    this.end = samples.length ? samples[samples.length - 1].t : 0;
    let max = 0;
    for (const s of samples) max = Math.max(max, s[k.rx], s[k.tx]);
    if (k.ring) max = Math.max(series.rx_size, series.tx_size, 1);
    const top = k.ring ? max : nice(max);
    this.x = t => left + (w - left - right) * (1 - (this.end - t) / span);
    this.y = v => above + (H - above - below) * (1 - v / top);

    this.frame.replaceChildren();
    for (const f of [0, .5, 1]) {
      const y = this.y(f * top);
      this.frame.append(svg("line", { class: f ? "grid" : "base", x1: left, x2: w - right, y1: y, y2: y }));
      const label = svg("text", { x: left - 6, y: y + 4, "text-anchor": "end" });
      label.textContent = k.ring || max > 0 || !f ? si(f * top).replace(/\.0+(?!\d)/, "") : ""; // no scale for nothing
      this.frame.append(label);
    }
    this.blind = k.ring && !series.ring;
    if (this.blind) {
      const label = svg("text", { x: (left + w - right) / 2, y: this.y(top / 2) - 6, "text-anchor": "middle" });
      label.textContent = "not measured yet";
      this.frame.append(label);
      this.samples = samples = [];
    }
    for (const [f, anchor] of [[0, "start"], [.5, "middle"], [1, "end"]]) {
      const label = svg("text", { x: left + (w - left - right) * f, y: H - 4, "text-anchor": anchor });
      label.textContent = f === 1 ? "now" : "−" + ago(span * (1 - f));
      this.frame.append(label);
    }
    for (const dir of ["rx", "tx"]) {
      const points = samples.map(s => this.x(s.t).toFixed(1) + "," + this.y(s[k[dir]]).toFixed(1));
      this.line[dir].setAttribute("d", points.length > 1 ? "M" + points.join("L") : "");
      const close = points.length > 1 ? "L" + this.x(this.end) + "," + this.y(0) + "L" + this.x(samples[0].t) + "," + this.y(0) + "Z" : "";
      this.area[dir].setAttribute("d", close && "M" + points.join("L") + close);
    }
    if (this.at === null || this.at >= samples.length) this.leave(); else this.select(this.at);
  }

  show(s) {
    for (const dir of ["rx", "tx"]) this.now[dir].textContent = s ? si(s[this.kind[dir]], this.kind.unit) : "–";
  }

  leave() {
    this.at = null;
    this.svg.classList.remove("on");
    this.when.textContent = "";
    this.show(this.samples[this.samples.length - 1]);
  }

  point(x) {
    let best = 0;
    this.samples.forEach((s, i) => {
      if (Math.abs(this.x(s.t) - x) < Math.abs(this.x(this.samples[best].t) - x)) best = i;
    });
    if (this.samples.length) this.select(best);
  }

  select(i) {
    const s = this.samples[this.at = i], x = this.x(s.t);
    this.cross.setAttribute("x1", x);
    this.cross.setAttribute("x2", x);
    for (const dir of ["rx", "tx"]) {
      this.dot[dir].setAttribute("cx", x);
      this.dot[dir].setAttribute("cy", this.y(s[this.kind[dir]]));
    }
    this.svg.classList.add("on");
    this.when.textContent = "at " + new Date(s.t * 1000).toLocaleTimeString();
    this.show(s);
  }
}

function ago(seconds) {
  if (seconds < 59.5) return (seconds < 10 && seconds % 1 ? seconds.toFixed(1) : Math.round(seconds)) + "\u202fs";
  const m = seconds / 60;
  if (m >= 60) return Math.round(m / 60) + "\u202fh";
  return (m % 1 ? m.toFixed(1) : m) + "\u202fmin";
}

// A Card is one device.
class Card {
  constructor() {
    this.root = el("section", "device");
    const top = el("div", "top");
    this.name = el("h2");
    this.pill = el("span", "pill");
    this.who = el("span", "who");
    this.queue = el("select");
    this.queue.setAttribute("aria-label", "queue");
    this.queue.addEventListener("change", () => this.drawPlots());
    top.append(this.name, this.pill, this.who, this.queue);
    this.place = el("p", "place");
    this.losses = el("p", "losses");
    this.box = el("div", "plots");
    this.plots = plots.map(k => new Plot(k));
    this.box.append(...this.plots.map(p => p.root));
    this.events = el("ul", "events");
    this.details = el("details");
    this.table = el("tbody");
    const scroll = el("div", "scroll"), t = el("table"), head = el("tr");
    for (const [h, c] of [["", ""], ["frames", "n"], ["bytes", "n"], ["lost", "n"], ["notified", "n"], ["ring", "n"], ["most", "n"], ["", ""]]) head.append(el("th", c, h));
    t.append(el("thead"), this.table);
    t.tHead.append(head);
    scroll.append(t);
    this.details.append(el("summary", "", "Totals of each queue"), scroll);
    this.root.append(top, this.place, this.losses, this.box, this.events, this.details);
    this.series = new Map();
  }

  update(d, now) {
    this.name.textContent = d.vif + (d.foreign ? ` of user ${d.source.uid ?? "unknown"}` : "");
    this.front = d.role === "frontend";
    const s = d.status;
    let text = "counters only", cls = "";
    if (d.error) { text = "cannot be read"; cls = "bad"; }
    else if (s) {
      text = s.state.replace("XenbusState", "");
      if (s.stale) { text = "stale: was " + text; cls = "bad"; }
      else if (s.up) { text += ", up"; cls = "good"; }
    }
    if (d.torn) text += ", torn";
    this.pill.textContent = text;
    this.pill.className = "pill " + cls;
    this.who.textContent = d.role ? `${d.role} in domain ${d.own_domain}, vif ${d.handle}, other end in domain ${d.peer_domain}` : "";
    const place = [];
    if (d.error) place.push(d.error);
    if (s) {
      place.push(`counters in ${s.mirror}` + (s.mirror_reason ? ` (${s.mirror_reason})` : ""), d.source.path || "map " + d.source.map_id,
        `process ${s.pid}`, `heartbeat ${ago(Math.max(0, Math.round(s.heartbeat_age_seconds * 10) / 10))} ago`,
        `MAC ${s.mac}`, `MTU ${s.mtu}`, ...s.features);
    } else if (!d.error) place.push("counters in " + d.source.path + "/metrics");
    this.place.textContent = place.join(" · ");

    const lost = [];
    for (const [name, n] of Object.entries(d.totals ? d.totals.counters : {})) {
      const m = /^([rt]x)_drop_(.*)$/.exec(name);
      if (m && n) lost.push(`${m[1]} ${m[2].replaceAll("_", " ")} ${grouped(n)}`);
    }
    this.losses.hidden = !lost.length;
    this.losses.textContent = "Lost: " + lost.join(", ");

    this.events.replaceChildren(...(d.events || []).slice(-3).reverse().map(e => {
      const state = n => (["Unknown", "Initialising", "InitWait", "Initialised", "Connected", "Closing", "Closed", "Reconfiguring", "Reconfigured"][n] || n);
      const what = e.kind === "state" ? `${state(e.a)} → ${state(e.b)}` : e.kind === "tamper" ? `${e.a} words written by somebody else were healed` : `${e.a}, ${e.b}`;
      return el("li", "", `${new Date(e.time).toLocaleTimeString()}  ${e.kind}${e.queue >= 0 ? " on queue " + e.queue : ""}: ${what}`);
    }));

    const rows = [];
    for (const q of d.queues || []) {
      const c = q.counters, used = q.queue === 0 || q.queue < (s ? s.queues_in_use : 0) || c.rx_packets || c.tx_packets;
      if (!used) continue;
      for (const dir of ["rx", "tx"]) {
        const row = el("tr"), lost = BigInt(c[dir + "_dropped"]) + BigInt(c[dir + "_errors"]);
        row.append(el("td", "", `${dir} ${q.queue}`));
        for (const n of [c[dir + "_packets"], c[dir + "_bytes"], lost, c[dir + "_notifies_sent"]]) row.append(el("td", "n", grouped(n)));
        row.append(el("td", "n", `${q.gauges[dir + "_ring_used"]} of ${q.gauges[dir + "_ring_size"]}` + (this.front && dir === "rx" ? " posted" : "")), el("td", "n", q.gauges[dir + "_ring_used_max"]), el("td"));
        rows.push(row);
      }
    }
    this.table.replaceChildren(...rows);
    this.details.hidden = this.box.hidden = !!d.error;
  }

  // take keeps the samples of one series.
  take(series, kept) {
    const old = this.series.get(series.queue);
    const samples = old ? old.samples : [];
    for (const s of series.samples) {
      s.t = Date.parse(s.time) / 1000;
      if (!samples.length || s.t > samples[samples.length - 1].t) samples.push(s);
    }
    samples.splice(0, samples.length - kept);
    this.series.set(series.queue, { ...series, samples });
    if (this.queue.options.length !== this.series.size) {
      const chosen = this.queue.value;
      this.queue.replaceChildren(...[...this.series.keys()].map(q => new Option(q < 0 ? "all queues" : "queue " + q, q)));
      if (chosen) this.queue.value = chosen;
      this.queue.hidden = this.series.size <= 2;
    }
  }

  drawPlots() {
    const series = this.series.get(Number(this.queue.value));
    if (!series) return;
    const s = series.samples;
    const seen = s.length > 1 ? s[s.length - 1].t - s[0].t : 0;
    const span = [60, 120, 300, 600, 1800, 3600].find(n => n >= seen && n >= 60 * interval) || Math.max(seen, 60 * interval);
    for (const p of this.plots) p.draw(series, s, Math.min(span, Math.max(60 * interval, kept * interval)), this.front);
  }
}

const hints = {
  "moving": "as many frames moved while the two ends were read",
  "in flight": "they are in the ring, or received and not yet counted in public",
  "not shown yet": "the receiver has counted them; the sender shows its counters every 32 frames and before it sleeps",
  "lost with a connection": "they were unanswered when a connection ended: nobody knows whether they arrived",
  "unequal": "the ring cannot hold so many: one end has counted for longer, or frames were lost uncounted",
};

const cards = new Map();
let interval = 1, kept = 300, since = "", paused = false, timer;

// Devices are told apart as the server does it: two sources may have one name.
const keyOf = d => d.vif + " " + d.source.kind + " " + (d.source.path || "");

// The token comes behind the # of the address, which no server sees, and stays with
// this tab.
function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given === null) return;
  sessionStorage.setItem("token", given);
  history.replaceState(null, "", location.pathname);
}

async function ask(path) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: "Bearer " + token } : {};
  const r = await fetch(path, { headers, signal: AbortSignal.timeout(5000) });
  if (r.status === 401) throw new Error("it wants the token: put #token=… behind the address of this page, as barevif stat printed it");
  if (!r.ok) throw new Error(`${path}: ${r.status}`);
  return r;
}

const get = async path => (await ask(path)).json();

// A link sends no token.
for (const a of document.querySelectorAll("nav a")) a.addEventListener("click", async e => {
  if (!sessionStorage.getItem("token")) return;
  e.preventDefault();
  try {
    const text = await (await ask(a.getAttribute("href"))).text();
    location.assign(URL.createObjectURL(new Blob([text], { type: "text/plain" })));
  } catch (err) { trouble(err); }
});

function trouble(err) {
  $("trouble").hidden = false;
  $("trouble").textContent = "The server does not answer: " + err.message + ". Trying again.";
}

async function refresh() {
  try {
    const [look, history] = await Promise.all([get("stat.json"), get("history.json" + (since && "?since=" + encodeURIComponent(since)))]);
    show(look, history);
    const says = [...look.errors];
    if (look.hidden) says.push(`not shown: ${look.hidden} of other users (--all-users)`);
    $("trouble").hidden = !says.length;
    $("trouble").textContent = says.join("; ");
  } catch (err) { trouble(err); }
  if (!paused) timer = setTimeout(refresh, 1000 * Math.max(interval, .25));
}

function show(look, history) {
  interval = history.interval_seconds;
  kept = history.kept;
  const now = new Date(look.time);
  const up = look.devices.filter(d => d.status && d.status.up && !d.status.stale).length;
  $("summary").textContent = `${look.devices.length} ${look.devices.length === 1 ? "device" : "devices"}, ${up} up · ${now.toLocaleTimeString()}`;
  $("none").hidden = look.devices.length > 0;

  const there = new Set();
  for (const d of look.devices) {
    const key = keyOf(d);
    there.add(key);
    let card = cards.get(key);
    if (!card) cards.set(key, card = new Card());
    if ($("devices").children[there.size - 1] !== card.root) $("devices").insertBefore(card.root, $("devices").children[there.size - 1] || null);
    card.update(d, now);
  }
  for (const [key, card] of cards) if (!there.has(key)) { card.root.remove(); cards.delete(key); }
  for (const s of history.series) {
    const card = cards.get(s.vif + " " + s.source);
    if (!card) continue;
    card.take(s, kept);
    const last = s.samples[s.samples.length - 1];
    if (last && (!since || Date.parse(last.time) > Date.parse(since))) since = last.time;
  }
  for (const card of cards.values()) card.drawPlots();

  const flows = look.pairs.flatMap(p => p.flows);
  $("balance").hidden = !flows.length;
  $("flows").replaceChildren(...flows.map(f => {
    const row = el("tr");
    row.append(el("td", "", f.from), el("td", "", f.to));
    for (const what of ["sent", "received", "dropped"]) {
      const cell = el("td", "n", grouped(f[what]));
      cell.dataset.label = what; // where there is no room for the head of the table
      row.append(cell);
    }
    const verdict = el("td"), n = grouped(Math.abs(f.verdict_frames)), good = f.verdict === "balanced" || f.verdict === "moving";
    const words = { "balanced": "✓ balanced", "moving": `✓ balanced to ${n}, moving`, "unequal": `unequal by ${f.verdict_frames}` };
    const pill = el("span", "pill " + (good ? "good" : f.verdict === "unequal" ? "bad" : "calm"), words[f.verdict] || `${n} ${f.verdict}`);
    pill.title = hints[f.verdict] || "";
    verdict.append(pill);
    row.append(verdict);
    return row;
  }));
}

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", paused);
  $("pause").textContent = paused ? "Go on" : "Pause";
  clearTimeout(timer);
  if (!paused) refresh();
});
addEventListener("hashchange", takeToken);
addEventListener("resize", () => { for (const card of cards.values()) card.drawPlots(); });
takeToken();
refresh();
