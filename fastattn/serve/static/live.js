// Polls the server while the page is seen: its state, and the values of the charts.
import { CHARTS, Chart } from "./charts.js";
import { ApiError, call } from "./client.js";
import { figures, parse } from "./metrics.js";

const EVERY_MS = 2000;
const WINDOW_SECONDS = 10; // rates and shares are of this long

export class Live {
  /** onState(state, text): "ok", "down" or "key", and what to say. */
  constructor(node, note, getKey, onState) {
    Object.assign(this, { note, getKey, onState });
    this.samples = [];
    this.charts = CHARTS.map((chart) => new Chart(chart));
    node.append(...this.charts.map((chart) => chart.node));
    document.addEventListener("visibilitychange", () => this.poll());
  }

  async poll() {
    clearTimeout(this.timer);
    if (document.hidden || this.busy) return;
    this.busy = true;
    try {
      await this.sample();
      this.onState("ok", "ready");
      this.note.textContent = "";
    } catch (error) {
      await this.explain(error);
    }
    this.busy = false;
    this.timer = setTimeout(() => this.poll(), EVERY_MS);
  }

  async sample() {
    const answer = await call("metrics", { key: this.getKey(), cache: "no-store" });
    const now = { seconds: performance.now() / 1000, metrics: parse(await answer.text()) };
    this.samples = [...this.samples.filter((one) => now.seconds - one.seconds <= WINDOW_SECONDS), now];
    const values = figures(now, this.samples[0]);
    for (const chart of this.charts) chart.push(values);
  }

  /** No metrics: because the server is away, because it wants a key, or because this key may not see them. */
  async explain(error) {
    if (!(error instanceof ApiError)) {
      this.onState("down", "not reachable");
    } else if (error.status === 401) {
      this.onState("key", "wants an API key");
    } else {
      this.onState("ok", "ready");
      this.note.textContent = error.message;
    }
  }
}
