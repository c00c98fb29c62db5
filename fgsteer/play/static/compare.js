// The texts side by side, as they are written; then what steering did to each token, and to the features in them.
import { call } from "./api.js";
import { $, el, number, options } from "./dom.js";
import { drawCost } from "./items.js";
import { changed, plan, state } from "./state.js";

const NAMES = { unsteered: "Unsteered", steered: "Steered", random: "Random direction of equal norm" };
const DARKEST_NATS = 4;
const SHADES = 5;
let control = null; // of the run that is under way
let cells = new Map(); // of each text: its element, its text, its tokens

export function start() {
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    write();
  });
  $("stop").addEventListener("click", () => control?.abort());
  $("color").addEventListener("change", recolor);
  $("control").addEventListener("change", () => changed("settled"));
  $("another").addEventListener("click", () => {
    state.firstSeed = (state.firstSeed || 0) + Math.max(1, Number($("seeds").value) || 1);
    write();
  });
  $("judge").addEventListener("click", judge);
}

export const isWriting = () => control !== null;

export async function write() {
  control?.abort();
  const own = (control = new AbortController());
  const asked = plan();
  $("stop").hidden = false;
  layOut(asked);
  state.run = null;
  let run = null;
  const done = await call("write", { plan: asked, sae: $("sae").value }, (event) => {
    if (own.signal.aborted) return;
    if (event.event === "run") run = event.run;
    else if (event.event === "text") showText(event);
    else if (event.event === "written") cell(event)?.body.classList.remove("writing");
    else if (event.event === "cost") drawCost(event.cost);
    else if (event.event === "tokens") showTokens(event);
    else if (event.event === "features") showMoved(event);
  }, { signal: own.signal, says: "writing" });
  if (control !== own) return;
  control = null;
  $("stop").hidden = true;
  for (const { body } of cells.values()) body.classList.remove("writing");
  if (done) {
    state.run = run;
    $("judging").hidden = false;
    $("judge").textContent = state.about.judge ? "Measure coherence and behavior" : "Measure coherence";
  }
}

const keyOf = ({ column, seed }) => `${column} ${seed}`;
const cell = (event) => cells.get(keyOf(event));

function layOut(asked) {
  cells = new Map();
  const steered = asked.items.some((item) => item.on);
  const columns = ["unsteered", ...(steered ? ["steered"] : []), ...(steered && asked.control ? ["random"] : [])];
  $("texts").replaceChildren(...asked.seeds.map((seed) => {
    const boxes = columns.map((column) => {
      const title = asked.seeds.length > 1 || seed ? `${NAMES[column]} · seed ${seed}` : NAMES[column];
      const body = el("p", { class: "body writing" });
      const figures = el("p", { class: "figures" });
      if (!asked.chat) body.append(el("span", { class: "prompt" }, asked.prompt));
      const tail = el("span");
      body.append(tail);
      cells.set(`${column} ${seed}`, { body, tail, figures, text: "", tokens: null });
      return el("article", { class: `text ${column}`, "data-column": column, "data-seed": seed }, el("h3", {}, title), body, figures);
    });
    return el("div", { class: "seed" }, ...boxes);
  }));
  $("inspector").hidden = true;
  $("moved").hidden = true;
  $("judging").hidden = true;
  $("scores").replaceChildren();
}

function showText(event) {
  const place = cell(event);
  if (!place) return;
  const characters = Array.from(place.text); // as Python counts them
  place.text = characters.slice(0, event.at).join("") + event.text;
  place.tail.textContent = place.text;
}

function showTokens(event) {
  const place = cell(event);
  if (!place) return;
  place.tokens = event.tokens;
  place.features = event.features;
  offerColors(event);
  const spans = event.tokens.map((token, n) => {
    const span = el("span", { class: "t", tabindex: n ? -1 : 0 }, token.text);
    span.addEventListener("mouseenter", () => inspect(place, n));
    span.addEventListener("focus", () => inspect(place, n));
    span.addEventListener("keydown", (press) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[press.key];
      if (!step || !spans[n + step]) return;
      press.preventDefault();
      span.tabIndex = -1;
      spans[n + step].tabIndex = 0;
      spans[n + step].focus();
    });
    return span;
  });
  place.spans = spans;
  place.tail.replaceChildren(...spans);
  place.body.classList.remove("writing");
  const figures = [];
  if (event.kl !== null) figures.push(`costs ${number(event.kl)} nats in all`);
  if (event.surprise !== null) figures.push(`${number(event.surprise)} nats a token under the unsteered model`);
  if (event.distinct !== null && event.distinct < 0.9) figures.push(`repeats itself: ${number(100 * event.distinct, 2)} % of trigrams are distinct`);
  place.figures.textContent = figures.join(" · ");
  recolor();
}

function offerColors(event) {
  const gated = event.tokens.some((token) => token.gate !== null);
  const entries = [["kl", "KL from unsteered"], ["dose", "dose"], ...(gated ? [["gate", "gate"]] : [])];
  entries.push(...event.features.map((feature, n) => [`f${n}`, `feature ${feature.id}${feature.label ? ` ${feature.label}` : ""}`]), ["none", "nothing"]);
  const chosen = $("color").value;
  options($("color"), entries, entries.some(([value]) => value === chosen) ? chosen : "kl");
}

function valueOf(token, color, column) {
  if (color === "kl") return token.kl;
  if (color === "dose") return token.dose;
  if (color.startsWith("f")) return (column === "unsteered" ? token.features_before : token.features)[Number(color.slice(1))];
  return null;
}

function recolor() {
  const color = $("color").value;
  const places = [...cells].filter(([, place]) => place.spans);
  const values = places.flatMap(([key, place]) => place.tokens.map((token) => valueOf(token, color, key.split(" ")[0]) || 0));
  const most = color === "kl" ? DARKEST_NATS : Math.max(1e-9, ...values);
  for (const [key, place] of places) {
    place.tokens.forEach((token, n) => {
      const value = valueOf(token, color, key.split(" ")[0]) || 0;
      const shade = value > most / 50 ? `s${Math.min(SHADES, Math.ceil((SHADES * value) / most))}` : "";
      const gate = color === "gate" && token.gate !== null ? (token.gate ? "open" : "shut") : "";
      place.spans[n].className = ["t", token.special ? "special" : "", shade, gate].filter(Boolean).join(" ");
    });
  }
  const legend = $("legend");
  if (!places.length) return legend.replaceChildren();
  if (color === "none") return legend.replaceChildren("Point at a token, or move with the arrow keys, to see what steering did to it.");
  if (color === "gate") return legend.replaceChildren(el("i", { class: "open" }, "open"), " ", el("i", { class: "shut" }, "shut"));
  const what = { kl: "How far steering moves each token’s distribution, KL(steered‖unsteered) in nats", dose: "How far the activation is moved, in ‖h‖" }[color] || "Activation; in the unsteered text, without steering";
  legend.replaceChildren(`${what}: `, ...Array.from({ length: SHADES }, (_, n) => el("i", { class: `s${n + 1}` }, number((most * (n + 1)) / SHADES, 2))));
}

function inspect(place, n) {
  const token = place.tokens[n];
  const facts = [];
  if (token.kl !== null) facts.push(`KL ${number(token.kl)} nats`);
  facts.push(`dose ${number(token.dose, 2)} ‖h‖`);
  if (token.gate !== null) facts.push(token.gate ? "gate open" : "gate shut");
  place.features.slice(0, 3).forEach((feature, m) => {
    facts.push(`feature ${feature.id} ${number(token.features_before[m])} → ${number(token.features[m])}`);
  });
  const side = (title, top, own) => {
    const rows = top.flatMap(([text, logp]) => {
      const bar = el("span");
      bar.style.setProperty("width", `${100 * Math.exp(logp)}%`);
      return [el("b", { class: text === token.text ? "own" : "" }, text.replaceAll("\n", "⏎")), el("div", { class: "bar" }, bar), el("span", {}, `${number(100 * Math.exp(logp), 2)} %`)];
    });
    const mine = own === null ? "" : ` (this one ${number(100 * Math.exp(own), 2)} %)`;
    return el("div", {}, el("h3", {}, title + mine), el("div", { class: "top" }, ...rows));
  };
  $("inspector").hidden = false;
  $("inspector").replaceChildren(
    el("b", {}, `“${token.text}”`), ` ${facts.join(" · ")}`,
    el("div", { class: "grid" }, side("Unsteered would write", token.before, token.chosen[0]), side("Steered writes", token.after, token.chosen[1])),
  );
}

function showMoved(event) {
  $("moved").hidden = false;
  const parts = ["Mean activations in the steered text less those in the unsteered one, without features that fire on more than 1 % of tokens. "];
  if (event.seeds === 1) parts.push("One seed: take more to see an error. ");
  if (event.correlation !== null) parts.push(`Predicted and observed correlate at ${number(event.correlation, 2)} over ${event.fires} features. `);
  else if (event.why) parts.push(event.why);
  if (event.predicted_by) parts.push("The bars of either are on a scale of their own. ");
  const note = $("moved-note");
  note.replaceChildren(...parts, el("span", { class: "key o" }, "observed"));
  if (event.predicted_by) note.append(el("span", { class: "key p" }, "predicted before anything was written"));
  const scale = (name) => Math.max(1e-9, ...event.rows.map((row) => Math.abs(row[name] ?? 0)));
  const most = { observed: scale("observed"), predicted: scale("predicted") };
  const half = (row, name) => {
    const bar = el("span", { class: `${name} ${row[name] < 0 ? "neg" : "pos"}` });
    bar.style.setProperty("width", `${(100 * Math.abs(row[name] ?? 0)) / most[name]}%`);
    return el("div", { class: "half" }, bar);
  };
  const signed = (value) => (value === null ? "–" : `${value > 0 ? "+" : ""}${number(value)}`);
  const heads = ["feature", "", "observed", ...(event.rows.some((row) => row.error !== null) ? ["± error"] : []), ...(event.predicted_by ? ["predicted"] : [])];
  const own = new Set(state.items.filter((item) => "feature" in item).map((item) => item.feature));
  const rows = event.rows.map((row) => el("tr", {},
    el("th", { scope: "row" }, own.has(row.feature) ? el("b", {}, `${row.feature} ${row.label}`) : `${row.feature} ${row.label}`),
    el("td", { class: "bars" }, el("div", { class: "pair" }, half(row, "observed"), event.predicted_by ? half(row, "predicted") : null)),
    el("td", {}, signed(row.observed)),
    heads.includes("± error") ? el("td", {}, number(row.error, 2)) : null,
    event.predicted_by ? el("td", {}, signed(row.predicted)) : null));
  $("moved-rows").replaceChildren(el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Features that rose and fell" },
    el("table", {}, el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))), el("tbody", {}, ...rows))));
}

async function judge() {
  let found = null;
  await call("judge", { run: state.run }, (event) => (found = event), { says: "judging" });
  if (!found) return;
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const parts = Object.entries(found).filter(([name]) => name !== "event").flatMap(([name, columns]) =>
    Object.entries(columns).map(([column, values]) => `${name}, ${NAMES[column].toLowerCase()}: ${number(mean(values), 2)}`));
  $("scores").replaceChildren(el("p", { class: "quiet" }, `${parts.join(" · ")}. From 0 to 1; coherence is against unsteered samples of this model.`));
}
