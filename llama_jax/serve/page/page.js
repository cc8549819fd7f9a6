import { render } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "repetition_penalty", "seed", "max_tokens"];
const KEPT = ["system", "stop", ...NUMBERS];
let turns = JSON.parse(sessionStorage.getItem("turns") || "[]");
let running = null;

for (const id of KEPT) {
  const value = localStorage.getItem(id);
  if (value !== null) $(id).value = value;
  $(id).addEventListener("input", () => localStorage.setItem(id, $(id).value));
}
$("key").value = sessionStorage.getItem("key") || "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  listModels();
});

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function settings() {
  const body = { model: $("model").value || undefined };
  for (const id of NUMBERS) if ($(id).value !== "") body[id] = Number($(id).value);
  if ($("stop").value) body.stop = [$("stop").value];
  return body;
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function listModels() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await problem(response));
    const { data } = await response.json();
    $("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
    say("");
  } catch (error) {
    say(error.message, true);
  }
}

// Posts a body and calls onText with every new text; returns what it was, in numbers.
async function stream(path, body, onText) {
  running = new AbortController();
  busy(true);
  const start = performance.now();
  let first = null, tokens = 0, finish = null;
  try {
    const response = await fetch(path, {
      method: "POST",
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    });
    if (!response.ok) throw new Error(await problem(response));
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (buffer + value).split("\n");
      buffer = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        const event = JSON.parse(line.slice(6));
        if (event.error) throw new Error(event.error.message);
        tokens = event.usage?.completion_tokens ?? tokens;
        for (const choice of event.choices) {
          const text = choice.delta ? choice.delta.content : choice.text;
          finish = choice.finish_reason ?? finish;
          if (!text) continue;
          first ??= performance.now();
          onText(text);
        }
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    finish = "stopped";
  } finally {
    running = null;
    busy(false);
  }
  const seconds = (performance.now() - (first ?? start)) / 1000;
  const parts = [];
  if (tokens) parts.push(`${tokens} tokens`);
  if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  if (first) parts.push(`first after ${((first - start) / 1000).toFixed(2)} s`);
  if (finish === "length") parts.push("cut at the limit");
  if (finish === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

function busy(on) {
  for (const [id, label] of [["send", "Send"], ["continue", "Continue"], ["fill", "Fill the gap"]])
    $(id).textContent = on ? "Stop" : label;
  document.body.toggleAttribute("aria-busy", on);
}

function store() {
  sessionStorage.setItem("turns", JSON.stringify(turns));
}

function button(label, action) {
  const node = document.createElement("button");
  node.type = "button";
  node.textContent = label;
  node.addEventListener("click", action);
  return node;
}

function messageNode(turn, index) {
  const node = document.createElement("article");
  node.className = `message ${turn.error ? "error" : turn.role}`;
  const body = document.createElement("div");
  body.className = "body";
  if (turn.role === "user") body.textContent = turn.content;
  else render(body, turn.error || turn.content);
  const tools = document.createElement("div");
  tools.className = "tools";
  if (!running) {
    if (turn.role === "user") tools.append(button("Edit", () => edit(index)));
    else tools.append(button("Copy", () => navigator.clipboard.writeText(turn.content)));
    if (turn.role === "assistant" && index === turns.length - 1)
      tools.append(button("Regenerate", () => reply(index)));
  }
  if (turn.note) tools.append(turn.note);
  node.append(body, tools);
  return node;
}

const STARTERS = ["Tell me a story about a llama.", "Explain attention in two sentences.", "Write a function that reverses a list."];

function show() {
  const list = $("messages");
  if (turns.length) {
    list.replaceChildren(...turns.map(messageNode));
  } else {
    const empty = document.createElement("div");
    empty.className = "empty";
    const title = document.createElement("strong");
    title.textContent = "What shall we talk about?";
    const starters = document.createElement("div");
    starters.className = "starters";
    starters.append(...STARTERS.map((text) => button(text, () => ask(text))));
    empty.append(title, "Everything stays between this page and its server.", starters);
    list.replaceChildren(empty);
  }
  list.scrollTop = list.scrollHeight;
}

async function reply(length) {
  if (running) return;
  turns = turns.slice(0, length);
  const sent = turns.map(({ role, content }) => ({ role, content }));
  if ($("system").value.trim()) sent.unshift({ role: "system", content: $("system").value });
  const turn = { role: "assistant", content: "" };
  turns.push(turn);
  const list = $("messages");
  let body = null;
  const { max_tokens, ...rest } = settings();
  const answer = stream(
    "/v1/chat/completions",
    { ...rest, max_completion_tokens: max_tokens, messages: sent },
    (text) => {
      turn.content += text;
      const follow = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
      render(body, turn.content);
      if (follow) list.scrollTop = list.scrollHeight;
    },
  );
  show();
  list.lastElementChild.classList.add("writing");
  body = list.lastElementChild.querySelector(".body");
  say("");
  try {
    turn.note = await answer;
  } catch (error) {
    turn.error = error.message;
  }
  if (turn.error && !turn.content) {
    turns.pop();
    say(turn.error, true);
  }
  store();
  show();
  $("message").focus();
}

function ask(text) {
  if (running || !text.trim()) return;
  if (turns.at(-1)?.role === "user") turns.pop();
  turns.push({ role: "user", content: text });
  reply(turns.length);
}

function edit(index) {
  $("message").value = turns[index].content;
  turns = turns.slice(0, index);
  store();
  show();
  fit();
  $("message").focus();
}

function fit() {
  const area = $("message");
  area.rows = Math.min(area.value.split("\n").length + Math.floor(area.value.length / 90), 12);
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const text = $("message").value;
  $("message").value = "";
  fit();
  ask(text);
});
$("message").addEventListener("input", fit);
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) $("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
$("clear").addEventListener("click", () => {
  running?.abort();
  turns = [];
  store();
  show();
});

async function run(path, body, onText) {
  if (running) return running.abort();
  say("");
  try {
    say(await stream(path, body, onText));
  } catch (error) {
    say(error.message, true);
  }
}
$("continue").addEventListener("click", () => {
  const area = $("text");
  run("/v1/completions", { ...settings(), prompt: area.value }, (text) => {
    area.value += text;
    area.scrollTop = area.scrollHeight;
  });
});
$("fill").addEventListener("click", () => {
  if (!running) $("middle").textContent = "";
  const body = { ...settings(), prompt: $("before").value, suffix: $("after").value };
  run("/v1/completions", body, (text) => ($("middle").textContent += text));
});
$("copy-fill").addEventListener("click", () =>
  navigator.clipboard.writeText($("before").value + $("middle").textContent + $("after").value),
);

const tabs = [...document.querySelectorAll("[role=tab]")];
function choose(tab) {
  for (const other of tabs) {
    other.setAttribute("aria-selected", String(other === tab));
    other.tabIndex = other === tab ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = other !== tab;
  }
  say("");
}
tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const next = tabs[(i + step + tabs.length) % tabs.length];
    choose(next);
    next.focus();
  });
});
$("toggle-settings").addEventListener("click", () => {
  const open = $("settings").hidden;
  $("settings").hidden = !open;
  $("toggle-settings").setAttribute("aria-expanded", String(open));
});

choose(tabs[0]);
show();
listModels();
