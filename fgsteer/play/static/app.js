// The page: it asks what there is, then lets each part begin.
import { ask, showError } from "./api.js";
import * as compare from "./compare.js";
import { $, options } from "./dom.js";
import * as find from "./find.js";
import * as items from "./items.js";
import { state, subscribe } from "./state.js";
import * as take from "./take.js";

async function start() {
  if (location.search) history.replaceState(null, "", "/"); // the token stays in a cookie, out of sight
  state.about = await ask("about", {}, "about");
  if (!state.about) return;
  const about = state.about;
  $("model").textContent = about.model;
  $("server").hidden = !about.server;
  $("server").textContent = `written by ${about.server}`;
  options($("sae"), about.saes.map((key) => [key, key]), about.sae);
  $("prompt").value = about.prompt;
  $("chat-label").hidden = !about.can_chat;
  $("tokens").max = about.limits.tokens;
  $("seeds").max = about.limits.seeds;
  for (const part of [find, items, compare, take]) part.start();
  $("chat").addEventListener("change", chatChanged);
  for (const id of ["prompt", "system", "tokens", "temperature", "seeds"]) $(id).addEventListener("change", () => soon());
  subscribe((what) => {
    if (what === "settled") soon();
    else if (what === "chat") showChat();
  });
  window.addEventListener("keydown", (press) => {
    if (press.key === "Enter" && (press.ctrlKey || press.metaKey)) {
      press.preventDefault();
      compare.write();
    }
  });
  document.body.dataset.ready = "yes";
}

const showChat = () => ($("system-label").hidden = !$("chat").checked);

async function chatChanged() {
  showChat();
  await items.measureAll();
  soon();
}

let timer = 0;
function soon() {
  clearTimeout(timer);
  timer = setTimeout(async () => {
    showError("");
    if ($("auto").checked && state.items.some((item) => item.on)) await compare.write();
    else if (!compare.isWriting()) await items.showCost();
    await take.refresh();
  }, 150);
}

start();
