// The page: three models write to one prompt, and every token tells what each of them thought of it.

const $ = (id) => document.getElementById(id);
const SYSTEMS = ["base", "expert", "steered"];
const TOP = 5; // likeliest tokens shown at each position
const PAUSE = 250; // ms without a move of alpha before the steered text is written anew

let steers = []; // the experts that are served: {expert, alpha}
let whole = ""; // the model that all of them steer
let tells = true; // whether the server tells log-probabilities
const writing = {}; // the AbortController of each system that is being written
const written = {}; // what each system's text was written for

// What is asked for, and its form in a link

function state() {
  const on = steers.map((steer, i) => [steer.expert, Number($(`number-${i}`).value), $(`on-${i}`).checked]);
  return {
    prompt: $("prompt").value,
    steering: Object.fromEntries(on.filter(([, , picked]) => picked)),
    alone: $("alone").value,
    tokens: Number($("tokens").value),
    temperature: Number($("temperature").value),
    seed: Number($("seed").value),
  };
}

function link() {
  const { steering, ...rest } = state();
  const kept = new URLSearchParams(rest);
  for (const [expert, alpha] of Object.entries(steering)) kept.append("steer", `${expert}:${alpha}`);
  if (!kept.has("steer")) kept.append("steer", ""); // none is picked
  return `#${kept}`;
}

function recall() {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const id of ["prompt", "tokens", "temperature", "seed"]) {
    if (kept.has(id)) $(id).value = kept.get(id);
  }
  if (steers.some(({ expert }) => expert === kept.get("alone"))) $("alone").value = kept.get("alone");
  const given = new Map(kept.getAll("steer").map((each) => [each.slice(0, each.lastIndexOf(":")), each.split(":").at(-1)]));
  if (given.size) {
    steers.forEach(({ expert }, i) => {
      $(`on-${i}`).checked = given.has(expert);
      if (Number.isFinite(Number(given.get(expert)))) setAlpha(i, Number(given.get(expert)));
      showPicked(i);
    });
  }
  return kept.has("prompt");
}

// A box, a number and a slider for each expert

function setAlpha(i, value) {
  $(`number-${i}`).value = value;
  $(`slider-${i}`).value = value; // held within the slider's ends; the number may go beyond
}

function showPicked(i) {
  const picked = $(`on-${i}`).checked;
  $(`on-${i}`).parentElement.classList.toggle("off", !picked);
  for (const kind of ["number", "slider"]) $(`${kind}-${i}`).disabled = !picked;
}

function alphaControls() {
  steers.forEach(({ expert, alpha }, i) => {
    const row = make("div", { className: "alpha" });
    const box = make("input", { id: `on-${i}`, type: "checkbox", checked: true });
    const label = make("label", { htmlFor: `on-${i}`, textContent: expert });
    const number = make("input", { id: `number-${i}`, type: "number", min: -1000, max: 1000, step: "any", required: true });
    const slider = make("input", { id: `slider-${i}`, type: "range", min: 0, max: 2, step: 0.05 });
    number.setAttribute("aria-label", `alpha of ${expert}, as a number`);
    slider.setAttribute("aria-label", `alpha of ${expert}`);
    box.addEventListener("change", () => { showPicked(i); moved(); });
    slider.addEventListener("input", () => { number.value = slider.value; moved(); });
    number.addEventListener("input", () => { slider.value = number.value; moved(); });
    row.append(box, label, number, slider);
    $("alphas").append(row);
    $("alone").append(make("option", { value: expert, textContent: expert }));
    setAlpha(i, alpha);
  });
  $("alone").hidden = steers.length < 2;
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
  const { steering, alone, ...asked } = state();
  history.replaceState(null, "", link());
  const bodies = {
    base: { model: "base" },
    expert: { model: alone },
    steered: { model: whole, steering },
  };
  const jobs = SYSTEMS.map((system) => {
    const { tokens, ...how } = asked;
    const body = { ...bodies[system], ...how, max_tokens: tokens, stream: true };
    if (tells) body.logprobs = TOP;
    const wanted = JSON.stringify(body);
    if (written[system] === wanted) return null; // base and expert do not depend on alpha
    written[system] = wanted;
    return one(system, wanted);
  }).filter(Boolean);
  if (!jobs.length) return;
  say("Writing …");
  Promise.all(jobs).then((ends) => {
    if (ends.every((end) => end === "ended")) say(`Done. ${changes()}`);
  });
}

async function one(system, body) {
  writing[system]?.abort();
  const mine = (writing[system] = new AbortController());
  const place = $(system);
  place.replaceChildren();
  place.setAttribute("aria-busy", "true");
  buttons();
  let cut = false;
  let certain = null;
  try {
    for await (const part of events("v1/completions", body, mine.signal)) {
      if (mine.signal.aborted) return "stopped"; // what was on its way is not shown
      for (const token of part.choices[0]?.logprobs?.steering ?? []) show(place, token, system === "steered");
      if (!tells) place.append(part.choices[0]?.text ?? ""); // its base is behind an API: text is all there is
      cut ||= part.choices[0]?.finish_reason === "length";
      if (part.proxytune) certain = part.proxytune;
      count(system, cut, certain);
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
      place.setAttribute("aria-description", place.textContent); // the whole, for those who do not see it
      count(system, cut, certain);
    }
    buttons();
  }
}

async function* events(path, body, signal) {
  const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
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
  const span = make("span", { textContent: token.text, className: changed ? "changed" : "" });
  if (changed && token.text.includes("\n")) span.classList.add("line-end"); // a changed line end must be seen
  if (!token.text) span.classList.add("part"); // half a character, whose text comes with its other half
  span.tabIndex = place.childElementCount ? -1 : 0; // Tab comes to the first, arrows go on from there
  span.token = token;
  span.setAttribute("role", "option");
  span.setAttribute("aria-selected", "false");
  span.setAttribute("aria-label", spoken(token.text) + (changed ? `, the base: ${spoken(token.base.token)}` : ""));
  place.append(span);
}

const spoken = (text) => (text.trim() ? text : JSON.stringify(text));
const shown = (text) => JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"').replaceAll(" ", "␣");
const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share >= 0.1 ? `${share.toFixed(1)}%` : share >= 0.001 ? `${share.toPrecision(1)}%` : "~0%";
};

function count(system, cut, certain) {
  if (certain) { // its base is behind an API
    const told = `${certain.certified} of ${certain.tokens} tokens certified, ${certain.calls} calls`;
    return ($(`meta-${system}`).textContent = told + (cut ? ", cut" : ""));
  }
  const all = $(system).childElementCount;
  const marked = $(system).querySelectorAll(".changed").length;
  const tokens = system === "steered" ? `${marked} of ${all} tokens changed` : `${all} tokens`;
  $(`meta-${system}`).textContent = all ? tokens + (cut ? ", cut" : "") : "";
}

function changes() {
  const all = $("steered").childElementCount;
  return all ? `${$("steered").querySelectorAll(".changed").length} of ${all} tokens changed by steering.` : "";
}

function tell(span) {
  const { token } = span;
  for (const each of document.querySelectorAll(".told")) {
    each.classList.remove("told");
    each.setAttribute("aria-selected", "false");
  }
  span.classList.add("told");
  span.setAttribute("aria-selected", "true");
  const steered = span.parentElement.id === "steered";
  const roles = Object.keys(token.chosen).filter((key) => !["id", "token"].includes(key) && (steered || key !== "steered"));
  $("told").replaceChildren(...sentence(token, roles, steered));
  const pull = steered && roles.length === 4; // of one expert
  const rows = [token.chosen, token.base, ...token.top];
  const distinct = rows.filter((row, i) => rows.findIndex((each) => each.id === row.id) === i);
  $("columns").replaceChildren(head("token"), ...roles.map((role) => head(title(role), role)),
    ...(pull ? [make("th", { scope: "col", className: "pull", textContent: "expert − anti", title: "nats" })] : []));
  $("rows").replaceChildren(...distinct.map((row) => line(row, roles, pull, row === token.chosen)));
  $("table").hidden = false;
}

function sentence(token, roles, steered) {
  const quoted = (row) => make("q", { textContent: shown(row.token) });
  const [said, base] = [token.chosen, token.base];
  if (!steered) return ["Said ", quoted(said), `, at ${percent(said[roles[0]])}.`];
  const moved = `${percent(said.base)} by the base, ${percent(said.steered)} steered.`;
  return token.changed
    ? ["Steering said ", quoted(said), " where the base would have said ", quoted(base), `: ${moved}`]
    : ["Steered or not, it is ", quoted(said), `: ${moved}`];
}

// Of several experts each goes by its name.
function title(role) {
  const [, kind, number] = role.match(/^(\D+)(\d*)$/);
  return kind === "expert" && steers.length > 1 ? steers[(Number(number) || 1) - 1].expert : role;
}

function head(text, role = "") {
  const cell = make("th", { scope: "col", title: text });
  cell.append(make("b", { textContent: text, className: role.replace(/\d+$/, "") }));
  return cell;
}

function line(row, roles, pull, said) {
  const found = make("tr", { className: said ? "said" : "" });
  found.append(make("td", { textContent: shown(row.token) }));
  for (const role of roles) {
    const cell = make("td", { textContent: percent(row[role]), className: `bar ${role.replace(/\d+$/, "")}` });
    cell.style.setProperty("--share", `${100 * Math.exp(row[role])}%`);
    found.append(cell);
  }
  const nats = row.expert - row.anti;
  const text = `${nats < 0 ? "−" : "+"}${Math.abs(nats).toFixed(1)}`;
  if (pull) found.append(make("td", { className: "pull", textContent: text }));
  return found;
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
  history.replaceState(null, "", link());
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
  const card = (await answer.json()).data.at(-1); // all experts together come last
  steers = card.steering;
  whole = card.id;
  tells = card.logprobs;
  alphaControls();
  if (card.max_tokens) $("tokens").max = card.max_tokens;
  if (recall()) write();
  else $("prompt").value = card.example;
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); write(); });
$("stop").addEventListener("click", stop);
$("share").addEventListener("click", share);
$("alone").addEventListener("change", moved);
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
