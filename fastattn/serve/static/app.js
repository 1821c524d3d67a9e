// The page: a conversation with the server that it came from, its settings, and the live charts beside it.
import { call, streamChat } from "./client.js";
import { Live } from "./live.js";
import { element } from "./markdown.js";
import { Message } from "./message.js";
import { Settings } from "./settings.js";

const $ = (id) => document.getElementById(id);
const settings = new Settings($("settings"), $("settings-form"), $("settings-reset"));
let turns = []; // Message, in the order of the conversation
let running = null; // AbortController of the answer that is being written

// ---- the conversation ----

async function ask(text) {
  turns.push(add(new Message("user", text)));
  await answer();
}

/** Asks for the answer to the conversation so far. */
async function answer() {
  const message = add(new Message("assistant"));
  const end = {};
  running = new AbortController();
  showRunning();
  message.ondraw = follow();
  message.wait();
  try {
    for await (const part of streamChat(requestBody(), { key: settings.key, signal: running.signal, fresh: settings.fresh })) {
      if (part.text) message.append(part.text);
      else Object.assign(end, part);
    }
  } catch (error) {
    if (running.signal.aborted) end.stopped = true;
    else end.error = error.status === 401 ? `${error.message}: set the API key in the settings` : error.message;
  }
  running = null;
  showRunning();
  // What failed without a word is not part of the conversation that the next request sends.
  if (message.text) turns.push(message);
  message.end({ ...end, onAgain: () => again(message) });
}

function requestBody() {
  const said = turns.map((turn) => ({ role: turn.role, content: turn.text }));
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  return { model: $("model").value, messages: [...system, ...said], ...settings.sampling };
}

/** Asks anew for an answer; what followed it is forgotten. */
function again(message) {
  if (running) return;
  const at = turns.indexOf(message);
  if (at >= 0) turns = turns.slice(0, at);
  while (message.node.nextSibling) message.node.nextSibling.remove();
  message.node.remove();
  answer();
}

function add(message) {
  $("empty").hidden = true;
  $("log").append(message.node);
  $("log").scrollTop = $("log").scrollHeight;
  return message;
}

/** Keeps the end in sight while text comes, unless the reader has scrolled away from it. */
function follow() {
  const log = $("log");
  let stays = true;
  log.onscroll = () => { stays = log.scrollHeight - log.scrollTop - log.clientHeight < 80; };
  return () => { if (stays) log.scrollTop = log.scrollHeight; };
}

function clear() {
  running?.abort();
  turns = [];
  $("log").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("prompt").focus();
}

function showRunning() {
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
}

// ---- the composer ----

function submit() {
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  grow();
  ask(text);
}

function grow() {
  const box = $("prompt");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, innerHeight * 0.4)}px`;
}

$("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !$("settings").open) running?.abort(); });
$("new").addEventListener("click", clear);
$("ideas").addEventListener("click", (event) => { if (event.target.tagName === "BUTTON" && !running) ask(event.target.textContent); });

// ---- the bar ----

async function loadModels() {
  try {
    const { data } = await (await call("v1/models", { key: settings.key })).json();
    const wish = $("model").value;
    $("model").replaceChildren(...data.map(({ id }) => element("option", { value: id }, id)));
    if (data.some(({ id }) => id === wish)) $("model").value = wish;
  } catch {
    // The state of the server, with its reason, stands in the bar already.
  }
}

function showState(state, text) {
  if ($("status").dataset.state !== state) {
    $("status").dataset.state = state;
    if (state === "ok") loadModels();
  }
  if ($("status-text").textContent !== text) $("status-text").textContent = text;
}

function toggleLive(open) {
  document.body.classList.toggle("no-live", !open);
  $("live-toggle").setAttribute("aria-expanded", String(open));
}

/** Light, dark, or as the system has it. */
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("fastattn.theme", theme);
}

const narrow = matchMedia("(max-width: 900px)");
toggleLive(!narrow.matches);
narrow.addEventListener("change", () => toggleLive(!narrow.matches));
$("live-toggle").addEventListener("click", () => toggleLive(document.body.classList.contains("no-live")));
document.documentElement.dataset.theme = localStorage.getItem("fastattn.theme") ?? "";
$("theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).getPropertyValue("--is-dark").trim() === "1";
  setTheme(dark ? "light" : "dark");
});
$("settings-open").addEventListener("click", () => settings.open());

const live = new Live($("charts"), $("live-note"), () => settings.key, showState);
settings.onchange = () => { loadModels(); live.poll(); };
live.poll();
$("prompt").focus();
