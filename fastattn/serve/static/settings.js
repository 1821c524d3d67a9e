// What is asked of every answer. Kept in this browser; the API key only in this tab, until it is closed.

const KEPT = "fastattn.settings", KEY = "fastattn.key";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

export class Settings {
  constructor(dialog, form, reset) {
    Object.assign(this, { dialog, form });
    this.load();
    dialog.addEventListener("close", () => this.save());
    reset.addEventListener("click", () => form.reset());
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); }); // beside it
  }

  field(name) {
    return this.form.elements.namedItem(name);
  }

  open() {
    this.dialog.showModal();
  }

  load() {
    let kept = {};
    try {
      kept = JSON.parse(localStorage.getItem(KEPT)) ?? {};
    } catch {
      localStorage.removeItem(KEPT); // not ours
    }
    for (const name of ["system", ...NUMBERS]) this.field(name).value = kept[name] ?? "";
    this.field("fresh").checked = kept.fresh === true;
    this.field("key").value = sessionStorage.getItem(KEY) ?? "";
  }

  save() {
    const kept = { fresh: this.fresh };
    for (const name of ["system", ...NUMBERS]) kept[name] = this.field(name).value;
    localStorage.setItem(KEPT, JSON.stringify(kept));
    sessionStorage.setItem(KEY, this.key);
    this.onchange?.();
  }

  get key() {
    return this.field("key").value.trim();
  }

  get system() {
    return this.field("system").value.trim();
  }

  get fresh() {
    return this.field("fresh").checked;
  }

  /** Fields of a request; what is empty is left to the server. */
  get sampling() {
    const filled = NUMBERS.filter((name) => this.field(name).value !== "");
    return Object.fromEntries(filled.map((name) => [name, Number(this.field(name).value)]));
  }
}
