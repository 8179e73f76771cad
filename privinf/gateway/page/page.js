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

async function refusal(answer) {
  byId("keybox").hidden = answer.status !== 401;
  return new Error((await answer.json()).error.message);
}

async function about() {
  const answer = await fetch("/page/about", { headers: headers() });
  if (answer.status === 401) {
    await refusal(answer);
    byId("model").textContent = "give the API key that `privinf gateway` showed";
    byId("key").focus();
    return false;
  }
  if (!answer.ok) throw await refusal(answer);
  byId("keybox").hidden = true;
  const { model, trust, logits, demo, parties, pace } = await answer.json();
  sessionStorage.setItem("privinf-key", key.value);
  history.replaceState(null, "", location.pathname);
  byId("model").textContent = `${model.variant}, ${model.layers} layers, context ${model.n_positions}, id ${model.id.slice(0, 8)}`;
  byId("server-place").textContent = `${parties.server}${demo ? ", a process on this machine" : ""}`;
  document.body.dataset.trust = trust.name;
  byId("dealer-place").textContent = `${parties.dealer}${demo ? ", a process on this machine" : ""}`;
  byId("trust").textContent = `Trust model (${trust.name}): ${trust.text}.`;
  if (pace && document.body.dataset.phase === "idle") {
    const token = pace.token_s === null ? "" : `, and ${pace.token_s.toPrecision(2)} s for each further token`;
    byId("numbers").textContent = `By this machine's speed, without a network: about ${pace.prompt_s.toPrecision(2)} s for a prompt of ${pace.prompt_tokens} tokens${token}`;
    byId("numbers").title = pace.machine;
  }
  byId("temperature").disabled = !logits;
  byId("temperature").title = logits ? "" : "the server gives no logits, so every token is the likeliest one";
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
  const third = document.body.dataset.trust === "dealer";
  const inAll = (...cells) => size(cells.reduce((sum, cell) => sum + cell.received, 0));
  const turned = (cell) => ({ sent: cell.received, received: cell.sent, rounds: cell.rounds });
  table("client", [["online, with the server", server.online], ["offline, with the server", server.offline], ...(third ? [["offline, from the dealer", dealer.offline]] : [])]);
  byId("client-got").textContent = inAll(server.online, server.offline, dealer.offline);
  byId("rounds").textContent = server.online.rounds;
  if (now.server) {
    byId("server-got").textContent = inAll(now.server.online, now.server.offline);
    const offline = third ? [["offline, with the dealer", now.server.offline.dealer]] : [];
    table("server", [["online, with the client", now.server.online], ["offline, with the client", now.server.offline.peer], ...offline]);
    if (now.dealer) {
      byId("dealer-got").textContent = inAll(now.dealer.offline);
      table("dealer", [["offline, with both", now.dealer.offline.dealer]]);
    }
  } else {
    byId("server-got").textContent = `${inAll(turned(server.online), turned(server.offline))} from us`;
    byId("dealer-got").textContent = `${inAll(turned(dealer.offline))} from us`;
    table("server", [["online, with us", turned(server.online)], ["offline, with us", turned(server.offline)]]);
    table("dealer", [["offline, with us", turned(dealer.offline)]]);
  }
}

function seen(messages) {
  for (const message of messages) {
    const list = document.querySelector(`[data-role=${message.party}] .seen`);
    const line = document.createElement("li");
    line.append(element("span", `${message.from}, ${message.what}, ${size(message.bytes)}`, "what"));
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

// What of the reply has come: `of` tokens at most, `first` when the first one came.
const come = { count: 0, of: 1, began: 0, first: 0 };

function phase(name, state) {
  document.body.dataset.phase = name;
  byId("state").textContent = state;
  const busy = name === "asking" || name === "replying";
  byId("send").disabled = byId("more").disabled = busy;
  byId("stop").disabled = !busy;
  if (name === "asking") byId("progress").removeAttribute("value");
  else byId("progress").value = name === "done" ? 1 : come.count / come.of;
}

function numbers() {
  const now = performance.now();
  const rate = come.count > 1 ? ` · ${((come.count - 1) / ((come.last - come.first) / 1000)).toFixed(1)} tokens/s` : "";
  byId("numbers").textContent = `${come.count} of ${come.of}${rate || " tokens"} · ${((now - come.began) / 1000).toFixed(1)} s`;
}

function token(text) {
  come.last = performance.now();
  if (come.count++ === 0) {
    come.first = come.last;
    phase("replying", "the reply arrives");
  }
  byId("progress").value = come.count / come.of;
  byId("reply").append(text);
  byId("reply").scrollTop = byId("reply").scrollHeight;
}

async function ask(prompt) {
  const body = { prompt, max_tokens: Number(byId("count").value), temperature: Number(byId("temperature").value) };
  Object.assign(come, { count: 0, of: body.max_tokens, began: performance.now() });
  byId("reply").replaceChildren(element("span", prompt, "prompt"));
  for (const list of document.querySelectorAll(".seen")) if (!list.querySelector("li.what")) list.replaceChildren();
  phase("asking", "the prompt is taken in");
  numbers();
  running = new AbortController();
  const answer = await fetch("/page/reply", { method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal });
  if (!answer.ok) throw await refusal(answer);
  for await (const [name, data] of events(answer)) {
    if (name === "token") token(data.text === null ? `${data.id} ` : data.text);
    else if (name === "begin") come.of = data.most;
    else if (name === "counters") counters(data);
    else if (name === "seen") seen(data);
    else if (name === "error") throw new Error(data.message);
    else if (name === "done") {
      const { prompt_tokens, completion_tokens, prompt_tokens_details } = data.usage;
      const kept = prompt_tokens_details.cached_tokens ? `, ${prompt_tokens_details.cached_tokens} of them cached` : "";
      phase("done", `done (${data.finish_reason}): ${prompt_tokens} prompt tokens${kept}, ${completion_tokens} new`);
      byId("more").hidden = false;
    }
  }
}

async function begin(prompt) {
  if (!byId("keybox").hidden) {
    key.value = byId("key").value;
    if (!(await about().catch(failed))) return;
  }
  const ticking = setInterval(numbers, 200);
  try {
    await ask(prompt);
    if (document.body.dataset.phase !== "done") throw new Error("the gateway ended the reply without a word");
  } catch (error) {
    if (error.name === "AbortError") phase("stopped", "stopped");
    else failed(error);
  } finally {
    clearInterval(ticking);
    numbers();
  }
}

function failed(error) {
  phase("error", error.message);
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  begin(byId("prompt").value);
});
byId("more").addEventListener("click", () => {
  byId("prompt").value = byId("reply").textContent;
  begin(byId("prompt").value);
});
byId("stop").addEventListener("click", () => running.abort());
about().catch((error) => { byId("model").textContent = error.message; });
