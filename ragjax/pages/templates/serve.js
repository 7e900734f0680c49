// Asks without leaving the page, and shows each stage when it is ready. Without this script the form is a plain link.
"use strict";
const form = document.getElementById("ask");
const result = document.getElementById("result");
const state = document.getElementById("state");
const token = document.getElementById("token");
const examples = document.getElementById("examples");
let running = null;

function asked() {
  const values = new FormData(form);
  const body = { question: values.get("question").trim(), mode: values.get("mode") };
  for (const name of ["num_docs", "num_beams"]) body[name] = Number(values.get(name));
  return body;
}

function show(event, html) {
  if (event === "problem") {
    state.textContent = html;
    result.replaceChildren();
  } else {
    state.textContent = event === "retrieval" ? "The documents are found." : "";
    result.innerHTML = html; // rendered and escaped by the server, and no script may run
  }
}

async function ask() {
  if (running) running.abort();
  const mine = (running = new AbortController());
  const body = asked();
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token.value}`;
  state.textContent = "Asked …";
  result.setAttribute("aria-busy", "true");
  if (examples) examples.open = false;
  document.title = `${body.question} – ragjax`;
  try {
    const response = await fetch("stages", { method: "POST", headers, body: JSON.stringify(body), signal: mine.signal });
    if (!response.ok) {
      show("problem", (await response.json()).error.message);
      return;
    }
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      text += part.value;
      const events = text.split("\n\n");
      text = events.pop();
      for (const event of events) {
        const [name, data] = event.split("\n");
        show(name.slice("event: ".length), JSON.parse(data.slice("data: ".length)));
      }
    }
  } catch (error) {
    if (!mine.signal.aborted) show("problem", "The server did not answer.");
  } finally {
    if (running === mine) result.setAttribute("aria-busy", "false");
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const values = new URLSearchParams(new FormData(form));
  history.pushState(null, "", `?${values}`);
  ask();
});
for (const select of form.querySelectorAll("select")) {
  select.addEventListener("change", () => form.question.value.trim() && form.requestSubmit());
}
window.addEventListener("popstate", () => location.reload());
