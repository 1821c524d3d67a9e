// Live charts, drawn as SVG: the last minutes of one or two values, with what they are now.
import { element } from "./markdown.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300, HEIGHT = 56;
export const POINTS = 120;

function svg(name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

const FORMATS = {
  count: (v) => String(Math.round(v)),
  rate: (v) => (v >= 100 ? v.toFixed(0) : v.toFixed(1)),
  share: (v) => `${(v * 100).toFixed(v > 0 && v < 0.1 ? 1 : 0)} %`,
  time: (v) => (v >= 1 ? `${v.toFixed(2)} s` : v >= 0.1 ? `${(v * 1000).toFixed(0)} ms` : `${(v * 1000).toFixed(1)} ms`),
};

/** The next of 1, 2, 5, 10, … that is at least this. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

/** One card. series: [{ key, name }], one or two, in the order of importance. format: count, rate, share or time. */
export class Chart {
  constructor({ title, series, format, about }) {
    Object.assign(this, { series, format: FORMATS[format], title });
    this.fixed = format === "share" ? 1 : null;
    this.least = { count: 4, rate: 10, time: 0.01 }[format];
    this.history = series.map(() => []);
    this.areas = series.map((_, i) => svg("path", { class: `area s${i}` }));
    this.paths = series.map((_, i) => svg("path", { class: `line s${i}`, "vector-effect": "non-scaling-stroke" }));
    this.cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden", "vector-effect": "non-scaling-stroke" });
    this.plot = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.plot.append(svg("line", { class: "base", x1: 0, x2: WIDTH, y1: HEIGHT - 0.5, y2: HEIGHT - 0.5, "vector-effect": "non-scaling-stroke" }), this.areas[0], ...this.paths, this.cursor);
    this.values = series.map((one, i) => element("span", { class: `value s${i}` }, "–"));
    const legend = series.map((one, i) => element("span", { class: `key s${i}` }, element("span", { class: "name" }, one.name), this.values[i]));
    this.top = element("span", { class: "top" });
    this.node = element("section", { class: "card", title: about }, element("div", { class: "card-head" }, element("h3", {}, title), element("div", { class: "keys" }, ...legend)), element("div", { class: "plot" }, this.plot, this.top));
    this.node.hidden = true;
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.point(null));
  }

  /** Takes the newest values. A server that does not report the first one has no such card. */
  push(values) {
    this.node.hidden = values[this.series[0].key] === undefined;
    if (this.node.hidden) return;
    this.series.forEach((one, i) => {
      this.history[i].push(values[one.key] ?? null);
      if (this.history[i].length > POINTS) this.history[i].shift();
    });
    this.draw();
  }

  draw() {
    const all = this.history.flat().filter((value) => value !== null);
    const most = this.fixed ?? Math.max(this.least, roundUp(Math.max(...all, 1e-9)));
    const x = (index, length) => WIDTH * (1 - (length - 1 - index) / (POINTS - 1));
    const y = (value) => HEIGHT - 1 - (Math.min(value, most) / most) * (HEIGHT - 4);
    this.history.forEach((values, i) => {
      let line = "", pen = "M", area = "", first = null;
      values.forEach((value, index) => {
        if (value === null) { pen = "M"; return; }
        const at = `${x(index, values.length).toFixed(1)} ${y(value).toFixed(1)}`;
        if (pen === "M" && first !== null) area += `V${HEIGHT}Z`;
        if (pen === "M") { first = x(index, values.length); area += `M${first.toFixed(1)} ${HEIGHT}L${at}`; } else area += `L${at}`;
        line += `${pen}${at}`;
        if (pen === "M") line += "h0.01"; // a single point is seen too
        pen = "L";
      });
      if (first !== null) area += `L${x(values.length - 1 - [...values].reverse().findIndex((v) => v !== null), values.length).toFixed(1)} ${HEIGHT}Z`;
      this.paths[i].setAttribute("d", line);
      if (i === 0) this.areas[0].setAttribute("d", area);
    });
    this.top.textContent = this.format(most);
    this.show(this.at ?? this.history[0].length - 1);
  }

  show(index) {
    const texts = this.history.map((values) => (values[index] == null ? "–" : this.format(values[index])));
    texts.forEach((text, i) => { this.values[i].textContent = text; });
    this.plot.setAttribute("aria-label", `${this.title}: ${this.series.map((one, i) => `${one.name} ${texts[i]}`).join(", ")}`);
  }

  /** Shows the values under the pointer instead of the newest ones. */
  point(event) {
    const length = this.history[0].length;
    this.at = null;
    if (event && length) {
      const box = this.plot.getBoundingClientRect();
      const index = Math.round(((event.clientX - box.left) / box.width) * (POINTS - 1)) - (POINTS - length);
      if (index >= 0 && index < length) this.at = index;
    }
    this.cursor.setAttribute("visibility", this.at === null ? "hidden" : "visible");
    if (this.at !== null) {
      const x = WIDTH * (1 - (length - 1 - this.at) / (POINTS - 1));
      this.cursor.setAttribute("x1", x);
      this.cursor.setAttribute("x2", x);
    }
    if (length) this.show(this.at ?? length - 1);
  }
}

export const CHARTS = [
  { title: "Requests", format: "count", series: [{ key: "running", name: "running" }, { key: "waiting", name: "waiting" }], about: "Sequences in the engine's steps, and those that wait for a place" },
  { title: "Tokens/s", format: "rate", series: [{ key: "generated", name: "generated" }, { key: "prompt", name: "prompt" }], about: "Tokens generated, and prompt tokens computed" },
  { title: "Time to first token", format: "time", series: [{ key: "ttft", name: "p50" }, { key: "ttftWorst", name: "p95" }], about: "Median and 95th percentile of the last ten seconds' requests" },
  { title: "Between tokens", format: "time", series: [{ key: "itl", name: "p50" }, { key: "itlWorst", name: "p95" }], about: "From a token to the next: median and 95th percentile of the last ten seconds" },
  { title: "KV cache in use", format: "share", series: [{ key: "kv", name: "" }], about: "Share of the KV cache's blocks" },
  { title: "Prefix cache hits", format: "share", series: [{ key: "prefix", name: "" }], about: "Share of prompt tokens that had been computed before" },
  { title: "Speculation accepted", format: "share", series: [{ key: "accepted", name: "" }], about: "Share of proposed tokens that the model confirmed" },
  { title: "Answers from the cache", format: "share", series: [{ key: "cached", name: "" }], about: "Share of requests that the response cache answered" },
];
