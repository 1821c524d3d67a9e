// Markdown to DOM nodes. marked only cuts the text into tokens; every node is made here, and text is only ever set as text,
// so that nothing a model writes can become markup, script or a request: HTML is shown as it is written, images as links.
import { lexer } from "./vendor/marked.js";

const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&nbsp;": "\u00a0" };
const decode = (text) => text.replace(/&(?:amp|lt|gt|quot|#39|nbsp);/g, (entity) => ENTITIES[entity]);

/** element("a", { href }, child, "text", …): null children are left out. */
export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value != null && value !== "") node.setAttribute(key, value);
  node.append(...children.filter((child) => child != null));
  return node;
}

/** The address of a link that is worth following; null for any other scheme than these. */
export function safeHref(href) {
  try {
    const url = new URL(decode(href), location.href);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

const inline = (tokens = []) => tokens.map(inlineNode);

function inlineNode(token) {
  switch (token.type) {
    case "strong": case "em": case "del": return element(token.type, {}, ...inline(token.tokens));
    case "codespan": return element("code", {}, token.text);
    case "br": return element("br");
    case "link": return link(token.href, inline(token.tokens));
    case "image": return link(token.href, [token.text || token.href]);
    case "html": return document.createTextNode(token.raw);
    default: return token.tokens ? element("span", {}, ...inline(token.tokens)) : document.createTextNode(decode(token.text ?? token.raw));
  }
}

function link(href, children) {
  const safe = safeHref(href);
  if (safe === null) return element("span", {}, ...children);
  return element("a", { href: safe, target: "_blank", rel: "noopener noreferrer nofollow", title: safe }, ...children);
}

const blocks = (tokens = []) => tokens.filter((token) => token.type !== "space" && token.type !== "def").map(blockNode);

function blockNode(token) {
  switch (token.type) {
    case "heading": return element(`h${Math.min(token.depth + 2, 6)}`, {}, ...inline(token.tokens));
    case "paragraph": return element("p", {}, ...inline(token.tokens));
    case "code": return codeBlock(token.text, token.lang);
    case "blockquote": return element("blockquote", {}, ...blocks(token.tokens));
    case "hr": return element("hr");
    case "list": return list(token);
    case "table": return table(token);
    case "html": return element("p", { class: "raw" }, token.raw.trimEnd());
    default: return token.tokens ? element("span", {}, ...inline(token.tokens)) : document.createTextNode(decode(token.text ?? token.raw));
  }
}

function list(token) {
  const items = token.items.map((item) => {
    const box = item.task ? [item.checked ? "☑ " : "☐ "] : [];
    return element("li", {}, ...box, ...blocks(item.tokens.filter((part) => part.type !== "checkbox")));
  });
  return token.ordered ? element("ol", { start: token.start === 1 ? null : token.start }, ...items) : element("ul", {}, ...items);
}

function table(token) {
  const row = (name, cells) => element("tr", {}, ...cells.map((cell) => element(name, { class: cell.align && `to-${cell.align}` }, ...inline(cell.tokens))));
  const head = element("thead", {}, row("th", token.header));
  return element("div", { class: "scroll" }, element("table", {}, head, element("tbody", {}, ...token.rows.map((cells) => row("td", cells)))));
}

function codeBlock(text, language) {
  const copy = element("button", { type: "button", class: "copy" }, "Copy");
  copy.addEventListener("click", () => copyText(text, copy));
  const head = element("div", { class: "code-head" }, element("span", {}, language || "text"), copy);
  return element("div", { class: "code" }, head, element("pre", { tabindex: "0" }, element("code", {}, text)));
}

/** Puts text on the clipboard and says so on the button. */
export async function copyText(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => { button.textContent = before; }, 1500);
}

function tokensOf(text) {
  try {
    return lexer(text).filter((token) => token.type !== "space" && token.type !== "def");
  } catch {
    return [{ type: "html", raw: text }]; // nested too deeply to be cut: shown as it is
  }
}

/** Shows a text that grows. Blocks that did not change stay as they are, with what the reader has selected in them. */
export class MarkdownView {
  constructor(node) {
    this.node = node;
    this.shown = [];
  }

  set(text) {
    const tokens = tokensOf(text);
    let same = 0;
    while (same < tokens.length && this.shown[same] === tokens[same].raw) same++;
    while (this.node.childNodes.length > same) this.node.lastChild.remove();
    this.node.append(...blocks(tokens.slice(same)));
    this.shown = tokens.map((token) => token.raw);
  }
}
