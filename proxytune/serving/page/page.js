// The page: three models write to one prompt, and every token tells what each of them thought of it.

const $ = (id) => document.getElementById(id);
const SYSTEMS = ["base", "expert", "steered"];
const TOP = 5; // likeliest tokens shown at each position
const PAUSE = 250; // ms without a move of alpha before the steered text is written anew

let steers = []; // the experts that are served: {expert, alpha}
let models = {}; // the served model of each system
const writing = {}; // the AbortController of each system that is being written
const written = {}; // what each system's text was written for

// What is asked for, and its form in a link

function state() {
  return {
    prompt: $("prompt").value,
    alphas: steers.map((_, i) => Number($(`number-${i}`).value)),
    tokens: Number($("tokens").value),
    temperature: Number($("temperature").value),
    seed: Number($("seed").value),
  };
}

function keep() {
  const { prompt, alphas, tokens, temperature, seed } = state();
  const kept = new URLSearchParams({ prompt, alpha: alphas.join(","), tokens, temperature, seed });
  history.replaceState(null, "", `#${kept}`);
}

function recall() {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const id of ["prompt", "tokens", "temperature", "seed"]) {
    if (kept.has(id)) $(id).value = kept.get(id);
  }
  const alphas = (kept.get("alpha") ?? "").split(",");
  steers.forEach((_, i) => {
    if (alphas[i] && Number.isFinite(Number(alphas[i]))) setAlpha(i, Number(alphas[i]));
  });
  return Boolean($("prompt").value);
}

// A slider and a number for each expert

function setAlpha(i, value) {
  $(`number-${i}`).value = value;
  $(`slider-${i}`).value = value; // held within the slider's ends; the number may go beyond
}

function alphaControls() {
  steers.forEach((steer, i) => {
    const row = make("div", { className: "alpha" });
    const label = make("label", { htmlFor: `slider-${i}`, textContent: `alpha of ${steer.expert}` });
    const slider = make("input", { id: `slider-${i}`, type: "range", min: -1, max: 3, step: 0.05 });
    const number = make("input", { id: `number-${i}`, type: "number", min: -1000, max: 1000, step: "any" });
    number.setAttribute("aria-label", `alpha of ${steer.expert}, as a number`);
    slider.addEventListener("input", () => { number.value = slider.value; moved(); });
    number.addEventListener("input", () => { slider.value = number.value; moved(); });
    row.append(label, slider, number);
    $("alphas").append(row);
    setAlpha(i, steer.alpha);
  });
}

let pause;
function moved() {
  clearTimeout(pause);
  if (written.base !== undefined) pause = setTimeout(write, PAUSE);
}

// Writing

function write() {
  clearTimeout(pause);
  if (!$("ask").reportValidity()) return;
  keep();
  const asked = state();
  const { alphas, ...rest } = asked;
  const jobs = SYSTEMS.map((system) => {
    const wanted = JSON.stringify(system === "steered" ? asked : rest);
    if (written[system] === wanted) return null; // base and expert do not depend on alpha
    written[system] = wanted;
    return one(system, asked);
  }).filter(Boolean);
  if (!jobs.length) return;
  say("Writing.");
  Promise.all(jobs).then((ends) => {
    if (ends.every((end) => end === "ended")) say(`Done. ${changes()}`);
  });
}

async function one(system, asked) {
  writing[system]?.abort();
  const mine = (writing[system] = new AbortController());
  const place = $(system);
  place.replaceChildren();
  place.setAttribute("aria-busy", "true");
  buttons();
  const body = {
    model: models[system], prompt: asked.prompt, max_tokens: asked.tokens, temperature: asked.temperature,
    seed: asked.seed, logprobs: TOP, stream: true,
  };
  if (system === "steered") body.alpha = asked.alphas;
  try {
    for await (const part of events("v1/completions", body, mine.signal)) {
      if (mine.signal.aborted) return "stopped"; // what was on its way is not shown
      for (const token of part.choices[0]?.logprobs?.steering ?? []) show(place, token, system === "steered");
    }
    return "ended";
  } catch (error) {
    if (writing[system] === mine) delete written[system];
    if (mine.signal.aborted) return "stopped";
    say(error.message, true);
    return "failed";
  } finally {
    if (writing[system] === mine) {
      delete writing[system];
      place.setAttribute("aria-busy", "false");
      if (system === "steered") $("share-changed").textContent = changes();
    }
    buttons();
  }
}

async function* events(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const answer = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    throw new Error(told?.error?.message ?? `The server answered ${answer.status}.`);
  }
  let rest = "";
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const value = JSON.parse(data);
      if (value.error) throw new Error(value.error.message);
      yield value;
    }
  }
}

function stop() {
  clearTimeout(pause);
  const active = Object.values(writing);
  for (const each of active) each.abort();
  if (active.length) say("Stopped.");
}

// Tokens and their probabilities

function show(place, token, marks) {
  const changed = marks && token.changed;
  const text = changed ? token.text.replaceAll("\n", "↵\n") : token.text; // a changed line end must be seen
  const span = make("span", { textContent: text, className: changed ? "changed" : "" });
  span.tabIndex = place.childElementCount ? -1 : 0; // Tab comes to the first, arrows go on from there
  span.token = token;
  span.setAttribute("role", "button");
  span.setAttribute("aria-label", named(token.text) + (changed ? `, the base: ${named(token.base.token)}` : ""));
  place.append(span);
}

const named = (text) => (text.trim() ? text : JSON.stringify(text));
const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share >= 0.1 ? `${share.toFixed(1)}%` : share >= 0.001 ? `${share.toPrecision(1)}%` : "~0%";
};

function changes() {
  const all = $("steered").childElementCount;
  const count = $("steered").querySelectorAll(".changed").length;
  return all ? `${count} of ${all} tokens changed by steering.` : "";
}

function tell(span) {
  const { token } = span;
  document.querySelectorAll(".told").forEach((each) => each.classList.remove("told"));
  span.classList.add("told");
  const steered = span.parentElement.id === "steered";
  const roles = Object.keys(token.chosen).filter((key) => !["id", "token"].includes(key) && (steered || key !== "steered"));
  const rows = [token.chosen, token.base, ...token.top];
  const distinct = rows.filter((row, i) => rows.findIndex((each) => each.id === row.id) === i);
  $("caption").textContent = `Said: ${JSON.stringify(token.chosen.token)}.` + (
    steered ? ` The base would have said ${token.changed ? JSON.stringify(token.base.token) : "the same"}.` : "");
  $("columns").replaceChildren(...["token", ...roles].map((name) => {
    const head = make("th", { textContent: name });
    head.scope = "col";
    return head;
  }));
  $("rows").replaceChildren(...distinct.map((row) => {
    const line = make("tr");
    line.append(make("td", { textContent: JSON.stringify(row.token).slice(1, -1).replaceAll(" ", "␣"), className: "token" }));
    for (const role of roles) {
      const cell = make("td", { textContent: `${percent(row[role])} ` });
      const bar = make("meter", { min: 0, max: 1, value: Math.exp(row[role]) });
      bar.setAttribute("aria-hidden", "true");
      cell.append(bar);
      line.append(cell);
    }
    return line;
  }));
  $("table").hidden = false;
  $("told").hidden = true;
}

function step(event) {
  const span = event.target.closest(".text span");
  if (!span) return;
  const all = [...span.parentElement.children];
  const at = all.indexOf(span);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined || !all[to]) return;
  event.preventDefault();
  span.tabIndex = -1;
  all[to].tabIndex = 0;
  all[to].focus();
}

// The rest

function make(kind, properties = {}) {
  return Object.assign(document.createElement(kind), properties);
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

function buttons() {
  $("stop").disabled = !Object.keys(writing).length;
}

async function share() {
  keep();
  try {
    await navigator.clipboard.writeText(location.href);
    say("The link is copied.");
  } catch {
    say("The link is in the address bar.");
  }
}

async function start() {
  const answer = await fetch("v1/models");
  if (!answer.ok) throw new Error(`The server answered ${answer.status}.`);
  const cards = (await answer.json()).data;
  const steered = cards.find((card) => card.steering.length);
  steers = steered.steering;
  models = { base: "base", expert: "expert", steered: steered.id };
  alphaControls();
  if (recall()) write();
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); write(); });
$("stop").addEventListener("click", stop);
$("share").addEventListener("click", share);
$("panels").addEventListener("keydown", step);
for (const name of ["mouseover", "focusin", "click"]) {
  $("panels").addEventListener(name, (event) => {
    const span = event.target.closest(".text span");
    if (span) tell(span);
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); write(); }
});
window.addEventListener("hashchange", () => { if (recall()) write(); });
start().catch((error) => say(error.message, true));
