// Ways to find what steers: features by word or text, their cards, contrasts, saved vectors.
import { ask } from "./api.js";
import { $, base64Of, el, number, options } from "./dom.js";
import { add, removeWhere } from "./items.js";
import { state } from "./state.js";

export function start() {
  for (const radio of document.querySelectorAll("input[name=by]")) {
    radio.addEventListener("change", () => {
      const byText = chosenBy() === "text";
      $("word").hidden = byText;
      $("passage").hidden = !byText;
      (byText ? $("passage") : $("word")).focus();
    });
  }
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  $("sae").addEventListener("change", () => $("found").replaceChildren());
  $("example").addEventListener("change", takeExample);
  $("contrast").querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    buildContrast();
  });
  $("method").addEventListener("change", showLayers);
  $("add-vector").addEventListener("click", () => {
    const name = $("vector").value;
    if (name) add({ kind: "vector", name }, name);
  });
  $("forget-vector").addEventListener("click", forgetVector);
  $("vector-file").addEventListener("change", loadVector);
  options($("example"), [["", "your own texts"], ...state.about.contrasts.map((name) => [name, name])], "");
  options($("method"), state.about.methods.map((row) => [row.name, row.label]), "fgaa");
  showVectors(state.about.vectors);
  showLayers();
}

const chosenBy = () => document.querySelector("input[name=by]:checked").value;

async function search() {
  const by = chosenBy();
  const words = (by === "text" ? $("passage") : $("word")).value;
  if (!words.trim()) return;
  const key = $("sae").value;
  const found = await ask("search", { sae: key, by, words }, "found", { says: "searching features" });
  if (!found) return;
  const rows = found.rows.map((row) => foundRow(key, row));
  $("found").classList.remove("short");
  $("found").replaceChildren(...(rows.length ? rows : [el("li", { class: "quiet" }, "No feature was found. Try another word.")]));
}

function foundRow(key, row) {
  const facts = el("div", { class: "facts", hidden: true });
  const label = row.label || (row.raises || []).join(" ") || `feature ${row.id}`;
  const name = el("button", { type: "button", class: "name", "aria-expanded": "false" },
    el("b", {}, label), el("small", {}, `feature ${row.id} · ${row.why}`));
  name.addEventListener("click", async () => {
    facts.hidden = !facts.hidden;
    name.setAttribute("aria-expanded", String(!facts.hidden));
    if (!facts.hidden && !facts.childNodes.length) await showCard(facts, key, row.id);
  });
  const button = el("button", { type: "button", class: "primary", "aria-label": `Add feature ${row.id}, ${label}` }, "Add");
  button.addEventListener("click", () => {
    facts.hidden = true;
    name.setAttribute("aria-expanded", "false");
    $("found").classList.add("short");
    add({ kind: "feature", sae: key, feature: row.id }, label);
  });
  return el("li", {}, el("div", { class: "head" }, name, button), facts);
}

export async function showCard(place, key, feature) {
  place.replaceChildren("…");
  const found = await ask("card", { sae: key, feature }, "card");
  if (!found) return place.replaceChildren();
  const row = found.row;
  const words = (tokens) => tokens.flatMap((token) => [el("code", {}, token), " "]);
  const largest = Math.max(0, ...row.excerpts.flatMap((excerpt) => excerpt.activations));
  place.replaceChildren(
    el("div", {}, `At ${found.at}. `, row.density === null ? "" : `Fires on ${number(row.density * 100)} % of tokens.`),
    el("div", {}, "Raises ", ...words(row.tokens)),
    el("div", {}, "Lowers ", ...words(row.lowered)),
    ...row.excerpts.slice(0, 4).map((excerpt) => excerptOf(excerpt, largest)),
  );
  return largest;
}

function excerptOf(excerpt, largest) {
  const spans = excerpt.tokens.map((token, n) => {
    const value = excerpt.activations[n];
    const shade = value > 0 ? `s${Math.max(1, Math.ceil((5 * value) / largest))}` : "";
    return el(n === excerpt.peak ? "mark" : "span", { class: shade, title: value > 0 ? value.toFixed(1) : null }, token);
  });
  return el("q", {}, ...spans);
}

async function takeExample() {
  const name = $("example").value;
  if (!name) return;
  const found = await ask("contrast", { name }, "contrast");
  if (!found) return;
  for (const side of ["positives", "negatives"]) $(side).value = found[side].map((text) => text.replaceAll("\n", " ")).join("\n");
}

const lines = (id) => $(id).value.split("\n").map((line) => line.trim()).filter(Boolean);

function showLayers() {
  const free = ["caa", "ace"].includes($("method").value);
  const own = [["", "that of the SAE"]];
  options($("layer"), free ? [...own, ...Array.from({ length: state.about.layers }, (_, n) => [n, String(n)])] : own, "");
}

function buildContrast() {
  const method = $("method").value;
  const layer = $("layer").value;
  const item = { kind: "contrast", method, sae: $("sae").value, positives: lines("positives"), negatives: lines("negatives") };
  if (layer !== "") item.layer = Number(layer);
  if (method === "ace") Object.assign(item, { op: "affine", amount: 1 });
  const row = state.about.methods.find((entry) => entry.name === method);
  add(item, `${row.label}, ${item.positives.length} against ${item.negatives.length} texts`);
}

export function showVectors(names) {
  options($("vector"), names.length ? names.map((name) => [name, name]) : [["", "none yet"]], $("vector").value);
  $("add-vector").disabled = $("forget-vector").disabled = !names.length;
}

async function forgetVector() {
  const name = $("vector").value;
  const found = await ask("forget-vector", { name }, "vectors");
  if (!found) return;
  removeWhere((item) => item.kind === "vector" && item.name === name);
  showVectors(found.vectors);
}

async function loadVector() {
  const file = $("vector-file").files[0];
  if (!file) return;
  const name = file.name.replace(/\.safetensors$/, "").replace(/[^\w.-]/g, "_").replace(/^\.+/, "").slice(0, 64) || "vector";
  const found = await ask("add-vector", { name, content: base64Of(await file.arrayBuffer()) }, "vectors");
  $("vector-file").value = "";
  if (found) {
    showVectors(found.vectors);
    $("vector").value = found.name;
  }
}
