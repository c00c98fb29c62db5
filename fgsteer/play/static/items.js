// What steers: one card each, with a slider in units of the activations' norm and what strengths cost beneath it.
import { ask } from "./api.js";
import { $, bytesOf, download, el, number, options } from "./dom.js";
import { showCard, showVectors } from "./find.js";
import { addItem, changed, plainItem, plan, state, subscribe } from "./state.js";

const LOWEST = -1, HIGHEST = 1.5, STEP = 0.01; // of the slider, in ‖h‖
const FIRST_DOSE = 0.5; // where no measured one costs so much
const EDIT_WORDS = { off: "off", set: "set to", at_least: "at least", at_most: "at most", plus: "plus", times: "times" };

export function start() {
  subscribe((what) => what === "items" && render());
  render();
}

// Add an item; where it has a dose, find out what strengths cost, and begin at the end of the green zone.
export async function add(entry, label) {
  const item = addItem(entry, label);
  $("items").lastElementChild.scrollIntoView({ block: "nearest" });
  if (isDosed(item)) await measure(item, true);
  settled();
  $(`slider-${item.ui.id}`)?.focus({ preventScroll: true });
}

const isDosed = (item) => item.kind !== "edit" && state.about.dosed.includes(item.op);
const settled = () => changed("settled");
const rounded = (value) => Number(value.toPrecision(4));

async function measure(item, begin = false) {
  const key = JSON.stringify({ ...plainItem(item), amount: Math.sign(item.amount) || 1, chat: $("chat").checked });
  if (item.ui.measured === key) return;
  item.ui.measured = key;
  const body = { item: { ...plainItem(item), amount: item.amount || 1 }, chat: $("chat").checked };
  const found = await ask("strength", body, "strength", { says: "measuring what strengths cost" });
  if (!found) {
    if (begin) remove(item);
    return;
  }
  item.ui.curve = found;
  if (begin && !item.amount) item.amount = rounded(startOf(found) * found.unit);
  changed("items");
}

// The dose at which a slider begins: the last step of the green zone.
const startOf = (curve) => (curve.worse === null ? FIRST_DOSE : Math.max(STEP, Math.ceil(curve.worse / STEP - 1) * STEP));

const remove = (item) => removeWhere((other) => other === item);

export function removeWhere(isGone) {
  const before = state.items.length;
  state.items = state.items.filter((item) => !isGone(item));
  if (state.items.length === before) return;
  changed("items");
  settled();
}

function costAt(curve, dose) {
  if (!curve || Math.sign(curve.points[0].dose) !== (Math.sign(dose) || 1)) return dose ? null : 0;
  let before = { dose: 0, cost: 0 };
  for (const point of curve.points) {
    if (Math.abs(point.dose) >= Math.abs(dose)) {
      return before.cost + ((point.cost - before.cost) * (dose - before.dose)) / (point.dose - before.dose);
    }
    before = point;
  }
  return null;
}

function render() {
  $("nothing").hidden = state.items.length > 0;
  $("items").replaceChildren(...state.items.map(itemCard));
}

export function nameOf(item) {
  if (item.ui.label) return item.kind === "feature" || item.kind === "edit" ? `${item.ui.label}` : item.ui.label;
  if (item.kind === "vector") return item.name;
  if (item.kind === "contrast") return `${item.method.toUpperCase()}, ${item.positives.length} against ${item.negatives.length} texts`;
  return `feature ${item.feature}`;
}

function itemCard(item) {
  const on = el("input", { type: "checkbox", "aria-label": "on", title: "on or off" });
  on.checked = item.on;
  on.addEventListener("change", () => {
    item.on = on.checked;
    changed("items");
    settled();
  });
  const where = "feature" in item ? `feature ${item.feature} · ${item.sae}` : item.kind === "vector" ? "saved vector" : item.layer != null ? `layer ${item.layer}` : item.sae;
  const drop = el("button", { type: "button", class: "plain", "aria-label": `Remove ${nameOf(item)}`, title: "remove", onclick: () => remove(item) }, "✕");
  const head = el("div", { class: "head" }, on, el("b", {}, nameOf(item), el("small", {}, where)), drop);
  return el("li", { class: item.on ? "" : "off" }, head, isDosed(item) ? doseSlider(item) : amountOf(item), more(item));
}

function doseSlider(item) {
  const curve = item.ui.curve;
  const id = `slider-${item.ui.id}`;
  const slider = el("input", { id, type: "range", min: LOWEST, max: HIGHEST, step: STEP, "aria-label": `Dose of ${nameOf(item)}, in units of the activations' norm`, disabled: !curve });
  const output = el("output", { for: id });
  const says = el("div", { class: "says" });
  const zones = el("div", { class: "zones", "aria-hidden": "true" });
  const show = () => {
    const dose = Number(slider.value);
    output.textContent = `${dose.toFixed(2).replace("-", "−")} ‖h‖`;
    const cost = costAt(curve, dose);
    const collapsed = curve && cost === null ? curve.collapse !== null && Math.abs(dose) > Math.abs(curve.collapse) : cost >= 2;
    says.className = collapsed ? "says bad" : cost >= 1 ? "says warn" : "says";
    const price = cost === null ? "beyond what was measured" : `costs about ${number(Math.max(cost, 0), 2)} nats a token`;
    const length = `${Math.round(100 * Math.abs(dose))} % of the activations’ length`;
    says.textContent = curve ? `${length}, ${price}${collapsed ? ": no language is left" : cost >= 1 ? ": the language suffers" : ""}` : "measuring what strengths cost…";
    slider.setAttribute("aria-valuetext", `${output.textContent}, ${says.textContent}`);
  };
  if (curve) {
    slider.value = item.amount / curve.unit;
    zones.style.setProperty("background", zoneGradient(curve));
    zones.title = "green: fluent; amber: the language suffers (1 nat a token and more); red: collapse (2 and more); gray: not measured";
  }
  slider.addEventListener("input", () => {
    item.amount = rounded(Number(slider.value) * curve.unit);
    amount.value = item.amount;
    show();
  });
  slider.addEventListener("change", async () => {
    settled();
    await measure(item);
  });
  const amount = el("input", { type: "number", step: "any", "aria-label": "Coefficient", title: "coefficient" });
  amount.value = item.amount;
  amount.addEventListener("change", async () => {
    if (!Number.isFinite(amount.valueAsNumber)) return;
    item.amount = amount.valueAsNumber;
    if (curve) slider.value = item.amount / curve.unit;
    show();
    settled();
    await measure(item);
  });
  show();
  item.ui.amountInput = amount;
  return el("div", { class: "dose" }, el("div", { class: "slide" }, slider, zones), output, says);
}

// The measured side of the slider in the colors of its costs; what was not measured stays gray.
function zoneGradient(curve) {
  const place = (dose) => `${(100 * (dose - LOWEST)) / (HIGHEST - LOWEST)}%`;
  const last = curve.points.at(-1);
  const stops = [[0, "good"], [curve.worse, "warn"], [curve.collapse, "bad"]].filter(([dose]) => dose !== null);
  const ends = stops.map((stop, n) => (n + 1 < stops.length ? stops[n + 1][0] : stop[1] === "bad" ? Math.sign(last.dose) * HIGHEST : last.dose));
  const parts = stops.map(([dose, color], n) => [dose, ends[n], color]);
  const sorted = last.dose < 0 ? parts.map(([a, b, c]) => [Math.max(b, LOWEST), a, c]).reverse() : parts;
  const shown = sorted.map(([a, b, color]) => `var(--${color}) ${place(a)} ${place(b)}`);
  const gray = "var(--line)";
  const zero = `calc(${place(0)} - 1px)`;
  const tick = `linear-gradient(90deg, transparent ${zero}, var(--text) ${zero} calc(${place(0)} + 1px), transparent 0)`;
  return `${tick}, linear-gradient(90deg, ${gray} ${place(sorted[0][0])}, ${shown.join(", ")}, ${gray} ${place(sorted.at(-1)[1])})`;
}

function amountOf(item) {
  const row = state.about.operations.find((entry) => entry.name === item.op);
  const needs = item.kind === "edit" ? item.edit !== "off" : Boolean(row?.amount);
  if (!needs) return el("p", { class: "quiet" }, item.kind === "edit" ? "Its activation becomes 0." : row.summary);
  const times = item.edit === "times", affine = item.op === "affine";
  const reach = times ? [0, 4, 0.05] : affine ? [-1, 3, 0.05] : item.kind === "edit" ? [0, Math.max(10, (item.ui.largest || 100) * 1.5), 0.5] : [-500, 500, 1];
  const slider = el("input", { type: "range", min: reach[0], max: reach[1], step: reach[2], "aria-label": `Amount of ${nameOf(item)}` });
  slider.value = item.amount;
  const output = el("output", {}, number(item.amount));
  slider.addEventListener("input", () => {
    item.amount = Number(slider.value);
    output.textContent = number(item.amount);
  });
  slider.addEventListener("change", settled);
  const said = item.kind === "edit" ? `The activation becomes ${EDIT_WORDS[item.edit]} this.` : row.summary;
  return el("div", { class: "dose" }, el("div", { class: "slide" }, slider), output, el("div", { class: "says" }, said));
}

function more(item) {
  const box = el("details", { class: "more" }, el("summary", {}, "how it acts"));
  box.open = Boolean(item.ui.open);
  box.addEventListener("toggle", () => (item.ui.open = box.open));
  const change = () => {
    item.ui.measured = null;
    changed("items");
    if (isDosed(item)) measure(item).then(settled);
    else settled();
  };
  const first = el("div", { class: "row" }, actSelect(item, change), scopeSelect(item, change));
  const last = el("div", { class: "row" });
  if ("feature" in item) {
    const facts = el("div", { class: "facts", hidden: true });
    last.append(el("button", { type: "button", onclick: async () => {
      facts.hidden = !facts.hidden;
      if (!facts.hidden) item.ui.largest = await showCard(facts, item.sae, item.feature);
    } }, "Card"));
    box.append(first, gateRow(item, change), last, facts);
  } else box.append(first, gateRow(item, change), last);
  if (isDosed(item) && item.ui.amountInput) first.append(el("label", { class: "inline" }, "coefficient ", item.ui.amountInput));
  if (item.kind !== "edit") last.append(saveButton(item));
  return box;
}

function actSelect(item, change) {
  const select = el("select", { "aria-label": "What it does" });
  const feature = "feature" in item;
  const rows = state.about.operations.filter((row) => row.name !== "affine" || item.op === "affine" || item.kind !== "feature");
  const entries = rows.map((row) => [`op:${row.name}`, row.name.replaceAll("_", " ")]);
  if (feature) entries.push(...state.about.edits.map((edit) => [`edit:${edit}`, `activation ${EDIT_WORDS[edit]}`]));
  options(select, entries, item.kind === "edit" ? `edit:${item.edit}` : `op:${item.op}`);
  select.addEventListener("change", () => {
    const [kind, name] = select.value.split(":");
    const wasDosed = isDosed(item);
    if (kind === "edit") Object.assign(item, { kind: "edit", edit: name, op: "add", amount: name === "times" ? 0.5 : name === "off" ? 0 : 20 });
    else {
      delete item.edit;
      Object.assign(item, { kind: feature ? "feature" : item.kind, op: name });
      if (!isDosed(item)) item.amount = name === "affine" ? 1 : 0;
      else if (!wasDosed || name === "add_relative") item.amount = FIRST_DOSE * (name === "add_relative" ? 1 : item.ui.curve?.unit || 1);
    }
    item.ui.curve = null;
    change();
  });
  return el("label", { class: "inline" }, "does ", select);
}

function scopeSelect(item, change) {
  const names = { auto: "as usual", all: "every token", prompt: "the prompt", generated: "generated tokens", reply: "the reply", last_prompt: "last prompt token" };
  const select = el("select", { "aria-label": "Tokens that are steered", title: state.about.scope_help });
  options(select, state.about.scopes.map((scope) => [scope, names[scope] || scope]), item.scope);
  select.addEventListener("change", () => {
    item.scope = select.value;
    change();
  });
  return el("label", { class: "inline" }, "on ", select);
}

function gateRow(item, change) {
  const gate = item.gate;
  const on = el("input", { type: "checkbox", "aria-label": "Only while a feature fires" });
  on.checked = Boolean(gate);
  const row = el("div", { class: "row" }, el("label", { class: "inline" }, on, "only while feature"));
  const feature = el("input", { type: "number", min: 0, step: 1, "aria-label": "The gate's feature" });
  const above = el("input", { type: "number", step: "any", "aria-label": "The gate's threshold" });
  const inverted = el("select", { "aria-label": "The gate's sign" });
  const pooling = el("select", { "aria-label": "Where the gate reads" });
  options(inverted, [["", "is above"], ["not", "is not above"]], gate?.inverted ? "not" : "");
  options(pooling, [["", "at each token"], ["last", "at the prompt's end"], ["mean", "on average in the prompt"], ["max", "somewhere in the prompt"]], gate?.pooling || "");
  feature.value = gate?.feature ?? item.feature ?? 0;
  above.value = gate?.above ?? 0;
  const take = () => {
    item.gate = on.checked
      ? { sae: gate?.sae || item.sae || $("sae").value, feature: Math.round(feature.valueAsNumber || 0), above: above.valueAsNumber || 0, pooling: pooling.value, inverted: inverted.value === "not" }
      : null;
    change();
  };
  for (const control of [on, feature, above, inverted, pooling]) control.addEventListener("change", take);
  if (gate) row.append(feature, inverted, above, pooling);
  return row;
}

function saveButton(item) {
  return el("button", { type: "button", onclick: async () => {
    const suggested = nameOf(item).replace(/[^\w.-]+/g, "-").replace(/^[-.]+|-+$/g, "").slice(0, 40) || "vector";
    const name = window.prompt("Save the vector as", suggested);
    if (!name) return;
    let names = null;
    const { call } = await import("./api.js");
    await call("save-vector", { item: plainItem(item), name }, (event) => {
      if (event.event === "file") download(event.name, "application/octet-stream", [bytesOf(event.content)]);
      else names = event.vectors;
    });
    if (names) showVectors(names);
  } }, "Save the vector");
}

// After a share file was opened or the chat changed: every dose is measured anew.
export async function measureAll() {
  for (const item of state.items) {
    item.ui.measured = null;
    if (isDosed(item)) await measure(item);
  }
}

export async function showCost() {
  const active = state.items.filter((item) => item.on);
  $("cost").hidden = !active.length;
  if (!active.length) return;
  const found = await ask("cost", { plan: plan() }, "cost", { says: "measuring the cost" });
  if (found) drawCost(found.cost);
}

export function drawCost(cost) {
  $("cost").hidden = false;
  const share = Math.min(1, Math.max(0, cost / 2.5));
  $("cost").querySelector(".meter span").style.setProperty("width", `${100 * (1 - share)}%`);
  const verdict = cost >= 2 ? "collapse: no language is left" : cost >= 1 ? "the language suffers" : cost >= 0.1 ? "it steers, and neutral text stays fluent" : "hardly any effect";
  const text = `All together cost ${number(Math.max(cost, 0), 3)} nats a token of neutral text: ${verdict}.`;
  $("cost").querySelector("p").textContent = text;
  $("cost").querySelector(".meter").setAttribute("aria-label", text);
}
