"use strict";
// Everything is written as text, never as markup. The key comes from the part of the address after #, which is not sent to anyone.

const byId = (id) => document.getElementById(id);
const key = { value: new URLSearchParams(location.hash.slice(1)).get("key") || sessionStorage.getItem("privinf-key") || "" };
const SHOWN = 200; // messages of a party that stay on the page
let running = null;

function headers() {
  return { Authorization: `Bearer ${key.value}`, "Content-Type": "application/json" };
}

function element(tag, text, kind) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function size(bytes) {
  for (const unit of ["B", "kB", "MB"]) {
    if (bytes < 1000) return unit === "B" ? `${bytes} B` : `${bytes.toFixed(1)} ${unit}`;
    bytes /= 1000;
  }
  return `${bytes.toFixed(2)} GB`;
}

async function about() {
  const answer = await fetch("/page/about", { headers: headers() });
  byId("keybox").hidden = answer.status !== 401;
  if (answer.status === 401) {
    byId("model").textContent = "give the API key that `privinf gateway` showed";
    return false;
  }
  const { model, trust, logits, demo, parties } = await answer.json();
  sessionStorage.setItem("privinf-key", key.value);
  history.replaceState(null, "", location.pathname);
  byId("model").textContent = `${model.variant}, ${model.layers} layers, context ${model.n_positions}, id ${model.id.slice(0, 8)}`;
  byId("server-place").textContent = `${parties.server}${demo ? ", a process on this machine" : ""}`;
  byId("dealer-place").textContent = `${parties.dealer}${demo ? ", a process on this machine" : ""}`;
  byId("trust").textContent = `Trust model (${trust.name}): ${trust.text}.`;
  byId("temperature").disabled = !logits;
  if (!demo) {
    for (const list of document.querySelectorAll(".seen")) {
      list.replaceChildren(element("li", "What it received is known on its own machine alone; here only what passed between us.", "what"));
    }
  }
  return true;
}

function table(role, rows) {
  const head = document.createElement("thead");
  head.append(element("tr", ""));
  for (const name of ["", "sent", "received", "rounds"]) head.firstChild.append(element("th", name));
  const body = document.createElement("tbody");
  for (const [name, cell] of rows) {
    const row = document.createElement("tr");
    row.append(element("td", name), element("td", size(cell.sent)), element("td", size(cell.received)), element("td", `${cell.rounds}`));
    body.append(row);
  }
  document.querySelector(`[data-role=${role}] .counters`).replaceChildren(head, body);
}

function counters(now) {
  const { server, dealer } = now.client;
  const turned = (cell) => ({ sent: cell.received, received: cell.sent, rounds: cell.rounds });
  table("client", [["online, with the server", server.online], ["offline, with the server", server.offline], ["offline, from the dealer", dealer.offline]]);
  if (now.server) {
    table("server", [["online, with the client", now.server.online], ["offline, with the client", now.server.offline.peer], ["offline, with the dealer", now.server.offline.dealer]]);
    table("dealer", [["offline, with both", now.dealer.offline.dealer]]);
  } else {
    table("server", [["online, with us", turned(server.online)], ["offline, with us", turned(server.offline)]]);
    table("dealer", [["offline, with us", turned(dealer.offline)]]);
  }
}

function seen(messages) {
  for (const message of messages) {
    const list = document.querySelector(`[data-role=${message.party}] .seen`);
    const line = document.createElement("li");
    line.append(element("span", `${message.from}, ${message.what}, ${size(message.bytes)}  `, "what"));
    line.append(element("span", message.value, "value"));
    list.append(line);
    while (list.childElementCount > SHOWN) list.firstChild.remove();
    list.scrollTop = list.scrollHeight;
  }
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const fields = { event: "message", data: "" };
      for (const line of text.slice(0, end).split("\n")) {
        const [name, ...rest] = line.split(": ");
        if (name in fields) fields[name] = rest.join(": ");
      }
      text = text.slice(end + 2);
      if (fields.data) yield [fields.event, JSON.parse(fields.data)];
    }
  }
}

async function ask() {
  const prompt = byId("prompt").value;
  const body = { prompt, max_tokens: Number(byId("count").value), temperature: Number(byId("temperature").value) };
  byId("reply").replaceChildren(element("span", prompt, "prompt"));
  byId("state").textContent = "asking";
  for (const list of document.querySelectorAll(".seen")) if (!list.querySelector("li:only-child.what")) list.replaceChildren();
  running = new AbortController();
  const began = performance.now();
  let count = 0;
  const answer = await fetch("/page/reply", { method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  for await (const [name, data] of events(answer)) {
    if (name === "token") {
      byId("reply").append(data.text === null ? `${data.id} ` : data.text);
      count += 1;
      byId("state").textContent = `${count} tokens`;
    } else if (name === "counters") counters(data);
    else if (name === "seen") seen(data);
    else if (name === "error") throw new Error(data.message);
    else if (name === "done") {
      const seconds = (performance.now() - began) / 1000;
      const { prompt_tokens, completion_tokens, prompt_tokens_details } = data.usage;
      const kept = prompt_tokens_details.cached_tokens ? `, ${prompt_tokens_details.cached_tokens} of them cached` : "";
      byId("state").textContent = `done (${data.finish_reason}): ${prompt_tokens} prompt tokens${kept}, ${completion_tokens} new, ${seconds.toFixed(1)} s`;
    }
  }
}

byId("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!byId("keybox").hidden) {
    key.value = byId("key").value;
    if (!(await about())) return;
  }
  byId("send").disabled = true;
  byId("stop").disabled = false;
  try {
    await ask();
  } catch (error) {
    byId("state").textContent = error.name === "AbortError" ? "stopped" : error.message;
  } finally {
    byId("send").disabled = false;
    byId("stop").disabled = true;
  }
});
byId("stop").addEventListener("click", () => running.abort());
about().catch((error) => { byId("model").textContent = error.message; });
