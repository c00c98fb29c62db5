// What is set on the page. Whoever changes it calls changed(), and who shows it subscribes.
import { $ } from "./dom.js";

export const state = { about: null, items: [], run: null };
const listeners = [];
let nextId = 1;

export const subscribe = (listener) => listeners.push(listener);
export function changed(what = "items") {
  for (const listener of listeners) listener(what);
}

export function addItem(item, label) {
  const added = { gate: null, on: true, op: "add", scope: "auto", amount: 0, ...item, ui: { id: nextId++, label } };
  state.items.push(added);
  changed("items");
  return added;
}

export function plainItem(item) {
  const { ui, ...plain } = item;
  return plain;
}

const numberOf = (id, fallback) => {
  const value = $(id).valueAsNumber;
  return Number.isFinite(value) ? value : fallback;
};

export function plan() {
  const temperature = numberOf("temperature", 0);
  const seeds = Math.max(1, Math.round(numberOf("seeds", 1)));
  const first = state.firstSeed || 0;
  return {
    prompt: $("prompt").value,
    items: state.items.map(plainItem),
    chat: $("chat").checked,
    system: $("chat").checked ? $("system").value : "",
    max_new_tokens: Math.round(numberOf("tokens", 48)),
    temperature,
    seeds: Array.from({ length: temperature ? seeds : 1 }, (_, n) => first + n),
    control: $("control").checked,
    control_seed: 0,
  };
}

export function takePlan(plan) {
  $("prompt").value = plan.prompt;
  $("chat").checked = plan.chat;
  $("system").value = plan.system;
  $("tokens").value = plan.max_new_tokens;
  $("temperature").value = plan.temperature;
  $("seeds").value = plan.seeds.length;
  $("control").checked = plan.control;
  state.firstSeed = plan.seeds[0];
  state.items = plan.items.map((item) => ({ ...item, ui: { id: nextId++, label: "" } }));
  changed("items");
}
