// One message on the page: its text, and under an answer where it came from and how fast.
import { MarkdownView, copyText, element } from "./markdown.js";

const CACHE = { hit: "from the cache", joined: "shared with another request", semantic: "from a like question", miss: "not cached", bypass: "cache not asked" };

const time = (ms) => (ms >= 1000 ? `${(ms / 1000).toFixed(2)} s` : `${ms < 10 ? ms.toFixed(1) : ms.toFixed(0)} ms`);

export class Message {
  constructor(role, text = "") {
    this.role = role;
    this.text = text;
    this.body = element("div", { class: "text" });
    this.meta = element("div", { class: "meta" });
    this.node = element("article", { class: `message ${role}`, "aria-label": role === "user" ? "You" : "Answer" }, this.body, role === "user" ? null : this.meta);
    this.view = role === "user" ? null : new MarkdownView(this.body);
    if (role === "user") this.body.textContent = text;
    else if (text) this.view.set(text);
  }

  /** The answer has begun to be asked for. */
  wait() {
    this.start = performance.now();
    this.node.classList.add("waiting");
    this.node.setAttribute("aria-busy", "true");
  }

  append(text) {
    this.first ??= performance.now();
    this.last = performance.now();
    this.text += text;
    this.node.classList.remove("waiting");
    this.draw();
  }

  /** Draws at the next frame, and not more often than a quarter of the time allows: long answers take longer to draw. */
  draw() {
    if (this.drawing) return;
    this.drawing = true;
    setTimeout(() => requestAnimationFrame(() => {
      const start = performance.now();
      this.drawing = false;
      this.view.set(this.text);
      this.cost = performance.now() - start;
      this.ondraw?.();
    }), (this.cost ?? 0) * 3);
  }

  end({ headers, usage, finish, stopped, error, onAgain }) {
    this.node.classList.remove("waiting");
    this.node.removeAttribute("aria-busy");
    this.view.set(this.text);
    if (error) this.meta.before(element("p", { class: "error", role: "alert" }, error)); // apart from the text, which may be drawn once more
    this.meta.replaceChildren(...this.chips(headers, usage, finish, stopped).filter(Boolean), this.actions(onAgain));
    this.ondraw?.();
  }

  chips(headers, usage, finish, stopped) {
    const chip = (text, title, kind = "") => text && element("span", { class: `chip ${kind}`, title }, text);
    const cache = headers?.get("x-fastattn-cache") ?? "";
    const cacheKind = cache.split(";")[0];
    const tokens = usage?.completion_tokens;
    const seconds = (this.last - this.first) / 1000;
    const speed = tokens > 1 && seconds > 0 && !(cacheKind in { hit: 1, semantic: 1 }) ? (tokens - 1) / seconds : null;
    return [
      chip(headers?.get("x-fastattn-model"), "The model that answered", "model-chip"),
      chip(headers?.get("x-fastattn-route"), "Why this model", "route-chip"),
      chip(CACHE[cacheKind] ?? cacheKind, `Response cache: ${cache}`, `cache-chip ${cacheKind === "hit" || cacheKind === "semantic" || cacheKind === "joined" ? "good" : ""}`),
      this.first && chip(`${time(this.first - this.start)} to first`, "Time to the first text, as seen here", "ttft-chip"),
      speed && chip(`${speed.toFixed(1)} tokens/s`, "After the first token, as seen here", "speed-chip"),
      tokens != null && chip(`${tokens} token${tokens === 1 ? "" : "s"}`, `${usage.prompt_tokens} in the prompt`, "tokens-chip"),
      finish === "length" && chip("cut at the limit", "The longest answer of the settings, or of the model", "warn"),
      finish === "content_filter" && chip("cut by a guardrail", "", "warn"),
      stopped && chip("stopped", "", "warn"),
    ];
  }

  actions(onAgain) {
    const copy = element("button", { type: "button", class: "plain" }, "Copy");
    copy.addEventListener("click", () => copyText(this.text, copy));
    const again = element("button", { type: "button", class: "plain again" }, "Again");
    again.addEventListener("click", onAgain);
    return element("span", { class: "message-actions" }, this.text ? copy : null, again);
  }
}
