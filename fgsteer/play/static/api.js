// Requests to this page's own server, whose answers are events.
import { $ } from "./dom.js";

let running = 0;

export function showError(message) {
  $("error").textContent = message || "";
  $("error").hidden = !message;
}

function showStatus(text) {
  const status = $("status");
  status.textContent = text;
  status.classList.toggle("busy", Boolean(text));
}

// Ask for an action and hand each of its events on; resolves to whether it came to its end.
// A quiet one leaves the status to what the person waits for.
export async function call(action, body, onEvent, { signal, says, quiet } = {}) {
  const tell = quiet ? () => {} : showStatus;
  running += 1;
  tell(says || "working");
  let ended = false;
  try {
    const answer = await fetch(`api/${action}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    if (!answer.ok) throw new Error((await answer.text()).trim() || `status ${answer.status}`);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      text += value;
      const parts = text.split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue;
        const event = JSON.parse(part.slice(6));
        if (event.event === "queue") tell(`waiting, place ${event.place}`);
        else if (event.event === "error") throw new Error(event.message);
        else if (event.event === "end") ended = true;
        else if (event.event === "note") event.message && showError(event.message);
        else {
          tell(says || "working");
          onEvent(event);
        }
      }
    }
    if (!ended) throw new Error("The answer broke off. Is fgsteer play still running?");
  } catch (error) {
    if (error.name !== "AbortError") {
      const lost = error instanceof TypeError;
      showError(lost ? "fgsteer play does not answer. Is it still running in its terminal?" : error.message);
    }
  } finally {
    running -= 1;
    if (!running) showStatus("");
  }
  return ended;
}

// The one event of a name that an action gives; null where it failed.
export async function ask(action, body, name, more) {
  let found = null;
  await call(action, body, (event) => {
    if (event.event === name) found = event;
  }, more);
  return found;
}
