// What is taken away: code, the steering's file, the share file, the comparison as a page.
import { ask, call, showError } from "./api.js";
import { $, bytesOf, download } from "./dom.js";
import { showVectors } from "./find.js";
import { measureAll } from "./items.js";
import { changed, plan, state, subscribe, takePlan } from "./state.js";

let code = null;

export function start() {
  for (const radio of document.querySelectorAll("input[name=code]")) radio.addEventListener("change", show);
  $("copy").addEventListener("click", copy);
  $("steering").addEventListener("click", () => save("steering", { plan: plan() }, "application/octet-stream"));
  $("page").addEventListener("click", () => save("page", { run: state.run }, "text/html"));
  $("share").addEventListener("click", share);
  $("open").addEventListener("click", () => $("open-file").click());
  $("open-file").addEventListener("change", open);
  subscribe((what) => what === "code" && refresh());
}

export async function refresh() {
  const found = await ask("code", { plan: plan() }, "code", { quiet: true });
  if (!found) return;
  code = found;
  $("take").hidden = false;
  $("steering").disabled = !state.items.some((item) => item.on);
  show();
}

function show() {
  if (code) $("code").textContent = code[document.querySelector("input[name=code]:checked").value];
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("code").textContent);
    $("copy").textContent = "Copied";
    setTimeout(() => ($("copy").textContent = "Copy"), 1500);
  } catch {
    getSelection().selectAllChildren($("code"));
  }
}

async function save(action, body, type) {
  await call(action, body, (event) => {
    if (event.event === "file") download(event.name, type, [bytesOf(event.content)]);
  });
}

async function share() {
  const found = await ask("share", { plan: plan() }, "share");
  if (found) download("steering.json", "application/json", [JSON.stringify(found.share, null, 1)]);
}

async function open() {
  const file = $("open-file").files[0];
  $("open-file").value = "";
  if (!file) return;
  let shared = null;
  try {
    shared = JSON.parse(await file.text());
  } catch {
    return showError("This file is not JSON. Choose a file that “Share file” saved.");
  }
  const found = await ask("open", { share: shared }, "opened");
  if (!found) return;
  showError(found.note);
  takePlan(found.plan);
  showVectors(found.vectors);
  changed("chat");
  await measureAll();
  changed("settled");
}
